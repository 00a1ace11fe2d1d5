"""How many attention heads can go: accuracy of the closed-form head on frozen features against the share of heads removed.

Objects-50 (and, with --data elpv, the ELPV cells). Each score prunes on training images and is asked on validation images, at 25 and 50 %;
the best of them prunes in steps of 12.5 %, and its four backbones are exported, gated, timed against the whole one in the same run, and
asked the test images once. The head is fitted on training and validation images then. With --validation the test is left alone: that is
where settings are chosen. Writes JSON, a Markdown table, the curve and the picture of the heads.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Sequence, Tuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

import elpv_cells
import harness
import latents50
import objects50
from latentd import config
from latentd.cli import heads
from latentd.engines.choose import choose
from latentd.engines.stage import FrozenStage
from latentd.learning import price
from latentd.learning.analytic import RidgeSums
from latentd.learning.pruning import Lesson, Outcome, Step, Wish, ask, prune
from latentd.learning.redundancy import SCORES
from latentd.vision import checkpoints
from latentd.vision import prune as surgery
from latentd.vision.images import ImageLimits, decode

console = Console()
STEPS = 4
MOST = 0.5
BATCH = 8


class Exam(NamedTuple):
    """Images of one data set: shown (scores and repairs come from them), held (choices are made on them), test."""

    shown: Lesson
    held: Lesson
    test: Lesson


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="out/prune.json")
    parser.add_argument("--data", choices=("objects50", "elpv"), default="objects50")
    parser.add_argument("--scores", nargs="+", choices=SCORES, default=list(SCORES))
    parser.add_argument("--images", type=int, default=300, help="shown images; a third fewer are held, and twice as many asked in the test")
    parser.add_argument("--validation", action="store_true", help="leave the test images alone")
    arguments = parser.parse_args()
    settings = config.load(os.environ, {})
    base = checkpoints.pull(settings.cache_dir, progress=console.print)
    exam = (_objects50 if arguments.data == "objects50" else _elpv)(settings, arguments.images)
    console.print(f"{arguments.data}: {[len(part.pixels) for part in exam]} images shown, held, in the test")
    tried = {score: _pruned(settings, base, exam, score, 2) for score in arguments.scores}
    best = max(tried, key=lambda score: sum(step.accuracy for step in tried[score].steps))
    console.print(f"chosen on validation: {best}")
    with tempfile.TemporaryDirectory() as scratch:
        result = _curve(settings, base, exam, best, Path(scratch), arguments.validation)
    outcome: Outcome = result.pop("outcome")
    result = {
        "machine": harness.machine(),
        "data": arguments.data,
        "images": {name: len(part.pixels) for name, part in exam._asdict().items()},
        "validation": {
            score: {"before": each.before, "steps": [{"heads": len(s.removed), "accuracy": s.accuracy} for s in each.steps]}
            for score, each in tried.items()
        },
        "chosen": best,
        "worth": [row.tolist() for row in outcome.worth],
        "removed": [[[block + 1, head + 1] for block, head in step.removed] for step in outcome.steps],
        **result,
    }
    out = Path(arguments.out)
    harness.save_json(out, result)
    out.with_suffix(".md").write_text(_markdown(result))
    heads.save([row.tolist() for row in outcome.worth], outcome.steps[-1].removed, out.with_name(out.stem + "-heads.png"))
    _plot(result, out.with_suffix(".png"))
    console.print(_markdown(result), markup=False)
    return 0


def _pruned(settings: config.Config, base: checkpoints.Backbone, exam: Exam, score: str, rounds: int, keep: Any = None) -> Outcome:
    """Half of the heads, whatever it costs, with the accuracy on the held images after each round."""
    started = time.perf_counter()
    with console.status("") as status:
        outcome = prune(
            checkpoints.read_weights(base),
            base.shape,
            settings.backbone.image_size,
            settings.backbone.class_tokens,
            exam.shown,
            exam.held,
            Wish(MOST, 100.0, score, rounds),
            lambda doing, done, total: status.update(f"{score}: {doing} {done}/{total}"),
            keep,
        )
    curve = [(len(step.removed), round(step.accuracy, 2)) for step in outcome.steps]
    console.print(f"{score}: whole {outcome.before:.2f} %, then {curve} ({time.perf_counter() - started:.0f} s)")
    return outcome


def _curve(settings: config.Config, base: checkpoints.Backbone, exam: Exam, score: str, scratch: Path, validation: bool) -> Dict[str, Any]:
    """The chosen score in small steps; every backbone on the way in its engine."""
    made: List[checkpoints.Backbone] = []

    def keep(step: Step, pruned: surgery.Pruned) -> None:
        made.append(surgery.install(scratch, base, pruned, step.removed, f"step-{len(made) + 1}"))

    outcome = _pruned(settings, base, exam, score, STEPS, keep)
    whole = _opened(settings, base, settings.cache_dir)
    rows, answers = [], []
    for backbone in [base, *made]:
        stage = whole if backbone is base else _opened(settings, backbone, scratch)
        right = _right(stage, exam, validation)
        answers.append(right)
        seconds = price.latencies_s([whole, stage], exam.held.pixels)
        rows.append(
            {
                "heads": sum(backbone.shape.heads),
                "share_removed": 1 - sum(backbone.shape.heads) / sum(base.shape.heads),
                "parameters": surgery.parameters(backbone.shape),
                "accuracy": 100 * float(right.mean()),
                "difference": 100 * float(right.mean() - answers[0].mean()),
                "difference_error": 100 * float(np.std(right.astype(float) - answers[0]) / np.sqrt(len(right))),
                "latency_ratio": seconds[1] / seconds[0],
                "engine": stage.name,
                "energy_j": price.joules(stage, exam.held.pixels, settings.energy)._asdict(),
            }
        )
        console.print({key: rows[-1][key] for key in ("heads", "accuracy", "difference", "latency_ratio")})
        if stage is not whole:
            stage.close()
    whole.close()
    return {"asked": "validation" if validation else "test", "curve": rows, "outcome": outcome}


def _opened(settings: config.Config, backbone: checkpoints.Backbone, cache_dir: Path) -> FrozenStage:
    """The backbone's engine, exported and gated as the daemon does it."""
    own = dataclasses.replace(
        settings,
        backbone=dataclasses.replace(settings.backbone, name=backbone.name),
        state=dataclasses.replace(settings.state, cache_dir=str(cache_dir)),
    )
    return choose(own, backbone).stage


