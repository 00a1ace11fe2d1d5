"""How many attention heads can go: accuracy of the closed-form head on frozen features against the share of heads removed.

Objects-50 (and, with --data elpv, the ELPV cells). Each score prunes half of the heads in steps of 12.5 %, on shown images; every backbone
on the way is exported, gated and timed against the whole one in the same run. Where there are several scores, they are compared at 25 and
50 % on validation images, and the best is asked the test images, once. With --validation the test is left alone: that is where settings are
chosen. A head is taught on a few frames of every taught video and asked all frames of others, before and after: the difference is of the
same images, and its standard error counts a video once, because its frames are nearly one. Writes JSON, a Markdown table, the curve and the
picture of the heads.
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
from latentd.learning.pruning import SCORES, Lesson, Outcome, Step, Wish, ask, prune
from latentd.vision import checkpoints
from latentd.vision import prune as surgery
from latentd.vision.images import ImageLimits, decode

console = Console()
STEPS = 4
MOST = 0.5
BATCH = 8
TAUGHT_FRAMES = 4  # of every taught video
HELD = 100  # images that `prune` itself asks: here it is never stopped by what they say


class Exam(NamedTuple):
    """Images of one data set. shown: scores, repairs and imitation come from them. A head taught on `taught` is asked `validation`; one
    taught on both is asked `test`. videos: how many videos each of the two asked parts has; image i is of video i % videos."""

    shown: Lesson
    taught: Lesson
    validation: Lesson
    test: Lesson
    videos: Tuple[int, int]


class Pupil(NamedTuple):
    """One score's pruning: what `prune` says, and the backbone of every step."""

    outcome: Outcome
    backbones: List[checkpoints.Backbone]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="out/prune.json")
    parser.add_argument("--data", choices=("objects50", "elpv"), default="objects50")
    parser.add_argument("--scores", nargs="+", choices=SCORES, default=["residual"], help="more than one: compared on validation images")
    parser.add_argument("--images", type=int, default=1200, help="images that scores, repairs and imitation come from")
    parser.add_argument("--epochs", type=float, default=Wish.epochs, help="of imitation, each round")
    parser.add_argument("--share", type=float, default=MOST, help="of the heads, to be gone at the end")
    parser.add_argument("--rounds", type=int, default=STEPS, help="in which they go; each makes a row")
    parser.add_argument("--validation", action="store_true", help="leave the test images alone")
    arguments = parser.parse_args()
    settings = config.load(os.environ, {})
    base = checkpoints.pull(settings.cache_dir, progress=console.print)
    exam = (_objects50 if arguments.data == "objects50" else _elpv)(settings, arguments.images)
    counts = {name: len(getattr(exam, name).pixels) for name in ("shown", "taught", "validation", "test")}
    console.print(f"{arguments.data}: {counts} images")
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(settings, base, exam, Path(scratch), arguments.share, arguments.rounds, arguments.epochs)
        pupils = {score: bench.pruned(score) for score in arguments.scores}
        tried = {score: bench.rows(pupils[score].backbones[1::2] or pupils[score].backbones, False) for score in pupils if len(pupils) > 1}
        best = max(tried, key=lambda score: sum(row["accuracy"] for row in tried[score]), default=arguments.scores[0])
        outcome = pupils[best].outcome
        curve = bench.rows(pupils[best].backbones, not arguments.validation)
    result = {
        "machine": harness.machine(),
        "data": arguments.data,
        "images": counts,
        "validation": tried,
        "chosen": best,
        "asked": "validation" if arguments.validation else "test",
        "curve": curve,
        "worth": [row.tolist() for row in outcome.worth],
        "removed": [[[block + 1, head + 1] for block, head in step.removed] for step in outcome.steps],
    }
    out = Path(arguments.out)
    harness.save_json(out, result)
    out.with_suffix(".md").write_text(_markdown(result))
    heads.save([row.tolist() for row in outcome.worth], outcome.steps[-1].removed, out.with_name(out.stem + "-heads.png"))
    _plot(result, out.with_suffix(".png"))
    console.print(_markdown(result), markup=False)
    return 0


