"""`latentd classify`: ask what images show; files, folders or stdin."""

from __future__ import annotations

from typing import Any, Dict, List, Optional

import typer
from rich.text import Text

from latentd.cli.client import Client
from latentd.cli.figures import percent
from latentd.cli.pictures import Found, Outcome, find
from latentd.cli.sending import limits, outcome_code, problem_lines, send
from latentd.cli.terminal import JSON, URL, connect, console, note, plain, print_json, verb
from latentd.errors import FileUnusable

BAR = 20  # columns of a full bar

PATHS = typer.Argument(..., metavar="FILE...|DIR|-", help="Images, folders of images, or - for stdin.", show_default=False)
TOP_K = typer.Option(3, "--top-k", "-k", min=1, help="Labels to show for each image.")


@verb
def classify(paths: List[str] = PATHS, top_k: int = TOP_K, url: Optional[str] = URL, as_json: bool = JSON) -> None:
    """Ask what images show."""
    found = find(paths)
    if not found.pictures and not found.unusable:
        raise FileUnusable(
            f"{plain(paths[0])} holds no images ({found.passed_over} other files).", hint="JPEG, PNG, WebP and BMP files are looked for."
        )
    outcomes = list(found.unusable)
    with connect(url) as client:
        about = _ask(client, found, top_k, outcomes, quiet=as_json)
    if as_json:
        print_json({**about, "results": [{"file": picture.path, **result} for picture, result, _ in outcomes]})
    for line in problem_lines(outcomes):
        note(line)
    raise typer.Exit(outcome_code(outcomes))


def _ask(client: Client, found: Found, top_k: int, outcomes: List[Outcome], quiet: bool) -> Dict[str, Any]:
    """Sends all, shows each answer as it comes; which version and engine answered last."""
    about: Dict[str, Any] = {"version": None, "engine": None}
    for sent in send(client, "/v1/classify", found.pictures, limits(client), last={}, top_k=top_k):
        outcomes += sent.outcomes
        about = {key: sent.answer.get(key, about[key]) for key in about}
        for outcome in [] if quiet else sent.outcomes:
            _show(outcome)
    return about


def _show(outcome: Outcome) -> None:
    predictions = outcome.result.get("predictions")
    if predictions is None:
        return
    screen = console()
    name = "stdin" if outcome.picture.path == "-" else outcome.picture.path
    decision = outcome.result["decision"]
    screen.print(Text(plain(name)), Text(f"  {plain(decision)}", style="bold"), sep="")
    width = max((len(plain(each["label"])) for each in predictions), default=0)
    for each in predictions:
        bar = "#" * round(BAR * each["probability"])
        screen.print(Text(f"  {plain(each['label']):<{width}}  {percent(each['probability']):>7}  "), Text(bar, style="green"), sep="")
    if not predictions:
        note("  Nothing has been taught yet; `latentd learn --label NAME FILE` teaches the first class.")
