"""What each part of latentd takes of the memory, worked out from the configuration and the shapes before anything is allocated.

Pure functions; no tensor is made here. The same figures decide when the learner may work (its needs), stand in /v1/status beside what is
used, and make the table in docs/memory.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Mapping, Tuple

import numpy as np

from latentd.config import BackboneConfig, Config, EngineConfig
from latentd.engines.stage import FrozenStage, StageSpec, stage_spec
from latentd.learning.layers import widened_bytes
from latentd.learning.restraint import LEARN, SLEEP
from latentd.learning.sleep import microbatch
from latentd.replay.duplicates import SKETCH_BITS
from latentd.replay.latents import LatentCodec
from latentd.service.storing import latent_codec
from latentd.vision.checkpoints import Backbone
from latentd.vision.names import canonical_shapes
from latentd.vision.shape import VitShape

MIB = 1 << 20
MOMENTS = ("always", "requests", "learning", "sleeping", "building", "system")
CLASSES = 100  # that the plan has room for: what grows with classes is small
FP16, FP32, FP64 = 2, 4, 8

PROGRAM_BYTES = (
    300 * MIB
)  # 268 MiB are resident after importing all that serves and learns (PyTorch 2.13 and ONNX Runtime 1.31, x86, no CUDA)
CUDA_BYTES = 1200 * MIB  # context, cuBLAS and cuDNN: 584 MiB of device memory and 616 of the host's are what TensorRT 8.5 reports for cuDNN
SAMPLE_BYTES = 200  # of a stored sample in the index of duplicates: sketch, number, place
# Of an image while it is decoded, at worst, which is WebP: its decoder keeps two canvases, and the frame is copied twice. Growth of the
# resident set with Pillow 10.4 and 13.0: 16 for WebP, and its encoded bytes again; 4 to 8 for PNG and BMP, up to 8 for JPEG.
PIXEL_BYTES = 16
# What a training step took beyond what it keeps for its way back: gradients under way, and what the allocator does not give back. Growth of
# the resident set with the default backbone and PyTorch 2.13: at split 9, 136 MiB for micro-batches of 4 and 406 for 16, where this plan
# says 147 and 546; at split 11, 16 and 25, where it says 13 and 26.
STEP_OVERHEAD = 1.5


@dataclass(frozen=True)
class Part:
    """when: "always", "requests" (at the worst moment that http.* and engine.* allow), "learning", "sleeping" or "building", of which the
    largest counts, or "system" (left to everything else). basis: "limit" where the configuration bounds it, "counted" from shapes, or
    "estimate".
    """

    name: str
    planned_bytes: int
    when: str
    basis: str


@dataclass(frozen=True)
class MemoryPlan:
    parts: Tuple[Part, ...] = ()

    @property
    def planned_bytes(self) -> int:
        """latentd at its worst moment, without what is left to the system."""
        steady = sum(part.planned_bytes for part in self.parts if part.when in ("always", "requests"))
        return steady + max((self._of(when) for when in ("learning", "sleeping", "building")), default=0)

    @property
    def reserve_bytes(self) -> int:
        return self._of("system")

    def needs_bytes(self) -> Mapping[str, int]:
        """What a kind of learning takes while it runs, beyond what it holds always."""
        return {LEARN: self._of("learning"), SLEEP: self._of("sleeping")}

    def _of(self, when: str) -> int:
        return sum(part.planned_bytes for part in self.parts if part.when == when)


def make_plan(config: Config, shape: VitShape, spec: StageSpec, codec: LatentCodec, *, engine: str, lanes: int = 1) -> MemoryPlan:
    """The plan of this configuration. engine: the name of the one that serves, or shall serve; lanes: its own."""
    adapts = codec.tokens is not None and config.learn.sleep_epochs > 0
    widths = [spec.features_width] + ([(shape.depth - spec.split + 1) * shape.width] if adapts else [])
    on_gpu = engine.startswith("tensorrt") or "cuda" in engine
    parts = [
        Part("program and libraries", PROGRAM_BYTES, "always", "estimate"),
        *([Part("CUDA", CUDA_BYTES, "always", "estimate")] if on_gpu else []),
        *_engine(config.engine, shape, spec, engine, lanes),
        Part("replay memory", config.learn.replay_bytes, "always", "limit"),
        *([Part("samples with tokens", config.learn.token_bytes, "always", "limit")] if codec.tokens is not None else []),
        Part("hold-out", _holdout(config, codec), "always", "counted"),
        Part("sums", sum(sums_bytes(width) for width in widths), "always", "counted"),
        Part("heads", sum(5 * CLASSES * width * FP32 for width in widths), "always", "counted"),
        Part("duplicates", _duplicates(config, spec, codec), "always", "estimate"),
        Part("images that wait", config.engine.queue_images * spec.image_size**2 * 3, "requests", "limit"),
        Part("request bodies", max(config.http.max_pending_bytes, config.http.max_body_bytes), "requests", "limit"),
        Part("decoders", _decoders(config), "requests", "limit"),
        Part("solving and saving", 4 * FP64 * max(widths) ** 2, "learning", "counted"),
    ]
    if adapts:
        parts += _blocks(config, shape, spec, codec)
    if "tensorrt" in config.engine.order and on_gpu:
        parts.append(Part("building a plan", config.memory.build_bytes, "building", "estimate"))
    return MemoryPlan((*parts, Part("left to the system", config.memory.reserve_bytes, "system", "limit")))


def sums_bytes(width: int) -> int:
    """Of the streaming sums of one width: second moments, class sums, and the block of 64 samples that is not folded in yet."""
    return FP64 * (width * width + CLASSES * width + 64 * width)


def weights_bytes(shape: VitShape, first: int, last: int) -> int:
    """Of blocks first+1..last with embedding (where first is 0) and final norm, in float32."""
    stems = tuple(f"blocks.{index}." for index in range(first, last))

    def belongs(name: str) -> bool:
        return name.startswith(stems) if name.startswith("blocks.") else first == 0 or name.startswith("norm.")

    return FP32 * sum(int(np.prod(size)) for name, size in canonical_shapes(shape).items() if belongs(name))


def upper_bytes(shape: VitShape, split: int) -> int:
    """Of the pretrained blocks above the split, as learning keeps them: their matrices in half precision."""
    sizes = canonical_shapes(shape)
    names = (f"blocks.{index}.{name}.weight" for index in range(split, shape.depth) for name in ("qkv", "proj", "fc1", "fc2"))
    return weights_bytes(shape, split, shape.depth) - (FP32 - FP16) * sum(int(np.prod(sizes[name])) for name in names)


def room_bytes(shape: VitShape, split: int) -> int:
    """Of the matrices above the split that training keeps at full width."""
    sizes = canonical_shapes(shape)
    names = (f"blocks.{index}.{name}.weight" for index in range(split, shape.depth) for name in ("qkv", "proj", "fc1", "fc2"))
    return widened_bytes([int(np.prod(sizes[name])) for name in names])


def learned_bytes(shape: VitShape, first: int, rank: int) -> int:
    """Of the change that the blocks above `first` learn: two thin matrices for each of theirs, and the norms."""
    sizes, count = canonical_shapes(shape), 2 * shape.width
    for index in range(first, shape.depth):
        matrices = (sizes[f"blocks.{index}.{name}.weight"] for name in ("qkv", "proj", "fc1", "fc2"))
        count += sum(rank * (outward + inward) for outward, inward in matrices) + 4 * shape.width
    return FP32 * count


def forward_bytes(shape: VitShape, index: int, tokens: int) -> int:
    """Of one image inside block `index` without gradients: the residual, and the larger of its attention and its MLP."""
    inner, hidden = shape.heads[index] * shape.head_width, shape.mlp_width[index] * (1 + shape.swiglu)
    attention = tokens * 4 * inner + 2 * shape.heads[index] * tokens * tokens
    return FP32 * (2 * tokens * shape.width + max(attention, 3 * tokens * hidden))


def backward_bytes(shape: VitShape, index: int, tokens: int, rank: int) -> int:
    """Of one latent in block `index`: what a training step keeps for its way back, attention weights included (PyTorch 2.0 on a CPU)."""
    inner, hidden = shape.heads[index] * shape.head_width, shape.mlp_width[index] * (1 + shape.swiglu)
    a_token = 7 * shape.width + 5 * inner + 2 * hidden + 4 * rank + shape.heads[index] * tokens
    return FP32 * tokens * a_token


def class_token_bytes(shape: VitShape, tokens: int) -> int:
    """Of one latent in the last block above a split, there or back: its tokens, and what the class token's attention to them keeps."""
    return FP32 * tokens * (shape.width + 9 * (shape.heads[-1] + 1))


