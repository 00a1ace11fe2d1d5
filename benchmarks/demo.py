"""The five-minute demo: teach solar cells in two stages, ask, kill it, ask again.

Stage 1 teaches mono functional / mono defective, stage 2 poly functional / poly defective, so classes arrive over time. After each stage
it prints accuracy on held-out photographs, old classes apart from new ones; then the daemon is killed with SIGKILL and started again, and
must know everything it knew.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import elpv_cells
import harness
from latentd import config
from latentd.errors import LatentdError
from latentd.vision import checkpoints

SEED = 0
WATCHED = 64  # held-out photographs asked again and again for the curve
CURVE_EVERY = 450  # taught photographs between two points of the curve
console = Console()


@dataclass
class Course:
    """What is taught and asked, and the curve so far: (photographs taught, accuracy on the watched photographs of each module)."""

    cells: Sequence[elpv_cells.Cell]
    taught: List[int]
    held: List[int]
    curve: List[Tuple[int, Dict[str, Optional[float]]]] = field(default_factory=list)
    stages: List[Tuple[int, str]] = field(default_factory=list)
    count: int = 0

    def label(self, index: int) -> str:
        return f"{self.cells[index].module} {self.cells[index].kind}"

    def of(self, indices: Sequence[int], module: str) -> List[int]:
        return [index for index in indices if self.cells[index].module == module]


def main() -> int:
    arguments = _arguments()
    folder = Path(arguments.work_dir)
    shutil.rmtree(folder / "state", ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    cache_dir = config.load(os.environ, {}).cache_dir
    try:
        checkpoints.pull(cache_dir, progress=console.print)
    except LatentdError as cause:
        console.print(f"[red]{cause.detail}[/red] {cause.hint}")
        return 1
    console.print("Reading the ELPV solar-cell photographs (91 MB the first time) …")
    cells = elpv_cells.load(cache_dir)
    course = Course(cells, *elpv_cells.split(cells, SEED))
    started = time.perf_counter()
    daemon = harness.DaemonProcess(folder / "state")
    console.print(f"latentd is up at {daemon.url} after {daemon.ready_s:.1f} s")
    for module, seen in (("mono", ["mono"]), ("poly", ["mono", "poly"])):
        _teach(daemon, course, module, seen)
        with console.status("the blocks sleep over what was taught, if it was enough …"):
            slept_s = daemon.wait_until_rested()
        console.print(f"asleep for {slept_s:.0f} s; {daemon.get('/v1/learner')['gate'].get('reason', '')}")
        decisions = _examine(daemon, course, seen, f"after teaching {module}")
    before = _knowledge(daemon, decisions)
    console.rule("kill -9, and start again")
    daemon.kill()
    daemon = harness.DaemonProcess(folder / "state")
    after = _knowledge(daemon, _ask(daemon, course, list(decisions)))
    daemon.stop()
    _plot(course, folder / "accuracy.png")
    same = _report_restart(before, after, daemon.ready_s)
    console.print(f"Plot: {folder / 'accuracy.png'}   whole run: {time.perf_counter() - started:.0f} s")
    return 0 if same else 1


def _teach(daemon: harness.DaemonProcess, course: Course, module: str, seen: Sequence[str]) -> None:
    """Teaches the module's photographs in mini-batches, watching the curve on the way."""
    todo = course.of(course.taught, module)
    course.stages.append((course.count, module))
    console.rule(f"teach {module} functional / {module} defective: {len(todo)} photographs")
    started, watching = time.perf_counter(), 0.0
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("teaching", total=len(todo), note="")
        for batch in harness.mini_batches(todo):
            daemon.teach([course.cells[i].png for i in batch], [course.label(i) for i in batch])
            course.count += len(batch)
            progress.advance(task, len(batch))
            if not course.curve or course.count - course.curve[-1][0] >= CURVE_EVERY:
                watching -= time.perf_counter()
                progress.update(task, note=_watch(daemon, course, seen))
                watching += time.perf_counter()
    taught_s = time.perf_counter() - started - watching
    _watch(daemon, course, seen)
    console.print(f"{len(todo) / taught_s:.1f} images per second taught, each on disk before its answer")