class Bench:
    """Prunes one backbone, and asks and times what came of it beside the whole one. Its engines live while a row is made."""

    def __init__(
        self,
        settings: config.Config,
        base: checkpoints.Backbone,
        exam: Exam,
        scratch: Path,
        share: float = MOST,
        rounds: int = STEPS,
        epochs: float = Wish.epochs,
    ) -> None:
        self.settings, self.base, self.exam, self.scratch = settings, base, exam, scratch
        self.share, self.rounds, self.epochs = share, rounds, epochs

    def pruned(self, score: str) -> Pupil:
        """The share of the heads that was asked for, whatever it costs."""
        made: List[checkpoints.Backbone] = []

        def keep(step: Step, pruned: surgery.Pruned) -> None:
            made.append(surgery.install(self.scratch, self.base, pruned, step.removed, f"{score}-{len(step.removed)}"))
            console.print(f"{score}: {len(step.removed)} heads gone after {time.perf_counter() - started:.0f} s")

        started = time.perf_counter()
        backbone = self.settings.backbone
        held = self.exam.validation.of(np.linspace(0, len(self.exam.validation.pixels) - 1, HELD).astype(np.int64))
        with console.status("") as status:
            outcome = prune(
                checkpoints.read_weights(self.base),
                self.base.shape,
                backbone.image_size,
                backbone.class_tokens,
                self.exam.shown,
                held,
                Wish(self.share, 100.0, score, self.rounds, epochs=self.epochs),
                lambda doing, done, total: status.update(f"{score}: {doing} {done}/{total}"),
                keep,
            )
        return Pupil(outcome, made)

    def rows(self, backbones: Sequence[checkpoints.Backbone], test: bool) -> List[Dict[str, Any]]:
        """The whole backbone and these, asked the same images."""
        whole = _opened(self.settings, self.base, self.settings.cache_dir)
        answers = [_right(whole, self.exam, test)]
        rows = [self._row(self.base, whole, whole, answers[0], answers[0], test)]
        for backbone in backbones:
            stage = _opened(self.settings, backbone, self.scratch)
            rows.append(self._row(backbone, whole, stage, answers[0], _right(stage, self.exam, test), test))
            console.print({key: rows[-1][key] for key in ("heads", "accuracy", "difference", "difference_error", "latency_ratio")})
            stage.close()
        whole.close()
        return rows

    def _row(
        self,
        backbone: checkpoints.Backbone,
        whole: FrozenStage,
        stage: FrozenStage,
        before: NDArray[np.bool_],
        after: NDArray[np.bool_],
        test: bool,
    ) -> Dict[str, Any]:
        difference, error = paired(before, after, self.exam.videos[test])
        pixels = self.exam.shown.pixels
        seconds = price.latencies_s([whole, stage], pixels)
        return {
            "heads": sum(backbone.shape.heads),
            "share_removed": 1 - sum(backbone.shape.heads) / sum(self.base.shape.heads),
            "parameters": surgery.parameters(backbone.shape),
            "accuracy": 100 * float(after.mean()),
            "difference": 100 * difference,
            "difference_error": 100 * error,
            "latency_ratio": seconds[1] / seconds[0],
            "engine": stage.name,
            "energy_j": price.joules(stage, pixels, self.settings.energy)._asdict(),
        }


def paired(before: NDArray[np.bool_], after: NDArray[np.bool_], videos: int) -> Tuple[float, float]:
    """What changed in the share of right answers, and the standard error of that over videos; image i is of video i % videos."""
    change = (after.astype(np.float64) - before).reshape(-1, videos).mean(axis=0)
    return float(change.mean()), float(change.std(ddof=1) / np.sqrt(videos))


def _opened(settings: config.Config, backbone: checkpoints.Backbone, cache_dir: Path) -> FrozenStage:
    """The backbone's engine, exported and gated as the daemon does it."""
    own = dataclasses.replace(
        settings,
        backbone=dataclasses.replace(settings.backbone, name=backbone.name),
        state=dataclasses.replace(settings.state, cache_dir=str(cache_dir)),
    )
    return choose(own, backbone).stage


def _right(stage: FrozenStage, exam: Exam, test: bool) -> NDArray[np.bool_]:
    """Which asked images the closed-form head knows, on this stage's features."""
    sums = RidgeSums(stage.spec.features_width)
    for lesson in [exam.taught, exam.validation] if test else [exam.taught]:
        sums.add(_features(stage, lesson.pixels), lesson.class_ids.tolist())
    asked = exam.test if test else exam.validation
    return ask(sums.solve(), asked.class_ids).right(_features(stage, asked.pixels))