def int8_bytes(shape: VitShape) -> int:
    """Of the whole stage where the matrices of its blocks are INT8, with a scale a column, and the rest is float32."""
    sizes = canonical_shapes(shape)
    names = [f"blocks.{index}.{name}.weight" for index in range(shape.depth) for name in ("qkv", "proj", "fc1", "fc2")]
    matrices, scales = (sum(count(sizes[name]) for name in names) for count in (np.prod, lambda size: size[0]))
    return weights_bytes(shape, 0, shape.depth) - int((FP32 - 1) * matrices) + int(FP32 * scales)


def _engine(engine: EngineConfig, shape: VitShape, spec: StageSpec, name: str, lanes: int) -> List[Part]:
    """The frozen stage: its weights (half of them in a plan of FP16, a quarter of the matrices in INT8; twice where ONNX Runtime has a
    session more for its lanes), and the activations of its largest batch. INT8 on ONNX Runtime takes images one by one, in each lane."""
    is_int8, is_runtime = "int8" in name, name.startswith("onnxruntime")
    weights = int8_bytes(shape) if is_int8 else weights_bytes(shape, 0, shape.depth) // (2 if name == "tensorrt-fp16" else 1)
    widest = max(forward_bytes(shape, index, spec.tokens) for index in range(shape.depth))
    together = min(lanes, engine.max_batch) if is_int8 and is_runtime else engine.max_batch
    workspace = engine.tensorrt_workspace_bytes if name.startswith("tensorrt") else 0
    return [
        Part("engine: weights", weights * (2 if is_runtime and lanes > 1 else 1), "always", "counted"),
        Part("engine: activations", together * widest + workspace, "always", "estimate"),
    ]


