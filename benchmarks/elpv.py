"""ELPV over HTTP: accuracy of a latentd that is taught real solar cells, one mini-batch after the other.

Two classes (functional, defective) on three splits, and the four classes of the demo in its order, with old-class accuracy before and
after the new classes came. Writes out/elpv.json and out/elpv.png. Settings are the shipped defaults; they were chosen on splits of other
seeds (100 and up).
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any, Dict, List, Sequence

import numpy as np
from rich.console import Console
from rich.progress import Progress

import elpv_cells
import harness
from latentd import config
from latentd.vision import checkpoints

console = Console()
PUBLISHED = {"SVM on hand-made features": 82.44, "fine-tuned VGG19": 88.42}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="out/elpv.json")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--four-class-seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    cache_dir = config.load(os.environ, {}).cache_dir
    checkpoints.pull(cache_dir, progress=console.print)
    cells = elpv_cells.load(cache_dir)
    two = [_two_classes(cells, seed) for seed in arguments.seeds]
    four = [_four_classes(cells, seed) for seed in arguments.four_class_seeds]
    accuracies = [run["accuracy"] for run in two]
    result = {
        "machine": harness.machine(),
        "two_classes": {"runs": two, "mean": float(np.mean(accuracies)), "std": float(np.std(accuracies))},
        "four_classes": {
            "runs": four,
            **{key: float(np.mean([run[key] for run in four])) for key in ("old_before", "old_after", "new", "all")},
        },
        "published": PUBLISHED,
    }
    harness.save_json(Path(arguments.out), result)
    _plot(result, Path(arguments.out).with_suffix(".png"))
    console.print(f"two classes: {result['two_classes']['mean']:.2f} % mean of {[round(a, 2) for a in accuracies]}")
    means = {key: round(value, 2) for key, value in result["four_classes"].items() if key != "runs"}
    console.print(f"four classes: {means}")
    return 0


def _two_classes(cells: Sequence[elpv_cells.Cell], seed: int) -> Dict[str, Any]:
    taught, held = elpv_cells.split(cells, seed)
    daemon = harness.DaemonProcess(harness.scratch_folder())
    rate = _teach(daemon, cells, taught, [cells[i].kind for i in taught], f"two classes, split {seed}")
    accuracy = _score(daemon, cells, held, [cells[i].kind for i in held])
    status = daemon.get("/v1/status")
    daemon.stop()
    found = {"seed": seed, "accuracy": accuracy, "taught": len(taught), "held": len(held), "images_per_s": rate}
    console.print(found)
    return dict(found, gate=status["learner"].get("gate"), accuracy_said=daemon_accuracy(status))


def daemon_accuracy(status: Dict[str, Any]) -> Any:
    """What the daemon itself says of its accuracy, beside the held-out truth."""
    return status.get("accuracy")


def _four_classes(cells: Sequence[elpv_cells.Cell], seed: int) -> Dict[str, Any]:
    """The demo's order: mono first, then poly; old-class accuracy before and after."""
    taught, held = elpv_cells.split(cells, seed)
    daemon = harness.DaemonProcess(harness.scratch_folder())

    def label(index: int) -> str:
        return f"{cells[index].module} {cells[index].kind}"

    def of(indices: Sequence[int], module: str) -> List[int]:
        return [i for i in indices if cells[i].module == module]

    mono, poly = of(held, "mono"), of(held, "poly")
    _teach(daemon, cells, of(taught, "mono"), [label(i) for i in of(taught, "mono")], f"mono, split {seed}")
    before = _score(daemon, cells, mono, [label(i) for i in mono])
    _teach(daemon, cells, of(taught, "poly"), [label(i) for i in of(taught, "poly")], f"poly, split {seed}")
    after, new = _score(daemon, cells, mono, [label(i) for i in mono]), _score(daemon, cells, poly, [label(i) for i in poly])
    daemon.stop()
    total = (after * len(mono) + new * len(poly)) / len(held)
    found = {"seed": seed, "old_before": before, "old_after": after, "new": new, "all": total}
    console.print(found)
    return found


def _teach(
    daemon: harness.DaemonProcess, cells: Sequence[elpv_cells.Cell], indices: Sequence[int], labels: Sequence[str], title: str
) -> float:
    """Teaches in order; images per second until the last 202."""
    named = dict(zip(indices, labels))
    started = time.perf_counter()
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(title, total=len(indices))
        for batch in harness.mini_batches(indices):
            daemon.teach([cells[i].png for i in batch], [named[i] for i in batch])
            progress.advance(task, len(batch))
    rate = len(indices) / (time.perf_counter() - started)
    daemon.wait_until_rested()
    return rate


def _score(daemon: harness.DaemonProcess, cells: Sequence[elpv_cells.Cell], indices: Sequence[int], truth: Sequence[str]) -> float:
    """Percent right."""
    decisions = daemon.ask([cells[i].png for i in indices])
    return 100.0 * sum(decision == label for decision, label in zip(decisions, truth)) / len(truth)


def _plot(result: Dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [*PUBLISHED, "latentd (this run)"]
    values = [*PUBLISHED.values(), result["two_classes"]["mean"]]
    figure, axes = pyplot.subplots(figsize=(7, 3))
    bars = axes.barh(names, values, color=["lightgrey", "lightgrey", "tab:blue"])
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.set(xlim=(75, 95), xlabel="accuracy on held-out ELPV cells (%)")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