def _right(stage: FrozenStage, exam: Exam, validation: bool) -> NDArray[np.bool_]:
    """Which asked images the closed-form head knows, on this stage's features."""
    taught = [exam.shown] if validation else [exam.shown, exam.held]
    asked = exam.held if validation else exam.test
    sums = RidgeSums(stage.spec.features_width)
    for lesson in taught:
        sums.add(_features(stage, lesson.pixels), lesson.class_ids.tolist())
    return ask(sums.solve(), asked.class_ids).right(_features(stage, asked.pixels))


def _features(stage: FrozenStage, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    def encode(start: int) -> NDArray[np.float32]:
        return stage.encode(pixels[start : start + BATCH], shared=stage.lanes > 1).features

    with ThreadPoolExecutor(stage.lanes) as pool:
        return np.concatenate(list(pool.map(encode, range(0, len(pixels), BATCH))))


def _objects50(settings: config.Config, images: int) -> Exam:
    """Frames of the standard stream, evenly over sessions and objects: a session is in one part only."""
    frames = objects50.frames(settings.cache_dir)
    apart = (*objects50.TEST_SESSIONS, *objects50.VALIDATION_SESSIONS)
    shown = [session for session in objects50.SESSIONS if session not in apart]
    parts = ((shown, images), (objects50.VALIDATION_SESSIONS, 2 * images // 3), (objects50.TEST_SESSIONS, 2 * images))
    return Exam(*(_videos(frames, sessions, count, settings.backbone.image_size) for sessions, count in parts))


def _videos(frames: NDArray[np.uint8], sessions: Sequence[int], images: int, size: int) -> Lesson:
    """About so many frames, the same number of each video, spread over it; session by session, so that each class alternates."""
    each = max(1, images // (len(sessions) * len(frames)))
    times = [int((turn + 0.5) * frames.shape[2] / each) for turn in range(each)]
    chosen = [(thing, session - 1, at) for at in times for session in sessions for thing in range(len(frames))]
    pixels = latents50.pixels(np.stack([frames[place] for place in chosen]), size)
    return Lesson(pixels, np.array([thing for thing, _, _ in chosen], dtype=np.int64))


def _elpv(settings: config.Config, images: int) -> Exam:
    """Two classes; shown and held come from the taught cells of split 0, the test from its held-out ones."""
    cells = elpv_cells.load(settings.cache_dir)
    taught, test = elpv_cells.split(cells, 0)
    limits = ImageLimits(1 << 24, 1 << 26, 1)

    def lesson(chosen: Sequence[int]) -> Lesson:
        pixels = np.stack([decode(cells[index].png, settings.backbone.image_size, limits) for index in chosen])
        return Lesson(pixels, np.array([cells[index].defective for index in chosen], dtype=np.int64))

    held = images + 2 * images // 3
    return Exam(lesson(taught[:images]), lesson(taught[images:held]), lesson(test))


def _markdown(result: Dict[str, Any]) -> str:
    lines = [
        f"# Heads removed: {result['data']}",
        "",
        f"Score {result['chosen']}, chosen on validation; accuracy on {result['asked']} images; latency: one image alone against the whole "
        "backbone, in the same run.",
        "",
        "| heads | removed | parameters | accuracy | difference | latency |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['heads']} | {100 * row['share_removed']:.1f} % | {row['parameters'] / 1e6:.2f} M | {row['accuracy']:.2f} % "
        f"| {row['difference']:+.2f} ± {row['difference_error']:.2f} | x {row['latency_ratio']:.2f} |"
        for row in result["curve"]
    ]
    lines += [
        "",
        "Validation: accuracy before, and after a quarter and a half of the heads.",
        "",
        "| score | 0 | 25 % | 50 % |",
        "|---|---|---|---|",
    ]
    for score, found in result["validation"].items():
        lines.append(f"| {score} | {found['before']:.2f} % | " + " | ".join(f"{step['accuracy']:.2f} %" for step in found["steps"]) + " |")
    return "\n".join(lines) + "\n"


def _plot(result: Dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    total = result["curve"][0]["heads"]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.5))
    curve = result["curve"]
    shares = [100 * row["share_removed"] for row in curve]
    left.errorbar(shares, [r["accuracy"] for r in curve], [r["difference_error"] for r in curve], marker="o", label=result["asked"])
    for score, found in result["validation"].items():
        points: List[Tuple[float, float]] = [(0.0, found["before"])]
        points += [(100 * step["heads"] / total, step["accuracy"]) for step in found["steps"]]
        left.plot(*zip(*points), linestyle=":", marker="x", label=f"validation, {score}")
    left.set(xlabel="heads removed (%)", ylabel="accuracy (%)")
    left.legend(fontsize="small")
    right.plot(shares, [row["latency_ratio"] for row in curve], marker="o")
    right.set(xlabel="heads removed (%)", ylabel="latency against the whole", ylim=(0, 1.1))
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
