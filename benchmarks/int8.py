"""What the INT8 frozen stage gains and costs on this machine: its speed against the float one in one run, and points of the floor head.

Speed: an image alone on every core, and a full batch with one image a lane: the median over interleaved rounds of how many times as fast a
round was. "features" is against the plain export, whose last block computes all its tokens, where the INT8 graph computes the class token
alone; "tokens" asks both for all of it; "served" is as shipped, where neither computes more of the last block than its class token.
Accuracy: the streaming ridge head on ELPV (splits of the seeds given; 100 and up are for choosing) and on the Objects-50 sessions held out
(validation 5 and 9, or the test with --test), learned and asked in INT8, and learned in float and asked in INT8, as happens when a running
daemon changes over. Costs are paired, with the standard error over splits or videos. What the bound engine.int8_min_cosine means in points
is asked of random errors of that size, on Objects-50. Latents are cached in the cache folder. Writes a JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Sequence, Tuple

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
COSINES = (0.9995, 0.999, 0.998, 0.995, 0.99)  # of class tokens with what they should be: what do errors of that size cost?
DRAWS = 5
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
    settings = config.load(os.environ, {"backbone.split": 0})  # tokens are then those of the last block
    checkpoints.pull(settings.cache_dir, progress=console.print)
    stages = _stages(settings)
    served = _stages(config.load(os.environ, {}))
    speed = _speed(stages, settings.engine.max_batch, arguments.rounds, ("features", "tokens"))
    speed["served"] = _speed(served, settings.engine.max_batch, arguments.rounds, ("features",))["features"]
    result: Dict[str, Any] = {"machine": harness.machine(), "speed": speed}
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


def _speed(stages: Dict[str, FrozenStage], batch: int, rounds: int, wanted: Sequence[str]) -> Dict[str, Any]:
    """Milliseconds an image and ratios to float. "together": a batch cut over the lanes, each with its own images."""
    size = next(iter(stages.values())).spec.image_size
    pixels = np.resize(probe_images(size), (batch, size, size, 3))
    found: Dict[str, Any] = {}
    with ThreadPoolExecutor(max(stage.lanes for stage in stages.values())) as pool:

        def in_lanes(stage: FrozenStage, tokens: bool) -> None:
            parts = [pixels[lane :: stage.lanes] for lane in range(stage.lanes)]
            list(pool.map(lambda part: stage.encode(part, tokens, shared=stage.lanes > 1), parts))

        ways: Tuple[Tuple[str, int, Callable[[FrozenStage, bool], object]], ...] = (
            ("alone", 1, lambda stage, tokens: stage.encode(pixels[:1], tokens)),
            ("batch", batch, lambda stage, tokens: stage.encode(pixels, tokens)),
            ("together", batch, in_lanes),
        )
        for asked in wanted:
            found[asked] = {name: _ratios(stages, functools.partial(_asking, way, asked), count, rounds) for name, count, way in ways}
    return found


def _asking(way: Callable[[FrozenStage, bool], object], asked: str, stage: FrozenStage) -> None:
    way(stage, asked == "tokens")


def _ratios(stages: Dict[str, FrozenStage], way: Callable[[FrozenStage], object], count: int, rounds: int) -> Dict[str, Any]:
    times = _times(stages, way, rounds)
    return {
        "ms_an_image": {each: 1e3 * float(np.median(taken)) / count for each, taken in times.items()},
        "times_as_fast": {each: float(np.median(times[FLOAT] / taken)) for each, taken in times.items()},
    }


def _times(stages: Dict[str, FrozenStage], way: Callable[[FrozenStage], object], rounds: int) -> Dict[str, NDArray[np.float64]]:
    """Seconds of each round, in which every stage has its turn; two rounds before do not count."""
    times = {name: np.zeros(rounds + 2) for name in stages}
    for turn in range(rounds + 2):
        for name, stage in stages.items():
            began = time.perf_counter()
            way(stage)
            times[name][turn] = time.perf_counter() - began
    return {name: taken[2:] for name, taken in times.items()}


def _elpv(settings: config.Config, stages: Dict[str, FrozenStage], seeds: Sequence[int]) -> Dict[str, Any]:
    cells = elpv_cells.load(settings.cache_dir)
    limits = images.ImageLimits(settings.http.max_image_bytes, settings.http.max_pixels, settings.http.max_frames)

    def pictures(size: int) -> Iterable[NDArray[np.uint8]]:
        return (images.decode(cell.png, size=size, limits=limits) for cell in cells)

    latents = {name: _latents(settings, stage, f"elpv-{name}", len(cells), pictures) for name, stage in stages.items()}
    truth = np.array([int(cell.defective) for cell in cells])
    splits = [elpv_cells.split(cells, seed) for seed in seeds]

    def rights(learned: Features, asked: Features) -> NDArray[np.float64]:
        return np.array([_right(learned[taught], truth[taught], asked[held], truth[held]).mean() for taught, held in splits], np.float64)

    return {"seeds": list(seeds), "images": len(cells), **_compared(latents, rights)}


def _objects(settings: config.Config, stages: Dict[str, FrozenStage], frames: int, test: bool) -> Dict[str, Any]:
    every = _chosen(objects50.frames(settings.cache_dir), frames)
    flat = every.reshape(-1, *every.shape[3:])

    def pictures(size: int) -> Iterable[NDArray[np.uint8]]:
        return (latents50.pixels(frame[None], size)[0] for frame in flat)

    found = {name: _latents(settings, stages[name], f"objects50-{frames}-{name}", len(flat), pictures) for name in SPELLINGS}
    latents = {name: each.reshape(*every.shape[:3], -1) for name, each in found.items()}
    latents[FLOAT] = _chosen(latents50.features(settings), frames)
    asked_in = objects50.TEST_SESSIONS if test else objects50.VALIDATION_SESSIONS
    left_out = asked_in if test else (*objects50.TEST_SESSIONS, *asked_in)
    learned_in = [session for session in objects50.SESSIONS if session not in left_out]

    def of(latents: Features, sessions: Sequence[int]) -> Tuple[Features, NDArray[np.int64]]:
        chosen = latents[:, [session - 1 for session in sessions]]
        return chosen.reshape(-1, chosen.shape[-1]), np.repeat(np.arange(len(chosen)), chosen.shape[1] * chosen.shape[2])

    def rights(learned: Features, asked: Features) -> NDArray[np.float64]:
        right = _right(*of(learned, learned_in), *of(asked, asked_in))
        found: NDArray[np.float64] = right.reshape(-1, frames).mean(axis=1)  # (videos,): frames of one are no independent questions
        return found

    def asked_askew(cosine: float) -> NDArray[np.float64]:
        """What random errors of this size cost each video, over DRAWS draws."""
        taught, (features, truth) = of(latents[FLOAT], learned_in), of(latents[FLOAT], asked_in)
        draws = [_right(*taught, turned(features, width, cosine, draw), truth) for draw in range(DRAWS)]
        found: NDArray[np.float64] = np.mean(draws, axis=0).reshape(-1, frames).mean(axis=1)
        return found

    width = stages[FLOAT].spec.width
    whole = rights(latents[FLOAT], latents[FLOAT])
    of_cosine = {str(cosine): _paired(whole - asked_askew(cosine)) for cosine in COSINES}
    images = len(every) * len(asked_in) * frames
    compared = _compared(latents, rights)
    return {"asked": list(asked_in), "frames": frames, "images": images, **compared, "cost_points_of_a_cosine": of_cosine}


def turned(features: Features, width: int, cosine: float, seed: int) -> Features:
    """Every class token (width values) turned in a random direction until it has this cosine with itself."""
    tokens = features.reshape(-1, width)
    noise = np.random.default_rng(seed).normal(size=tokens.shape).astype(np.float32)
    noise -= (noise * tokens).sum(1, keepdims=True) / (tokens * tokens).sum(1, keepdims=True) * tokens
    noise *= np.linalg.norm(tokens, axis=1, keepdims=True) / np.linalg.norm(noise, axis=1, keepdims=True)
    askew: Features = np.float32(cosine) * tokens + np.float32((1 - cosine**2) ** 0.5) * noise
    return askew.reshape(features.shape)


def _chosen(values: Any, frames: int) -> Any:
    """(objects, sessions, frames, ...): of the frames of a video these many."""
    return values[:, :, :: values.shape[2] // frames][:, :, :frames]


def _compared(latents: Dict[str, Features], rights: Callable[[Features, Features], NDArray[np.float64]]) -> Dict[str, Any]:
    """Percent right in float, and for each spelling the points that it costs, each with its standard error. rights: the share of right
    answers in each of some groups of questions."""
    whole = rights(latents[FLOAT], latents[FLOAT])

    def cost(learned: str, asked: str) -> Tuple[float, float]:
        return _paired(whole - rights(latents[learned], latents[asked]))

    costs = {
        spelling: {
            "learned_and_asked": cost(spelling, spelling),
            "learned_in_float": cost(FLOAT, spelling),
            "asked_in_float": cost(spelling, FLOAT),
        }
        for spelling in SPELLINGS
    }
    return {"float": 100.0 * float(whole.mean()), "cost_points": costs}


def _paired(lost: NDArray[np.float64]) -> Tuple[float, float]:
    """Mean and its standard error, in points, of the shares lost in each group."""
    return 100.0 * float(lost.mean()), 100.0 * float(lost.std(ddof=1) / len(lost) ** 0.5)


def _right(learned: Features, classes: NDArray[np.int64], asked: Features, truth: NDArray[np.int64]) -> NDArray[np.bool_]:
    sums = RidgeSums(learned.shape[1])
    for start in range(0, len(learned), 256):
        sums.add(np.ascontiguousarray(learned[start : start + 256]), [int(each) for each in classes[start : start + 256]])
    head = sums.solve()
    answers = np.asarray(head.class_ids)[np.argmax(asked @ head.weight + head.bias, axis=1)]
    found: NDArray[np.bool_] = answers == truth
    return found


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
