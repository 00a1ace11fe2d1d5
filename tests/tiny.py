"""Backbones small enough for unit tests, and the same weights under every naming scheme that latentd reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, Optional

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file

from latentd import config
from latentd.vision import checkpoints
from latentd.vision.shape import HALF, VitShape
from latentd.vision.vit import Vit

Arrays = Dict[str, NDArray[np.float32]]
SIZE = 24
DINOV2 = VitShape(width=128, heads=(2, 2, 2), mlp_width=(96, 96, 96), patch=4, grid=6, layer_scale=True)
TIMM = VitShape(width=128, heads=(2, 2, 2), mlp_width=(96, 96, 96), patch=4, grid=6, mean=HALF, std=HALF)


def vit(shape: VitShape = DINOV2, seed: int = 0) -> Vit:
    """A module with random weights, lively enough that a swapped or forgotten tensor shows in its output."""
    module = Vit(shape)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            around_one = name.endswith(("norm1.weight", "norm2.weight", "norm.weight", "scale1", "scale2"))
            parameter.copy_(1 + 0.2 * noise if around_one else 0.15 * noise)
    return module.eval().requires_grad_(False)


def weights(module: Vit) -> Arrays:
    """Canonical names."""
    return {name: value.numpy().copy() for name, value in module.state_dict().items()}


def pixels(count: int, size: int = SIZE, seed: int = 1) -> NDArray[np.uint8]:
    """Random images (count, size, size, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def normalised(count: int, shape: VitShape, size: int = SIZE) -> NDArray[np.float32]:
    """The same images as the module takes them, (count, 3, size, size)."""
    scaled = (pixels(count, size) / 255.0 - np.asarray(shape.mean)) / np.asarray(shape.std)
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2), dtype=np.float32)


def as_timm(module: Vit, *, dinov2: bool = False) -> Arrays:
    """timm's names; dinov2: the original repository's, which differ for registers and the gated MLP."""
    own, named = weights(module), {}
    gated = {"fc1": "mlp.w12", "fc2": "mlp.w3"} if dinov2 and module.shape.swiglu else {}
    parts = {
        "qkv": "attn.qkv",
        "proj": "attn.proj",
        "fc1": "mlp.fc1",
        "fc2": "mlp.fc2",
        "scale1": "ls1.gamma",
        "scale2": "ls2.gamma",
        **gated,
    }
    for name, value in own.items():
        if name.startswith("blocks."):
            _, index, part, *rest = name.split(".")
            named[".".join(["blocks", index, parts.get(part, part), *rest])] = value
    named.update({f"patch_embed.proj.{part}": own[f"patch.{part}"] for part in ("weight", "bias")})
    named.update({f"norm.{part}": own[f"norm.{part}"] for part in ("weight", "bias")})
    named["cls_token"] = own["class_token"][None, None]
    named["pos_embed"] = np.concatenate([own["class_position"][None], own["position"]])[None]
    if module.shape.registers:
        named["register_tokens" if dinov2 else "reg_token"] = own["registers"][None]
    named["mask_token" if dinov2 else "head.weight"] = np.zeros((1, module.shape.width), np.float32)
    return named


def as_hugging_face(module: Vit, prefix: str = "", *, dinov2: bool = False) -> Arrays:
    """Hugging Face's names: ViTModel's, or Dinov2Model's."""
    own, named = weights(module), {}
    vit_parts = {"norm1": "layernorm_before", "norm2": "layernorm_after", "fc1": "intermediate.dense", "fc2": "output.dense"}
    gated = {"fc1": "mlp.weights_in", "fc2": "mlp.weights_out"} if module.shape.swiglu else {"fc1": "mlp.fc1", "fc2": "mlp.fc2"}
    parts = {
        "proj": "attention.output.dense",
        "scale1": "layer_scale1.lambda1",
        "scale2": "layer_scale2.lambda1",
        **(gated if dinov2 else vit_parts),
    }
    for name, value in own.items():
        if name.startswith("blocks."):
            _, index, part, *rest = name.split(".")
            stem = f"{prefix}encoder.layer.{index}."
            if part == "qkv":
                for role, third in zip(("query", "key", "value"), np.split(value, 3)):
                    named[f"{stem}attention.attention.{role}.{rest[0]}"] = third
            else:
                named[stem + ".".join([parts.get(part, part), *rest])] = value
    named.update({f"{prefix}embeddings.patch_embeddings.projection.{part}": own[f"patch.{part}"] for part in ("weight", "bias")})
    named.update({f"{prefix}layernorm.{part}": own[f"norm.{part}"] for part in ("weight", "bias")})
    named[f"{prefix}embeddings.cls_token"] = own["class_token"][None, None]
    named[f"{prefix}embeddings.position_embeddings"] = np.concatenate([own["class_position"][None], own["position"]])[None]
    if module.shape.registers:
        named[f"{prefix}embeddings.register_tokens"] = own["registers"][None]
    named["classifier.weight"] = np.zeros((3, module.shape.width), np.float32)
    return named


def save(arrays: Arrays, path: Path) -> Path:
    save_file({name: np.ascontiguousarray(value) for name, value in arrays.items()}, path)
    return path


def backbone(folder: Path, module: Optional[Vit] = None) -> checkpoints.Backbone:
    """A tiny backbone, installed in this cache folder under the name `tiny`."""
    module = module or vit()
    return checkpoints.import_file(save(as_timm(module), folder / "tiny.safetensors"), folder / "cache", normalisation="imagenet")


def settings(folder: Path, **flags: Any) -> config.Config:
    """The configuration for that backbone, whatever the heat and the memory of this machine; further keys as section__key."""
    named = {key.replace("__", "."): value for key, value in flags.items()}
    folders = {"state.cache_dir": str(folder / "cache"), "state.dir": str(folder / "state")}
    model = {"backbone.name": "tiny", "backbone.image_size": SIZE, "backbone.class_tokens": 2}
    undisturbed = {"energy.max_temperature_c": 150.0, "memory.reserve_bytes": 0}
    return config.load({}, {**folders, **model, **undisturbed, **named}, is_service=False)
