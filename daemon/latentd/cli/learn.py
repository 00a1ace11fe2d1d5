"""`latentd learn`: teach files under one label, or a folder that holds one folder a class.

It can be run again after it was stopped: the daemon never stores the same image under the same label twice, and says so.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from latentd.cli.client import Client
from latentd.cli.pictures import Found, Outcome, find, find_by_class
from latentd.cli.sending import limits, outcome_code, problem_lines, send
from latentd.cli.terminal import JSON, URL, complain, connect, console, exit_code, note, plain, print_json, problem, say, show, table, verb
from latentd.errors import FileUnusable, LatentdError

WAIT_S = 30

PATHS = typer.Argument(
    ..., metavar="FILE...|DIR|-", help="Images (with --label), or one folder that holds one folder a class.", show_default=False
)
LABEL = typer.Option(None, "--label", "-l", help="The class of all the files.", show_default=False)
WAIT = typer.Option(True, "--wait/--no-wait", help=f"End when all is learned ({WAIT_S} s at most), or as soon as all is stored.")


@verb
def learn(
    paths: List[str] = PATHS, label: Optional[str] = LABEL, wait: bool = WAIT, url: Optional[str] = URL, as_json: bool = JSON
) -> None:
    """Teach images; run it again to go on after a stop."""
    found = _found(paths, label)
    lesson = Lesson(list(found.unusable), found.passed_over)
    with connect(url) as client:
        lesson.teach(client, found, wait, quiet=as_json)
    if as_json:
        print_json(lesson.document())
    else:
        lesson.show()
    raise typer.Exit(exit_code(lesson.stopped) if lesson.stopped else outcome_code(lesson.outcomes))


@dataclass
class Lesson:
    """One run of `learn`: what became of each file so far, and the error that ended it early, if one did."""

    outcomes: List[Outcome]
    passed_over: int
    version: Optional[int] = None
    stopped: Optional[LatentdError] = None

    def teach(self, client: Client, found: Found, wait: bool, quiet: bool) -> None:
        """Sends everything; an error before the first answer is raised, a later one is kept in `stopped`."""
        headers = {"Prefer": f"wait={WAIT_S}"} if wait else {}
        most = limits(client)
        try:
            with _progress(quiet) as progress:
                task = progress.add_task("teaching", total=len(found.pictures))
                for sent in send(client, "/v1/learn", found.pictures, most, last=headers):
                    self.outcomes += sent.outcomes
                    self.version = sent.answer.get("version", self.version)
                    progress.advance(task, len(sent.outcomes))
        except LatentdError as error:
            self.stopped = error
        except KeyboardInterrupt:
            note(f"Stopped after {len(self.outcomes)} of {len(found.pictures)} files; run the same command again to go on.")
            raise

    def by_class(self) -> Dict[str, Counter[str]]:
        """label -> state -> files; a file that could not be used has the state "problem"."""
        counts: Dict[str, Counter[str]] = {}
        for picture, result, _ in self.outcomes:
            counts.setdefault(picture.label or "", Counter())[result.get("state") or "problem"] += 1
        return counts

    def document(self) -> Dict[str, Any]:
        """What --json prints: one result a file, in order, as the daemon gave it; "problem" besides when the run ended early."""
        results = [{"file": picture.path, **result} for picture, result, _ in self.outcomes]
        counts = Counter(result.get("state") or "problem" for result in results)
        made = {"version": self.version, "counts": dict(counts), "passed_over": self.passed_over, "results": results}
        return {**made, "problem": problem(self.stopped)} if self.stopped else made

    def show(self) -> None:
        if len(self.outcomes) == 1 and "problem" not in self.outcomes[0].result:
            say(_sentence(self.outcomes[0]))
        elif self.outcomes:
            self._show_table()
        for line in problem_lines(self.outcomes):
            note(line)
        if self.passed_over:
            note(f"{self.passed_over} other files were passed over: outside the class folders, or not named as images are.")
        if self.stopped:
            complain(self.stopped)
            note("What was stored stays; run the same command again to go on.")

    def _show_table(self) -> None:
        rows = []
        for label, states in self.by_class().items():
            if not label:  # a folder that could not become a class; its line follows
                continue
            known, refused = states["duplicate"], states["problem"] + states["rejected"]
            rows.append([label, sum(states.values()) - known - refused, known, refused])
        show(table(["class", "taught", "known already", "not used"], rows, right=(1, 2, 3)))
        if any(result.get("state") == "learned" for _, result, _ in self.outcomes):
            say(f"Learned; version {self.version} answers now.")
        elif any(result.get("state") == "queued" for _, result, _ in self.outcomes):
            say("Stored safely; learning goes on in the background.")


def _found(paths: List[str], label: Optional[str]) -> Found:
    if label is not None:
        found = find(paths, label)
    elif len(paths) == 1 and Path(paths[0]).is_dir():
        found = find_by_class(paths[0])
    else:
        raise typer.BadParameter("name the class with --label, or give one folder that holds one folder a class", param_hint="FILE...|DIR")
    if not found.pictures and not found.unusable:
        detail = f"{plain(paths[0])} holds no images ({found.passed_over} other files)."
        raise FileUnusable(detail, hint="Without --label, a folder must hold one folder a class, with JPEG, PNG, WebP or BMP files in it.")
    return found


def _progress(quiet: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("images"), TimeRemainingColumn())
    return Progress(*columns, console=console(stderr=True), transient=True, disable=quiet or not sys.stderr.isatty())


def _sentence(outcome: Outcome) -> str:
    name, result = outcome.picture.path, outcome.result
    if result["state"] == "duplicate":
        return f"{name} is almost the same as one you taught before ({result['duplicate_of']}); it was skipped."
    if result["state"] in ("learned", "queued"):
        what = "is learned" if result["state"] == "learned" else "is stored and will be learned"
        return f"{name} {what} as {result['label']} ({result['sample_id']})."
    return f"{name}: {result['state']} ({result['sample_id']})."
