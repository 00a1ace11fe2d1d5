"""Time to gather and decode one replay mini-batch, against np.take of the same latents kept as float32, in one run.

    python benchmarks/codec.py [--count 128] [--rounds 15] [--out codec.json]

Every figure is a median over rounds that alternate between the codec and the float32 baseline, so that a busy machine disturbs both. The
latents are random with a few huge channels; time does not depend on their values, error does.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any, Callable, Dict, List

import numpy as np
import numpy.typing as npt

from latentd.replay.codec import Codec, make_codec
from latentd.replay.memory import ReplayMemory

Floats = npt.NDArray[np.float32]

SHAPES = {"tokens of a ViT-S at 224 pixels": (257, 384), "class tokens of four blocks": (4, 384)}
NAMES = ("fp32", "fp16", "int8", "int7", "int6", "int5", "int4", "int3", "int2")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=128, help="latents in a mini-batch")
    parser.add_argument("--stored", type=int, default=256, help="latents in the memory")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    options = parser.parse_args()
    rows: List[Dict[str, Any]] = []
    for title, (tokens, width) in SHAPES.items():
        latents = spiky(options.stored, tokens, width)
        for name in NAMES:
            for kind in ("tensor", "token", "rotated")[: 1 if name.startswith("fp") else 3]:
                codec = make_codec(name, kind, tokens, width, calibration=latents[:16] if kind == "tensor" else None)
                rows.append({"latent": title, "codec": str(codec.spec), **measure(codec, latents, options.count, options.rounds)})
    report = {"machine": machine(), "count": options.count, "rows": rows}
    text = json.dumps(report, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


def spiky(count: int, tokens: int, width: int) -> Floats:
    latents: Floats = np.random.default_rng(0).standard_normal((count, tokens, width), dtype=np.float32)
    latents *= np.float32(0.2)
    latents[..., 7] += 6.4
    return latents


def measure(codec: Codec, latents: Floats, count: int, rounds: int) -> Dict[str, Any]:
    """One codec: bytes, relative error, and medians of encode, decode and draw."""
    M, N, D = latents.shape
    size = codec.code_bytes(N, D)
    begin = time.perf_counter()
    codes = codec.encode(latents)
    encode_s = (time.perf_counter() - begin) / M
    memory = ReplayMemory(str(codec.spec), size, M * (size + 64), seed=0)
    for place, code in enumerate(codes):
        memory.admit(f"s{place:07d}", place % 10, code.tobytes())
    rng = np.random.default_rng(0)
    rows = rng.integers(0, M, count)
    baseline_s, decode_s, draw_s = medians(
        [
            lambda: np.take(latents, rows, axis=0),
            lambda: codec.decode(np.take(codes, rows, axis=0)),
            lambda: codec.decode(memory.draw(count, rng)[0]),
        ],
        rounds,
    )
    error = codec.decode(codes[:16]) - latents[:16]
    return {
        "code_bytes": size,
        "relative_mse": float(np.square(error).sum() / np.square(latents[:16]).sum()),
        "encode_one_ms": round(encode_s * 1e3, 4),
        "take_float32_ms": round(baseline_s * 1e3, 4),
        "gather_and_decode_ms": round(decode_s * 1e3, 4),
        "draw_ms": round(draw_s * 1e3, 4),
        "decode_ratio": round(decode_s / baseline_s, 2),
        "draw_ratio": round(draw_s / baseline_s, 2),
    }


def medians(calls: List[Callable[[], Any]], rounds: int) -> List[float]:
    """Median seconds of each call; the calls take turns."""
    seconds: List[List[float]] = [[] for _ in calls]
    for turn in range(rounds + 1):
        for place, call in enumerate(calls):
            begin = time.perf_counter()
            call()
            if turn:  # the first turn warms caches
                seconds[place].append(time.perf_counter() - begin)
    return [statistics.median(values) for values in seconds]


def machine() -> Dict[str, Any]:
    return {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


if __name__ == "__main__":
    main()
