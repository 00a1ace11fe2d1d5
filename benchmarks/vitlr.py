"""Latent replay in the blocks of a ViT: an Objects-50 stream through the learner with the split below the depth, one video at a time.

Awake, the closed-form head learns each video at once; when what was learned has grown enough, the blocks above the split sleep over the
replay memory. Reports accuracy on all 50 objects along the stream for the floor and for what the gate lets answer, seconds awake and
asleep, and every byte that learning holds. With --validation the sessions 5 and 9 are held out instead of learned: that is where settings
are chosen. Writes JSON, a table and a plot.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Dict, Iterator, List, Sequence, Tuple

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

import harness
import latents50
import objects50
from latentd import config
from latentd.learning.adapted import Adapted
from latentd.learning.blocks import UpperBlocks, parameter_bytes
from latentd.learning.layers import widened_bytes
from latentd.learning.sleep import SleepSettings
from latentd.learning.trainer import Trainer, TrainerSettings
from latentd.replay.latents import LatentCodec, TokenPool, make_latent_codec
from latentd.replay.records import Entry, sample_id_of
from latentd.service.memory_plan import class_token_bytes, forward_bytes
from latentd.vision import checkpoints

# All of learning in 64 MB; chosen on order 0 of the validation sessions (docs/learning.md says what else was tried).
PROFILE = {
    "backbone.class_tokens": 2,
    "learn.replay_bytes": 4_500_000,
    "learn.token_bytes": 36_100_000,
    "learn.epochs": 0.0,
    "learn.holdout_every": 40,
    "learn.sleep_first": 500,
    "learn.sleep_growth": 1.0,
    "learn.sleep_epochs": 4.0,
    "learn.sleep_rate": 5e-4,
    "learn.microbatch": 4,
}
console = Console()
ASKED_STEP = 3  # along the stream every third frame of a video is asked; at its end all are
Latents = Tuple[NDArray[np.float32], NDArray[np.float32]]  # features (B, F), pooled tokens (B, N, D)


class Stream:
    """Latents of one Objects-50 stream, by (object, session); tokens are read from the disk when asked for."""

    def __init__(self, settings: config.Config, stream: objects50.Stream, split: int, pool: TokenPool) -> None:
        self._tokens = latents50.tokens(settings, split, stream)
        self._features = latents50.features(settings, stream)
        self._pool = pool
        self.frames = int(self._features.shape[2])
        self.width = int(self._features.shape[-1])

    def video(self, thing: int, session: int, step: int = 1) -> Latents:
        place = (thing, session - 1, slice(None, None, step))
        return np.array(self._features[place]), self._pool(np.asarray(self._tokens[place], np.float32))


def main() -> int:
    arguments = _arguments()
    settings = _settings(arguments)
    checkpoints.pull(settings.cache_dir, progress=console.print)
    stream = objects50.STREAMS[arguments.stream]
    latents50.features(settings, stream)  # made here, before the workers want them
    latents50.tokens(settings, settings.backbone.split, stream)
    held = objects50.VALIDATION_SESSIONS if arguments.validation else objects50.TEST_SESSIONS
    taught = [session for session in objects50.SESSIONS if session not in (*held, *objects50.TEST_SESSIONS)]
    # An order a core: two cores that share every product wait for each other after each.
    with ProcessPoolExecutor(arguments.workers or os.cpu_count() or 1, mp_context=multiprocessing.get_context("spawn")) as pool:
        runs: List[Dict[str, Any]] = []
        for run in pool.map(_run, [(settings, arguments.stream, order, taught, held) for order in arguments.orders]):
            runs.append(run)
            _write(arguments, _result(arguments, settings, runs, taught, held))  # after each: it takes long
    return 0


def _write(arguments: argparse.Namespace, result: Dict[str, Any]) -> None:
    harness.save_json(Path(arguments.out), result)
    Path(arguments.out).with_suffix(".md").write_text(_table(result), encoding="utf-8")
    _plot(result, Path(arguments.out).with_suffix(".png"))
    console.print(_table(result))


def _run(job: Tuple[config.Config, str, int, Sequence[int], Sequence[int]]) -> Dict[str, Any]:
    """One order, in a process of its own."""
    settings, name, order, taught, held = job
    torch.set_num_threads(1)
    backbone = checkpoints.find(settings.cache_dir, settings.backbone.name)
    pool = TokenPool(1 + backbone.shape.registers, backbone.shape.side(settings.backbone.image_size), settings.learn.token_grid)
    stream = Stream(settings, objects50.STREAMS[name], settings.backbone.split, pool)
    learn, shape = settings.learn, backbone.shape
    features = (settings.backbone.class_tokens, shape.width)
    own, tokens = (learn.codec, learn.codec_kind), (pool.tokens, shape.width)
    codec = make_latent_codec(learn.token_codec, learn.token_codec_kind, features, tokens, learn.seed, pool=pool, features_as=own)
    base = UpperBlocks.load(backbone, settings.backbone.split)
    inside = class_token_bytes(shape, pool.tokens)
    if settings.backbone.split < shape.depth - 1:
        inside = forward_bytes(shape, settings.backbone.split, pool.tokens)
    run = Run(stream, codec, base, settings, order, taught, held, inside).go()
    return {**run, "latents": str(codec), "bytes_a_latent": codec.code_bytes}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="out/vitlr.json")
    parser.add_argument("--orders", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--stream", choices=sorted(objects50.STREAMS), default="standard")
    parser.add_argument("--split", type=int, default=11)
    parser.add_argument("--workers", type=int, default=0, help="orders at a time, each on one core; 0: one a core")
    parser.add_argument("--validation", action="store_true", help="hold out sessions 5 and 9 of the training, and leave the test alone")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a key of the configuration")
    parser.add_argument("--shipped", action="store_true", help="the daemon's defaults instead of the settings that keep within 64 MB")
    return parser.parse_args()


def _settings(arguments: argparse.Namespace) -> config.Config:
    flags: Dict[str, Any] = {**({} if arguments.shipped else PROFILE), **dict(pair.split("=", 1) for pair in arguments.set)}
    return config.load(os.environ, {"backbone.split": arguments.split, **flags})


class Run:
    """One order of the stream."""

    def __init__(
        self,
        stream: Stream,
        codec: LatentCodec,
        base: UpperBlocks,
        settings: config.Config,
        order: int,
        taught: Sequence[int],
        held: Sequence[int],
        forward_bytes: int,
    ) -> None:
        learn = settings.learn
        self._stream, self._codec, self._base, self._learn = stream, codec, base, learn
        self._order, self._taught, self._held = order, taught, held
        self._adapted = Adapted(base, codec, SleepSettings.of(learn, len(base.blocks)))
        self._forward_bytes = forward_bytes
        self._trainer = Trainer(codec, stream.width, TrainerSettings.of(learn), self._adapted)
        self._seen: Dict[int, int] = {}
        self._seq = 0
        self._awake_s = self._asleep_s = 0.0
        self._course: List[Dict[str, Any]] = []

    def go(self) -> Dict[str, Any]:
        batches = objects50.nicv2(self._order, self._taught)
        for number, videos in enumerate(batches):
            self._teach(videos)
            if self._trainer.wants_sleep():
                self._sleep(number)
        if self._adapted.learned_at < self._trainer.sums.count:
            self._sleep(len(batches) - 1)
        return {
            "order": self._order,
            **self._asked(step=1),
            "samples": self._seq,
            "awake_s": self._awake_s,
            "asleep_s": self._asleep_s,
            "sleeps": self._adapted.sleeps,
            "memory": self._memory(),
            "course": self._course,
        }

    def _teach(self, videos: Sequence[Tuple[int, int]]) -> None:
        first, batch = self._seq + 1, []
        codes = [(thing, code) for thing, session in videos for code in self._codec.encode(*self._stream.video(thing, session))]
        started = time.perf_counter()
        for thing, code in codes:
            self._seq += 1
            count = self._seen[thing] = self._seen.get(thing, 0) + 1
            every = self._learn.holdout_every
            holdout = every > 0 and count % every == 0
            batch.append(Entry(self._seq, "sample", first, sample_id_of(self._seq), thing, None, holdout, code.tobytes(), 0.0))
        for _ in self._trainer.take(batch):
            pass
        self._awake_s += time.perf_counter() - started

    def _sleep(self, number: int) -> None:
        started = time.perf_counter()
        for _ in self._trainer.sleep():
            pass
        self._asleep_s += time.perf_counter() - started
        found = self._asked(ASKED_STEP)
        self._course.append({"batch": number, "samples": self._seq, "asleep_s": self._asleep_s, **found})
        console.print(
            f"order {self._order}, video {number}: floor {found['floor']:.1f} %, adapted alone {found['adapted']:.1f} %, "
            f"answers {found['accuracy']:.1f} %; "
            f"{found['verdict']}; asleep {self._asleep_s:.0f} s"
        )

    def _asked(self, step: int) -> Dict[str, Any]:
        """Accuracy (%) of the floor, of the adapted head alone, and of what would be published, on the sessions held out."""
        snapshot, _ = self._trainer.candidate({thing: str(thing) for thing in self._seen}, 0.0)
        head = self._adapted.head()
        right: Dict[str, List[bool]] = {"floor": [], "adapted": [], "accuracy": []}
        for thing, features, tokens in self._videos(step):
            floor = np.argmax(features @ snapshot.analytic.weight + snapshot.analytic.bias, axis=1)
            right["floor"] += [snapshot.class_ids[int(column)] == thing for column in floor]
            right["accuracy"] += [snapshot.class_ids[int(column)] == thing for column in snapshot.predict(features, tokens).argmax(axis=1)]
            if self._adapted.serving is not None:
                scores = self._adapted.serving.features(tokens) @ head.weight + head.bias
                right["adapted"] += [head.class_ids[int(column)] == thing for column in scores.argmax(axis=1)]
        verdict = self._trainer.last_verdict
        per_class = np.reshape(right["accuracy"], (len(objects50.OBJECTS), -1)).mean(axis=1)
        return {
            **{name: 100 * float(np.mean(answers)) if answers else None for name, answers in right.items()},
            "per_class": [100 * float(value) for value in per_class],
            "verdict": verdict.reason if verdict else "",
        }

    def _videos(self, step: int) -> Iterator[Tuple[int, NDArray[np.float32], NDArray[np.float32]]]:
        for thing in range(len(objects50.OBJECTS)):
            for session in self._held:
                yield (thing, *self._stream.video(thing, session, step))

    def _memory(self) -> Dict[str, int]:
        """Bytes that learning holds, part by part: what is always there, and what training, making the sums again, or solving adds to it.
        all: the most that is ever there at one time.
        """
        blocks, trainer = self._adapted.blocks, self._trainer
        learned = sum(parameter.numel() * 4 for _, parameter in blocks.learned())
        classifier = 4 * (blocks.features_width + 1) * len(self._seen)
        widened = widened_bytes([parameter.numel() for parameter in self._base.parameters() if parameter.dtype == torch.float16])
        grams = [trainer.sums.gram.nbytes, self._adapted.sums_bytes()]
        always = {
            "replay": trainer.memory.used_bytes,
            "tokens": trainer.whole.used_bytes if trainer.whole is not None else 0,
            "holdout": trainer.holdout_bytes(),
            "evidence": sum(array.nbytes for array in self._adapted.evidence.state().values()),
            "sums": sum(grams) + trainer.sums.sums.nbytes,
            "pretrained_blocks": parameter_bytes([self._base]),
            "basis": 0 if self._codec.basis is None else self._codec.basis.nbytes,
            "learned_change": 2 * learned,  # what learns and what answers
        }
        times = {
            "training": 3 * learned + 4 * classifier + widened + self._activations(),  # gradient and two moments
            "summing_again": grams[1] + self._adapted.microbatch * self._forward_bytes,
            "solving": max(grams),  # the copy that is factorised
            "doubting": 2 * grams[0],  # the sums of one half, and the copy that is factorised
        }
        return {**always, **times, "all": sum(always.values()) + max(times.values())}

    def _activations(self) -> int:
        """Bytes that autograd keeps for one micro-batch, weights not counted again."""
        weights = {parameter.untyped_storage().data_ptr() for parameter in self._adapted.blocks.parameters()}
        kept: Dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        _, tokens = self._stream.video(0, self._taught[0])
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            answer = self._adapted.blocks(torch.from_numpy(tokens[: self._adapted.microbatch]))
        del answer
        return sum(kept.values())


def _result(
    arguments: argparse.Namespace,
    settings: config.Config,
    runs: Sequence[Dict[str, Any]],
    taught: Sequence[int],
    held: Sequence[int],
) -> Dict[str, Any]:
    means = {name: float(np.mean([run[name] for run in runs])) for name in ("accuracy", "floor", "adapted")}
    return {
        "machine": harness.machine(),
        "stream": arguments.stream,
        "split": settings.backbone.split,
        "latents": runs[0]["latents"],
        "bytes_a_latent": runs[0]["bytes_a_latent"],
        "learn": dataclasses.asdict(settings.learn),
        "sessions": {"taught": list(taught), "asked": list(held)},
        "orders": [run["order"] for run in runs],
        "mean": means,
        "std": float(np.std([run["accuracy"] for run in runs])),
        "runs": list(runs),
    }


def _table(result: Dict[str, Any]) -> str:
    lines = [
        f"Stream {result['stream']}, split {result['split']}, latents {result['latents']}, sessions {result['sessions']['asked']} asked.",
        "",
        "| order | floor % | adapted alone % | answers % | sleeps | awake s | asleep s | learning's memory MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run in result["runs"]:
        memory = run["memory"]
        lines.append(
            f"| {run['order']} | {run['floor']:.2f} | {run['adapted']:.2f} | {run['accuracy']:.2f} | {run['sleeps']} "
            f"| {run['awake_s']:.0f} | {run['asleep_s']:.0f} | {memory['all'] / 1e6:.1f} |"
        )
    mean = result["mean"]
    lines.append(f"| mean | {mean['floor']:.2f} | {mean['adapted']:.2f} | {mean['accuracy']:.2f} ± {result['std']:.2f} | | | | |")
    return "\n".join(lines) + "\n"


def _plot(result: Dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for run in result["runs"]:
        batches = [point["batch"] for point in run["course"]]
        for name, colour in (("floor", "tab:grey"), ("adapted", "tab:orange"), ("accuracy", "tab:blue")):
            label = f"order {run['order']}: {name}"
            axes.plot(batches, [point[name] for point in run["course"]], color=colour, marker=".", alpha=0.7, label=label)
    axes.set(xlabel="video", ylabel="accuracy on all 50 objects (%)", ylim=(0, 100))
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