def _features(stage: FrozenStage, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    def encode(start: int) -> NDArray[np.float32]:
        return stage.encode(pixels[start : start + BATCH], shared=stage.lanes > 1).features

    with ThreadPoolExecutor(stage.lanes) as pool:
        return np.concatenate(list(pool.map(encode, range(0, len(pixels), BATCH))))


def _objects50(settings: config.Config, images: int) -> Exam:
    """Frames of the standard stream, evenly over sessions and objects: a session is in one part only; shown ones are taught too."""
    frames = objects50.frames(settings.cache_dir)
    apart = (*objects50.TEST_SESSIONS, *objects50.VALIDATION_SESSIONS)
    learned = [session for session in objects50.SESSIONS if session not in apart]
    each = max(1, images // (len(learned) * len(frames)))
    parts = (
        (learned, each),
        (learned, TAUGHT_FRAMES),
        (objects50.VALIDATION_SESSIONS, objects50.FRAMES),
        (objects50.TEST_SESSIONS, objects50.FRAMES),
    )
    videos = (len(objects50.VALIDATION_SESSIONS) * len(frames), len(objects50.TEST_SESSIONS) * len(frames))
    size = settings.backbone.image_size
    shown, taught, validation, test = (_videos(frames, sessions, count, size) for sessions, count in parts)
    return Exam(shown, taught, validation, test, videos)


def _videos(frames: NDArray[np.uint8], sessions: Sequence[int], each: int, size: int) -> Lesson:
    """`each` frames of every video, spread over it; every video once before any comes again."""
    times = [int((turn + 0.5) * frames.shape[2] / each) for turn in range(each)]
    chosen = [(thing, session - 1, at) for at in times for session in sessions for thing in range(len(frames))]
    pixels = latents50.pixels(np.stack([frames[place] for place in chosen]), size)
    return Lesson(pixels, np.array([thing for thing, _, _ in chosen], dtype=np.int64))


def _elpv(settings: config.Config, images: int) -> Exam:
    """Two classes; all but the test come from the taught cells of split 0, the test from its held-out ones. Every cell is its own video."""
    cells = elpv_cells.load(settings.cache_dir)
    learned, test = elpv_cells.split(cells, 0)
    limits = ImageLimits(1 << 24, 1 << 26, 1)

    def lesson(chosen: Sequence[int]) -> Lesson:
        pixels = np.stack([decode(cells[index].png, settings.backbone.image_size, limits) for index in chosen])
        return Lesson(pixels, np.array([cells[index].defective for index in chosen], dtype=np.int64))

    taught = lesson(learned[: 2 * len(learned) // 3])
    validation = lesson(learned[2 * len(learned) // 3 :])
    shown = taught.of(np.arange(min(images, len(taught.pixels))))
    return Exam(shown, taught, validation, lesson(test), (len(validation.pixels), len(test)))


def _markdown(result: Dict[str, Any]) -> str:
    lines = [
        f"# Heads removed: {result['data']}",
        "",
        f"Score {result['chosen']}; accuracy on {result['asked']} images; the difference is of the same images, its standard error over "
        "videos; latency: one image alone against the whole backbone, in the same run.",
        "",
        "| heads | removed | parameters | accuracy | difference | latency |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['heads']} | {100 * row['share_removed']:.1f} % | {row['parameters'] / 1e6:.2f} M | {row['accuracy']:.2f} % "
        f"| {row['difference']:+.2f} ± {row['difference_error']:.2f} | x {row['latency_ratio']:.2f} |"
        for row in result["curve"]
    ]
    if result["validation"]:
        lines += ["", "Validation: accuracy before, and what a quarter and a half of the heads changed.", ""]
        lines += ["| score | 0 | 25 % | 50 % |", "|---|---|---|---|"]
    for score, (whole, *rows) in result["validation"].items():
        cells = [f"{row['difference']:+.2f} ± {row['difference_error']:.2f}" for row in rows]
        lines.append(f"| {score} | {whole['accuracy']:.2f} % | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _plot(result: Dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.5))
    curve = result["curve"]
    shares = [100 * row["share_removed"] for row in curve]
    left.errorbar(shares, [r["accuracy"] for r in curve], [r["difference_error"] for r in curve], marker="o", label=result["asked"])
    for score, rows in result["validation"].items():
        points = [(100 * row["share_removed"], row["accuracy"]) for row in rows]
        left.plot(*zip(*points), linestyle=":", marker="x", label=f"validation, {score}")
    left.set(xlabel="heads removed (%)", ylabel="accuracy (%)")
    left.legend(fontsize="small")
    right.plot(shares, [row["latency_ratio"] for row in curve], marker="o")
    right.set(xlabel="heads removed (%)", ylabel="latency against the whole", ylim=(0, 1.1))
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