def _blocks(config: Config, shape: VitShape, spec: StageSpec, codec: LatentCodec) -> List[Part]:
    """What learns above the split: pretrained blocks, the change that learns and the one that answers; asleep also gradients, two moments
    of AdamW and activations.
    """
    assert codec.tokens is not None, "only stored tokens can be learned from"
    learned, tokens = learned_bytes(shape, spec.split, config.learn.sleep_rank), codec.tokens.spec.tokens
    whole, last = range(spec.split, shape.depth - 1), class_token_bytes(shape, tokens)
    at_once, basis = microbatch(config.learn, shape.depth - spec.split), 0 if codec.basis is None else codec.basis.nbytes
    kept = at_once * (last + sum(backward_bytes(shape, index, tokens, config.learn.sleep_rank) for index in whole))
    refit = at_once * max(last, *(forward_bytes(shape, index, tokens) for index in whole), 0)
    optimizer = 3 * (learned + CLASSES * (shape.depth - spec.split + 1) * shape.width * FP32)
    return [
        Part("blocks that learn", upper_bytes(shape, spec.split) + 2 * learned + basis, "always", "counted"),
        Part("gradients and AdamW", optimizer, "sleeping", "counted"),
        Part("matrices at full width", room_bytes(shape, spec.split), "sleeping", "counted"),
        Part("activations", int(STEP_OVERHEAD * kept) + refit, "sleeping", "estimate"),
    ]


