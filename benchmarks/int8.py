"""What the INT8 frozen stage gains and costs on this machine: its speed against the float one in one run, and points of the floor head.

Speed: an image alone on every core, and a full batch with one image a lane, medians of interleaved rounds. Accuracy: the streaming ridge
head on ELPV (splits of the seeds given; 100 and up are for choosing) and on the Objects-50 sessions held out (validation 5 and 9, or the
test with --test), learned and asked in INT8, and learned in float and asked in INT8, as happens when a running daemon changes over. Latents
are cached in the cache folder. Writes a JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, Sequence, Tuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

import elpv_cells
import harness
import latents50
import objects50
from latentd import config
from latentd.engines.artefacts import Artefacts
from latentd.engines.int8 import SPELLINGS, open_spelling
from latentd.engines.onnx import CPU, OnnxStage
from latentd.engines.quantize import QUANTIZER_VERSION
from latentd.engines.stage import FrozenStage, stage_spec
from latentd.learning.analytic import RidgeSums
from latentd.vision import checkpoints, images
from latentd.vision.probe import probe_images

FLOAT = "float"
Features = NDArray[np.float32]
console = Console()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="out/int8.json")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(100, 110)), help="ELPV splits")
    parser.add_argument("--frames", type=int, default=4, help="frames a video of Objects-50")
    parser.add_argument("--test", action="store_true", help="Objects-50: ask the test sessions, having learned all others")
    parser.add_argument("--only-speed", action="store_true")
    arguments = parser.parse_args()
    settings = config.load(os.environ, {})
    checkpoints.pull(settings.cache_dir, progress=console.print)
    stages = _stages(settings)
    result: Dict[str, Any] = {"machine": harness.machine(), "speed": _speed(stages, settings.engine.max_batch, arguments.rounds)}
    if not arguments.only_speed:
        result["elpv"] = _elpv(settings, stages, arguments.seeds)
        result["objects50"] = _objects(settings, stages, arguments.frames, arguments.test)
    harness.save_json(Path(arguments.out), result)
    console.print(result)
    return 0


def _stages(settings: config.Config) -> Dict[str, FrozenStage]:
    backbone = checkpoints.find(settings.cache_dir, settings.backbone.name)
    artefacts, threads = Artefacts(backbone, stage_spec(settings, backbone), settings.cache_dir), settings.engine.threads
    int8 = {spelling: open_spelling(artefacts, spelling, threads) for spelling in SPELLINGS}
    return {FLOAT: OnnxStage(artefacts.spec, artefacts.graph(), CPU, threads), **int8}


def _speed(stages: Dict[str, FrozenStage], batch: int, rounds: int) -> Dict[str, Any]:
    """Milliseconds an image and ratios to float. "together": a batch cut over the lanes, each with its own images."""
    size = next(iter(stages.values())).spec.image_size
    pixels = np.resize(probe_images(size), (batch, size, size, 3))
    found: Dict[str, Any] = {}
    with ThreadPoolExecutor(max(stage.lanes for stage in stages.values())) as pool:

        def in_lanes(stage: FrozenStage) -> None:
            parts = [pixels[lane :: stage.lanes] for lane in range(stage.lanes)]
            list(pool.map(lambda part: stage.encode(part, shared=stage.lanes > 1), parts))

        ways: Tuple[Tuple[str, int, Callable[[FrozenStage], object]], ...] = (
            ("alone", 1, lambda stage: stage.encode(pixels[:1])),
            ("batch", batch, lambda stage: stage.encode(pixels)),
            ("together", batch, in_lanes),
        )
        for name, count, way in ways:
            median_ms = {each: 1e3 * statistics.median(times) / count for each, times in _times(stages, way, rounds).items()}
            found[name] = {"ms_an_image": median_ms, "times_as_fast": {each: median_ms[FLOAT] / ms for each, ms in median_ms.items()}}
    best = {each: min(found[name]["ms_an_image"][each] for name in found) for each in stages}
    return {**found, "best": {"ms_an_image": best, "times_as_fast": {each: best[FLOAT] / ms for each, ms in best.items()}}}


def _times(stages: Dict[str, FrozenStage], way: Callable[[FrozenStage], object], rounds: int) -> Dict[str, List[float]]:
    times: Dict[str, List[float]] = {name: [] for name in stages}
    for turn in range(rounds + 2):
        for name, stage in stages.items():
            began = time.perf_counter()
            way(stage)
            if turn >= 2:
                times[name].append(time.perf_counter() - began)
    return times


def _elpv(settings: config.Config, stages: Dict[str, FrozenStage], seeds: Sequence[int]) -> Dict[str, Any]:
    cells = elpv_cells.load(settings.cache_dir)
    limits = images.ImageLimits(settings.http.max_image_bytes, settings.http.max_pixels, settings.http.max_frames)

    def pictures(size: int) -> Iterable[NDArray[np.uint8]]:
        return (images.decode(cell.png, size=size, limits=limits) for cell in cells)

    latents = {name: _latents(settings, stage, f"elpv-{name}", len(cells), pictures) for name, stage in stages.items()}
    truth = np.array([int(cell.defective) for cell in cells])
    splits = [elpv_cells.split(cells, seed) for seed in seeds]

    def accuracy(learned: Features, asked: Features) -> float:
        return float(np.mean([_accuracy(learned[taught], truth[taught], asked[held], truth[held]) for taught, held in splits]))

    return {"seeds": list(seeds), **_compared(latents, accuracy)}


def _objects(settings: config.Config, stages: Dict[str, FrozenStage], frames: int, test: bool) -> Dict[str, Any]:
    every = objects50.frames(settings.cache_dir)
    every = every[:, :, :: every.shape[2] // frames][:, :, :frames]
    flat = every.reshape(-1, *every.shape[3:])

    def pictures(size: int) -> Iterable[NDArray[np.uint8]]:
        return (latents50.pixels(frame[None], size)[0] for frame in flat)

    found = {name: _latents(settings, stage, f"objects50-{frames}-{name}", len(flat), pictures) for name, stage in stages.items()}
    latents = {name: each.reshape(*every.shape[:3], -1) for name, each in found.items()}
    asked_in = objects50.TEST_SESSIONS if test else objects50.VALIDATION_SESSIONS
    left_out = asked_in if test else (*objects50.TEST_SESSIONS, *asked_in)
    learned_in = [session for session in objects50.SESSIONS if session not in left_out]

    def of(latents: Features, sessions: Sequence[int]) -> Tuple[Features, NDArray[np.int64]]:
        chosen = latents[:, [session - 1 for session in sessions]]
        return chosen.reshape(-1, chosen.shape[-1]), np.repeat(np.arange(len(chosen)), chosen.shape[1] * chosen.shape[2])

    def accuracy(learned: Features, asked: Features) -> float:
        return _accuracy(*of(learned, learned_in), *of(asked, asked_in))

    return {"asked": list(asked_in), "frames": frames, **_compared(latents, accuracy)}


def _compared(latents: Dict[str, Features], accuracy: Callable[[Features, Features], float]) -> Dict[str, Any]:
    """Percent right in float, and for each spelling the points that it costs."""
    whole = accuracy(latents[FLOAT], latents[FLOAT])
    costs = {
        spelling: {
            "learned_and_asked": whole - accuracy(latents[spelling], latents[spelling]),
            "learned_in_float": whole - accuracy(latents[FLOAT], latents[spelling]),
            "asked_in_float": whole - accuracy(latents[spelling], latents[FLOAT]),
        }
        for spelling in SPELLINGS
    }
    return {"float": whole, "cost_points": costs}


def _accuracy(learned: Features, classes: NDArray[np.int64], asked: Features, truth: NDArray[np.int64]) -> float:
    sums = RidgeSums(learned.shape[1])
    for start in range(0, len(learned), 256):
        sums.add(np.ascontiguousarray(learned[start : start + 256]), [int(each) for each in classes[start : start + 256]])
    head = sums.solve()
    answers = np.asarray(head.class_ids)[np.argmax(asked @ head.weight + head.bias, axis=1)]
    return 100.0 * float((answers == truth).mean())


def _latents(
    settings: config.Config, stage: FrozenStage, name: str, count: int, pictures: Callable[[int], Iterable[NDArray[np.uint8]]]
) -> Features:
    """(count, m*D), from the cache where they were computed before."""
    spec = "-".join(str(value) for value in dataclasses.astuple(stage.spec))
    path = settings.cache_dir / "datasets" / "int8" / f"{name}-{spec}-{QUANTIZER_VERSION}.npy"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        found = [stage.encode(each[None]).features[0] for each in track(pictures(stage.spec.image_size), name, count)]
        temporary = path.with_suffix(".tmp.npy")
        np.save(temporary, np.stack(found))
        temporary.replace(path)
    kept: Features = np.load(path)
    return kept


if __name__ == "__main__":
    sys.exit(main())