def _watch(daemon: harness.DaemonProcess, course: Course, seen: Sequence[str]) -> str:
    """A point of the curve, and its words for the progress bar."""
    daemon.wait_until_learned()
    point: Dict[str, Optional[float]] = {"mono": None, "poly": None}
    for module in seen:
        held = course.of(course.held, module)
        watched = np.linspace(0, len(held) - 1, WATCHED // 2).astype(int)  # held is in order of kind: evenly spaced is stratified
        point[module] = _accuracy(daemon, course, [held[i] for i in watched])
    course.curve.append((course.count, point))
    return "  ".join(f"{module} {value:.0%}" for module, value in point.items() if value is not None)


def _examine(daemon: harness.DaemonProcess, course: Course, seen: Sequence[str], title: str) -> Dict[int, str]:
    """Prints accuracy on all held-out photographs of the classes taught so far, speed, energy and memory; returns the decisions."""
    asked = [index for module in seen for index in course.of(course.held, module)]
    before_j = daemon.get("/v1/energy")["energy_j"]
    started = time.perf_counter()
    decisions = _ask(daemon, course, asked)
    seconds = time.perf_counter() - started
    energy, memory = daemon.get("/v1/energy"), daemon.get("/v1/memory")
    console.print(f"[bold]{title}[/bold]: {_share(course, decisions, asked)} of all classes taught so far")
    for module in seen:
        age = "new" if module == seen[-1] else "old"
        console.print(f"  {age} classes ({module} functional, {module} defective): {_share(course, decisions, course.of(asked, module))}")
    console.print(f"  classify {len(asked) / seconds:.1f} images per second")
    if before_j is not None and energy["energy_j"] is not None:
        console.print(f"  {(energy['energy_j'] - before_j) / len(asked):.2f} J an image; {harness.energy_text(energy)} so far")
    else:
        console.print(f"  joules {harness.energy_text(energy)}")
    console.print(
        f"  replay memory {memory['used_bytes'] / 1e6:.2f} MB of {memory['budget_bytes'] / 1e6:.0f} MB "
        f"({memory['used']} latents, {(memory['tokens'] or {'used': 0})['used']} with their tokens, {memory['codec']})"
    )
    return decisions


def _ask(daemon: harness.DaemonProcess, course: Course, indices: Sequence[int]) -> Dict[int, str]:
    """Photograph -> decision."""
    return dict(zip(indices, daemon.ask([course.cells[i].png for i in indices])))


def _share(course: Course, decisions: Dict[int, str], indices: Sequence[int]) -> str:
    right = sum(decisions[index] == course.label(index) for index in indices)
    return f"{right / len(indices):.1%} ({right} of {len(indices)} held-out cells)"


def _accuracy(daemon: harness.DaemonProcess, course: Course, indices: Sequence[int]) -> float:
    return sum(decision == course.label(index) for index, decision in _ask(daemon, course, indices).items()) / len(indices)


@dataclass(frozen=True)
class Knowledge:
    """What must survive: classes with counts, version, and every decision on the held-out photographs."""

    classes: Dict[str, int]
    version: int
    decisions: Dict[int, str]


def _knowledge(daemon: harness.DaemonProcess, decisions: Dict[int, str]) -> Knowledge:
    classes = {item["name"]: item["samples"] for item in daemon.get("/v1/classes")["classes"]}
    return Knowledge(classes, daemon.get("/v1/status")["version"], decisions)


def _report_restart(before: Knowledge, after: Knowledge, ready_s: float) -> bool:
    console.print(
        f"ready again after {ready_s:.1f} s: version {after.version}, {sum(after.classes.values())} samples, classes {after.classes}"
    )
    same = sum(after.decisions[index] == decision for index, decision in before.decisions.items())
    console.print(f"{same} of {len(before.decisions)} answers are the same as before the kill")
    console.print("[green]It still knows everything.[/green]" if after == before else "[red]Something was lost or changed.[/red]")
    return after == before


def _plot(course: Course, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    for module, colour in (("mono", "tab:blue"), ("poly", "tab:orange")):
        points = [(count, point[module]) for count, point in course.curve if point[module] is not None]
        axes.plot(
            [count for count, _ in points],
            [100 * value for _, value in points if value is not None],
            "o-",
            color=colour,
            label=f"{module} cells",
        )
    for count, module in course.stages:
        axes.axvline(count, color="grey", linestyle=":", linewidth=1)
        axes.annotate(f" teach {module}", (count, 41), color="grey")
    axes.set(
        xlabel="photographs taught",
        ylabel="accuracy on held-out cells (%)",
        ylim=(40, 100),
        title="latentd learns solar cells, and keeps what it learned",
    )
    axes.legend(loc="lower right")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Teach latentd real photographs, ask it, kill it, ask it again.")
    parser.add_argument("--work-dir", default="out/demo", help="where the state, the log and the plot go")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
