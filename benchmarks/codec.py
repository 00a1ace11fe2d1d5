"""What each codec loses, what it costs in bytes, and what reading a replay mini-batch costs beside the training step that it feeds.

    python benchmarks/codec.py [--images 32] [--rounds 5] [--out out/codec.json] [--step-only]

Errors are relative: the energy of the difference over the energy of the latents. They are measured on Gaussian values, where theory says
what to expect (Max 1960), and on latents of real photographs: ELPV cells and frames of Objects-50. The range of the kind "tensor" is read
off probe images, as the daemon does it. Times are ratios of medians over rounds in which gathering, decoding and the training step take
turns, so that a busy machine disturbs all of them. --step-only prints what codec_step.py
measures, and ends. Written: a JSON, a Markdown table and a plot.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Sequence, Tuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional

import elpv_cells
import harness
import objects50
from latentd import config
from latentd.learning.adaptive import AdaptiveHead
from latentd.replay.codec import Codec, make_codec
from latentd.replay.memory import ReplayMemory
from latentd.vision import checkpoints
from latentd.vision.probe import probe_images
from latentd.vision.vit import Vit, normalised

Floats = NDArray[np.float32]

SPLIT = 9  # the token matrices are those after this block
POOLED = 8  # patches are averaged to a grid of this side
MINIBATCH, NEW = 128, 21  # 107 latents of a mini-batch are replayed
MICRO_BATCH = 8
CLASSES = 50
STORED = 150
NAMES = ("fp32", "fp16", "int8", "int7", "int6", "int5", "int4", "int3", "int2")
KINDS = ("tensor", "token", "rotated", "scattered", "spatial")
LLOYD_MAX = {2: 0.1175, 3: 0.03454, 4: 0.009497, 5: 0.002499, 6: 0.000644, 7: 0.000164, 8: 0.0000412}


class Latents(NamedTuple):
    """Of one source: class tokens (B, m, D) and token matrices (B, N, D), whole and pooled."""

    features: Floats
    tokens: Floats
    pooled: Floats


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=32, help="photographs of each kind")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("out/codec.json"))
    parser.add_argument("--step-only", action="store_true", help="reading and the step beside bare PyTorch, nothing else")
    options = parser.parse_args()
    if options.step_only:
        print(_said(_step(options.rounds)))
        return 0
    settings = config.load(os.environ, {})
    backbone = checkpoints.find(settings.cache_dir, settings.backbone.name)
    vit = Vit.load(backbone, settings.backbone.image_size)
    probes = _latents(vit, probe_images(vit.image_size), settings.backbone.class_tokens)
    sources = {
        name: _latents(vit, photographs, settings.backbone.class_tokens)
        for name, photographs in _photographs(settings.cache_dir, options.images, vit.image_size)
    }
    result: Dict[str, Any] = {
        "machine": {**harness.machine(), "torch_threads": torch.get_num_threads()},
        "backbone": backbone.name,
        "images": options.images,
        "replayed": MINIBATCH - NEW,
        "errors": [row for name, kind in _codecs() for row in [_errors(name, kind, probes, sources)]],
        "times": [row for part in Latents._fields for row in _times(vit, part, probes, sources, options.rounds)],
        "step": _step(options.rounds),
    }
    harness.save_json(options.out, result)
    text = _markdown(result)
    options.out.with_suffix(".md").write_text(text)
    _plot(result, options.out.with_suffix(".png"))
    print(text)
    return 0


# --- latents ----------------------------------------------------------------------------------------------------------


def _photographs(cache_dir: Path, count: int, size: int) -> Iterator[Tuple[str, NDArray[np.uint8]]]:
    """Names and pixels (count, S, S, 3)."""
    rng = np.random.default_rng(0)
    cells = elpv_cells.load(cache_dir)
    chosen = [Image.open(io.BytesIO(cells[i].png)) for i in rng.permutation(len(cells))[:count]]
    yield "ELPV", _resized(chosen, size)
    frames = objects50.frames(cache_dir)
    flat = frames.reshape(-1, *frames.shape[3:])
    yield "Objects-50", _resized([Image.fromarray(flat[i]) for i in rng.permutation(len(flat))[:count]], size)


def _resized(photographs: Sequence[Image.Image], size: int) -> NDArray[np.uint8]:
    return np.stack([np.asarray(photograph.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)) for photograph in photographs])


def _latents(vit: Vit, pixels: NDArray[np.uint8], class_tokens: int) -> Latents:
    features, tokens = [], []
    for start in range(0, len(pixels), MICRO_BATCH):
        planes = torch.from_numpy(pixels[start : start + MICRO_BATCH].transpose(0, 3, 1, 2).astype(np.float32))
        with torch.no_grad():
            found = vit.frozen(normalised(planes, vit.shape), SPLIT, class_tokens)
        features.append(found[0].numpy().reshape(len(planes), class_tokens, -1))
        tokens.append(found[1].numpy())
    whole = np.concatenate(tokens)
    return Latents(np.concatenate(features), whole, _pooled(whole, vit))


def _pooled(tokens: Floats, vit: Vit) -> Floats:
    """(B, N, D) -> (B, leading + POOLED**2, D): patches averaged over squares, the tokens before them kept."""
    leading, side = 1 + vit.shape.registers, vit.shape.side(vit.image_size)
    grid = torch.from_numpy(tokens[:, leading:]).reshape(len(tokens), side, side, -1).permute(0, 3, 1, 2)  # (B, D, n, n)
    means = functional.adaptive_avg_pool2d(grid, POOLED).flatten(2).transpose(1, 2).numpy()
    return np.concatenate([tokens[:, :leading], means], axis=1)


# --- errors -----------------------------------------------------------------------------------------------------------


def _codecs() -> Iterator[Tuple[str, str]]:
    for name in NAMES:
        for kind in KINDS[: 1 if name.startswith("fp") else len(KINDS)]:
            yield name, kind


def _errors(name: str, kind: str, probes: Latents, sources: Dict[str, Latents]) -> Dict[str, Any]:
    """One row: bytes of a latent of each part, and errors."""
    gaussian = np.random.default_rng(0).standard_normal((16, 65, 384), dtype=np.float32)
    ideal = make_codec(name, kind, 65, 384, calibration=gaussian if kind == "tensor" else None)
    row: Dict[str, Any] = {"codec": str(ideal.spec)}
    row["bytes"] = {part: _codec(name, kind, part, probes).code_bytes for part in Latents._fields if _fits(kind, part)}
    row["gaussian"] = _loss(ideal, gaussian)
    bits = int(name[3:]) if name.startswith("int") else None
    row["theory"] = LLOYD_MAX[bits] if bits and kind in ("rotated", "scattered") else None
    for source, latents in sources.items():
        row[source] = {
            part: _loss(_codec(name, kind, part, probes), getattr(latents, part)) for part in Latents._fields if _fits(kind, part)
        }
    return row


def _fits(kind: str, part: str) -> bool:
    return kind != "spatial" or part != "features"


def _codec(name: str, kind: str, part: str, probes: Latents) -> Codec:
    """As the daemon makes it: only a range for everything is calibrated."""
    seen: Floats = getattr(probes, part)
    _, tokens, width = seen.shape
    return make_codec(name, kind, tokens, width, calibration=seen if kind == "tensor" else None)


def _loss(codec: Codec, latents: Floats) -> float:
    difference = codec.decode(codec.encode(latents)) - latents
    return float(np.square(difference, dtype=np.float64).sum() / np.square(latents, dtype=np.float64).sum())


# --- times ------------------------------------------------------------------------------------------------------------


def _times(vit: Vit, part: str, probes: Latents, sources: Dict[str, Latents], rounds: int) -> Iterator[Dict[str, Any]]:
    """Gathering and decoding the replayed latents of a mini-batch, against one training step on latents of this kind."""
    latents = np.concatenate([getattr(source, part) for source in sources.values()])
    step = _head_step(latents) if part == "features" else _blocks_step(vit, latents)
    codecs = [_codec(name, kind, part, probes) for name, kind in _codecs() if _fits(kind, part)]
    reads = [read for codec in codecs for read in _reads(codec, latents)]
    step_s, *read_s = _medians([step, *reads], rounds * 40 if part == "features" else rounds)  # milliseconds need many
    for place, codec in enumerate(codecs):
        gather_s, decode_s = read_s[2 * place : 2 * place + 2]
        times = {"gather_ms": gather_s * 1e3, "decode_ms": decode_s * 1e3, "step_ms": step_s * 1e3}
        yield {"part": part, "codec": str(codec.spec), **times, "share": (gather_s + decode_s) / step_s}


def _reads(codec: Codec, latents: Floats) -> List[Callable[[], object]]:
    """Drawing the replayed part of a mini-batch from a memory of STORED latents, and decoding it."""
    codes = codec.encode(latents)
    memory = ReplayMemory(str(codec.spec), codec.code_bytes, STORED * (codec.code_bytes + 64), seed=0)
    for place in range(STORED):
        memory.admit(f"s{place:07d}", place % CLASSES, codes[place % len(codes)].tobytes())
    draw = functools.partial(memory.draw, MINIBATCH - NEW, np.random.default_rng(0))
    return [draw, functools.partial(codec.decode, draw()[0])]


def _head_step(latents: Floats) -> Callable[[], object]:
    """One AdamW step of the head on a mini-batch."""
    features = np.resize(latents, (MINIBATCH, latents[0].size))
    head = AdaptiveHead(features.mean(0), features.std(0), learning_rate=1e-3, label_smoothing=0.1, seed=0)
    head.grow(range(CLASSES))
    return functools.partial(head.train_step, features, [i % CLASSES for i in range(MINIBATCH)], np.random.default_rng(0))


def _blocks_step(vit: Vit, latents: Floats) -> Callable[[], object]:
    """Forward, backward and one AdamW step of the blocks above the split, norm and classifier, in plain PyTorch."""
    tokens = torch.from_numpy(np.resize(latents, (MINIBATCH, *latents.shape[1:])))
    targets = torch.arange(MINIBATCH) % CLASSES
    trained = torch.nn.ModuleList([*vit.blocks[SPLIT:], vit.norm, torch.nn.Linear(vit.shape.width, CLASSES)]).requires_grad_(True)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-5)

    def step() -> None:
        optimizer.zero_grad()
        for start in range(0, MINIBATCH, MICRO_BATCH):
            hidden = tokens[start : start + MICRO_BATCH]
            for block in trained[:-2]:
                hidden = block(hidden)
            scores = trained[-1](trained[-2](hidden[:, 0]))
            loss = functional.cross_entropy(scores, targets[start : start + MICRO_BATCH]) * (MICRO_BATCH / MINIBATCH)
            torch.autograd.backward(loss)
        optimizer.step()

    return step


def _medians(calls: List[Callable[[], object]], rounds: int) -> List[float]:
    """Median seconds of each call; the calls take turns."""
    seconds: List[List[float]] = [[] for _ in calls]
    for turn in range(rounds + 1):
        for place, call in enumerate(calls):
            start = time.perf_counter()
            call()
            if turn:  # the first turn warms caches
                seconds[place].append(time.perf_counter() - start)
    return [statistics.median(values) for values in seconds]


def _step(rounds: int) -> Dict[str, Any]:
    """codec_step.py in a process of its own, on one thread."""
    command = [sys.executable, str(Path(__file__).with_name("codec_step.py")), "--rounds", str(8 * rounds)]
    one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    found: Dict[str, Any] = json.loads(subprocess.run(command, env={**os.environ, **one}, stdout=subprocess.PIPE, check=True).stdout)
    return found


# --- report -----------------------------------------------------------------------------------------------------------


def _markdown(result: Dict[str, Any]) -> str:
    sources = ("ELPV", "Objects-50")
    lines = [
        "| codec | bytes: class tokens, all tokens, pooled | Gaussian (theory) | "
        + " | ".join(f"{source}: class tokens, all tokens, pooled" for source in sources)
        + " |",
        "|---|---|---|---|---|",
    ]
    for row in result["errors"]:
        theory = f" ({row['theory']:.2g})" if row["theory"] else ""
        cells = [", ".join(f"{row[source][part]:.2g}" if part in row[source] else "-" for part in Latents._fields) for source in sources]
        sizes = ", ".join(f"{row['bytes'][part]:,}" if part in row["bytes"] else "-" for part in Latents._fields)
        lines.append(f"| {row['codec']} | {sizes} | {row['gaussian']:.2g}{theory} | {' | '.join(cells)} |")
    lines += ["", f"| latents | codec | gather + decode of {result['replayed']}, share of a training step | ms |", "|---|---|---|---|"]
    for row in result["times"]:
        spent = f"{row['gather_ms']:.2f} + {row['decode_ms']:.1f} of {row['step_ms']:.0f}"
        lines.append(f"| {row['part']} | {row['codec']} | {100 * row['share']:.1f} % | {spent} |")
    return "\n".join([*lines, "", _said(result["step"])]) + "\n"


def _said(step: Dict[str, Any]) -> str:
    return (
        f"One thread, {step['settings']}: gather and decode take {100 * step['read_share_of_bare']:.1f} % of a training step in "
        f"bare PyTorch ({step['read_ms']:.1f} of {step['bare_step_ms']:.0f} ms). The daemon's own takes {step['against_bare']:.3f} times "
        f"as long as that ({step['step_ms']:.1f} ms, of which they are {100 * step['read_share']:.0f} %) with its latents at hand, and "
        f"{step['whole_against_bare']:.3f} times where it reads them; medians of {step['rounds']} rounds in which they take turns."
    )


def _plot(result: Dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axis, source in zip(axes, ("ELPV", "Objects-50")):
        for kind in KINDS:
            rows = [row for row in result["errors"] if row["codec"].endswith(f" {kind}")]
            axis.plot([row["bytes"]["tokens"] / 1e3 for row in rows], [row[source]["tokens"] for row in rows], "o-", label=kind)
        axis.set(title=f"all tokens after block {SPLIT}, {source}", xlabel="kB a latent", yscale="log", ylabel="relative error")
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