def _decoders(config: Config) -> int:
    """All threads together hold the pixels of one image at most, and each of them a copy of its encoded bytes."""
    return config.http.max_pixels * PIXEL_BYTES + config.engine.decode_threads * config.http.max_image_bytes


def _holdout(config: Config, codec: LatentCodec) -> int:
    """Without tokens: those of the hold-out are within their own budget."""
    return codec.features_bytes * config.learn.holdout_per_class * CLASSES if config.learn.holdout_every else 0


def _duplicates(config: Config, spec: StageSpec, codec: LatentCodec) -> int:
    """The index holds no latents: planes of its projection, and a sketch of each sample that fits into the journal."""
    return spec.features_width * SKETCH_BITS * FP32 + config.state.journal_bytes // codec.features_bytes * SAMPLE_BYTES


# --- docs/memory.md ---------------------------------------------------------------------------------------------------

NX_BYTES = 6996988 << 10  # MemTotal of a Xavier NX with 8 GB
DINOV2_SMALL = VitShape(width=384, heads=(6,) * 12, mlp_width=(1536,) * 12, patch=14, grid=37, layer_scale=True)  # of the default backbone


def plan_for(config: Config, shape: VitShape, engine: str, lanes: int = 1) -> MemoryPlan:
    """The plan of a configuration whose backbone is not at hand."""
    backbone = Backbone(config.backbone.name, Path(), "", shape, "")
    spec = stage_spec(config, backbone)

    def absent() -> FrozenStage:
        raise AssertionError("the codec of this configuration needs no calibration")

    return make_plan(config, shape, spec, latent_codec(config, spec, backbone, absent), engine=engine, lanes=lanes)


def table(plans: Mapping[str, MemoryPlan]) -> str:
    """Plans side by side, in MiB."""
    every = (part for plan in plans.values() for part in plan.parts)
    names = dict.fromkeys(part.name for part in sorted(every, key=lambda part: MOMENTS.index(part.when)))
    found: Dict[str, Dict[str, Part]] = {title: {part.name: part for part in plan.parts} for title, plan in plans.items()}
    lines = [f"| part | when | basis | {' | '.join(plans)} |", f"|---|---|---|{'---:|' * len(plans)}"]
    for name in names:
        part = next(parts[name] for parts in found.values() if name in parts)
        cells = [_mib(parts[name].planned_bytes) if name in parts else "" for parts in found.values()]
        lines.append(f"| {name} | {part.when} | {part.basis} | {' | '.join(cells)} |")
    totals = [_mib(plan.planned_bytes) for plan in plans.values()]
    left = [_mib(NX_BYTES - plan.planned_bytes - plan.reserve_bytes) for plan in plans.values()]
    return "\n".join(
        [
            *lines,
            f"| **latentd at its worst moment** | | | {' | '.join(totals)} |",
            f"| not planned, of 6833 MiB | | | {' | '.join(left)} |",
        ]
    )


def _mib(count: int) -> str:
    return f"{count / MIB:.1f}" if count < 10 * MIB else f"{count / MIB:.0f}"


def documented() -> Dict[str, MemoryPlan]:
    """The plans of the table in docs/memory.md."""
    head, blocks = Config(backbone=BackboneConfig(split=0)), Config(backbone=BackboneConfig(split=9))
    return {
        "defaults: head and last block learn": plan_for(Config(), DINOV2_SMALL, "tensorrt-fp16"),
        "backbone.split = 0: the head alone": plan_for(head, DINOV2_SMALL, "tensorrt-fp16"),
        "backbone.split = 9": plan_for(blocks, DINOV2_SMALL, "tensorrt-fp16"),
        "defaults, INT8 on the CPU, one core": plan_for(Config(), DINOV2_SMALL, "onnxruntime-cpu-int8-static"),
    }
