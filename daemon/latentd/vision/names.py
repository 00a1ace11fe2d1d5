"""Checkpoint names: timm, original DINOv2 and Hugging Face parameters to latentd's canonical ones (those of vision.vit.Vit).

Plain numpy, any thread; only the finiteness check takes time. Every refusal is a CheckpointError that names what is wrong.
"""

from __future__ import annotations

import re
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Tuple

import numpy as np
from numpy.typing import NDArray

from latentd.errors import CheckpointError
from latentd.vision.shape import HALF, IMAGENET_MEAN, IMAGENET_STD, VitShape

Arrays = Mapping[str, NDArray[np.float32]]

NORMALISATIONS = {"imagenet": (IMAGENET_MEAN, IMAGENET_STD), "half": (HALF, HALF)}


class Family(NamedTuple):
    """One naming scheme: where its blocks sit, and its names -> canonical names, inside a block and outside."""

    title: str
    stem: str
    block: Dict[str, str]
    top: Dict[str, str]
    eps: float


def _pair(source: str, canonical: str) -> Dict[str, str]:
    return {f"{source}.{part}": f"{canonical}.{part}" for part in ("weight", "bias")}


_TIMM = Family(
    "timm or DINOv2",
    "blocks",
    {
        **_pair("norm1", "norm1"),
        **_pair("attn.qkv", "qkv"),
        **_pair("attn.proj", "proj"),
        **_pair("norm2", "norm2"),
        **_pair("mlp.fc1", "fc1"),
        **_pair("mlp.fc2", "fc2"),
        **_pair("mlp.w12", "fc1"),
        **_pair("mlp.w3", "fc2"),
        "ls1.gamma": "scale1",
        "ls2.gamma": "scale2",
    },
    {
        **_pair("patch_embed.proj", "patch"),
        **_pair("norm", "norm"),
        "cls_token": "class_token",
        "pos_embed": "position",
        "reg_token": "registers",
        "register_tokens": "registers",
        "dist_token": "distilled",
    },
    1e-6,
)
_HUGGING_FACE = Family(
    "Hugging Face",
    "encoder.layer",
    {
        **_pair("norm1", "norm1"),
        **_pair("layernorm_before", "norm1"),
        **_pair("attention.attention.query", "query"),
        **_pair("attention.attention.key", "key"),
        **_pair("attention.attention.value", "value"),
        **_pair("attention.output.dense", "proj"),
        **_pair("norm2", "norm2"),
        **_pair("layernorm_after", "norm2"),
        **_pair("mlp.fc1", "fc1"),
        **_pair("intermediate.dense", "fc1"),
        **_pair("mlp.weights_in", "fc1"),
        **_pair("mlp.fc2", "fc2"),
        **_pair("output.dense", "fc2"),
        **_pair("mlp.weights_out", "fc2"),
        "layer_scale1.lambda1": "scale1",
        "layer_scale2.lambda1": "scale2",
    },
    {
        **_pair("embeddings.patch_embeddings.projection", "patch"),
        **_pair("layernorm", "norm"),
        "embeddings.cls_token": "class_token",
        "embeddings.position_embeddings": "position",
        "embeddings.register_tokens": "registers",
        "embeddings.distillation_token": "distilled",
    },
    1e-12,
)
_FAMILIES = ((_TIMM, "blocks.0.attn.qkv.weight"), (_HUGGING_FACE, "encoder.layer.0.attention.attention.query.weight"))
# Trained on top of the encoder, or used only in training: leaving them out changes no latent.
_UNUSED = re.compile(
    r"(.*\.)?(head|head_dist|classifier|cls_classifier|distillation_classifier|pooler|pre_logits|decoder|mask_token)(\..*)?"
)
# Every published size of these families has heads 64 wide, except the three largest timm ones.
_HEAD_WIDTHS = {1280: 80, 1408: 88, 1664: 104}
_KNOWN = "latentd reads DINOv2, timm ViT and DeiT, and Hugging Face ViT, DeiT and DINOv2 weights, of any size."


class Converted(NamedTuple):
    """Canonical arrays with the shape they make, and the family they came from."""

    weights: Dict[str, NDArray[np.float32]]
    shape: VitShape
    family: str


def convert(tensors: Arrays, label: str, normalisation: Optional[str] = None) -> Converted:
    """Canonical weights from any known naming scheme.

    label: the file's name; besides being named in errors it helps the normalisation rule. normalisation: "imagenet" or "half" (mean and
    deviation 0.5); None takes ImageNet's for DINOv2 (LayerScale), DeiT and DINO, told by tensors, prefix or file name, and 0.5 for
    every other ViT, which is what their published weights were trained with.
    """
    family, prefix = _recognise(tensors, label)
    own = {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
    found = _renamed(own, family, label)
    _check_axes(found, label)
    _join(found)
    shape = _shape(found, family, label, _normalisation(found, prefix + label, normalisation))
    check(found, shape, label)
    return Converted(found, shape, family.title)


def canonical_shapes(shape: VitShape) -> Dict[str, Tuple[int, ...]]:
    """Canonical name -> array shape, position grid as stored."""
    width = shape.width
    sizes: Dict[str, Tuple[int, ...]] = {
        "patch.weight": (width, 3, shape.patch, shape.patch),
        "patch.bias": (width,),
        "class_token": (width,),
        "class_position": (width,),
        "registers": (shape.registers, width),
        "position": (shape.grid**2, width),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    for index, (heads, hidden) in enumerate(zip(shape.heads, shape.mlp_width)):
        inner, stem = heads * shape.head_width, f"blocks.{index}"
        linears = {"qkv": (3 * inner, width), "proj": (width, inner), "fc1": (hidden * (1 + shape.swiglu), width), "fc2": (width, hidden)}
        for name, size in linears.items():
            sizes[f"{stem}.{name}.weight"], sizes[f"{stem}.{name}.bias"] = size, size[:1]
        vectors = ["norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"] + (["scale1", "scale2"] if shape.layer_scale else [])
        sizes.update({f"{stem}.{name}": (width,) for name in vectors})
    return sizes


def check(weights: Arrays, shape: VitShape, label: str) -> None:
    """CheckpointError where a canonical array is missing, of the wrong shape, or not finite."""
    expected = canonical_shapes(shape)
    missing = [name for name in expected if name not in weights]
    if missing:
        raise CheckpointError(f"{label} lacks {_listed(missing)}", hint=_KNOWN)
    for name, size in expected.items():
        if weights[name].shape != size:
            raise CheckpointError(f"{label}: {name} has shape {weights[name].shape}, expected {size}", hint=_KNOWN)
        if not np.isfinite(weights[name]).all():
            raise CheckpointError(
                f"{label}: {name} holds NaN or infinite values", hint="The file is damaged or its training diverged: take another."
            )


def _recognise(tensors: Arrays, label: str) -> Tuple[Family, str]:
    for family, marker in _FAMILIES:
        for name in tensors:
            if name == marker or name.endswith("." + marker):
                return family, name[: -len(marker)]
    some = ", ".join(sorted(tensors)[:5]) or "nothing"
    raise CheckpointError(f"{label} holds no architecture that latentd knows; it has {some}", hint=_KNOWN)


def _renamed(own: Arrays, family: Family, label: str) -> Dict[str, NDArray[np.float32]]:
    """Canonical names where the family has them; refuses leftovers that would change the computation, and gaps in its blocks."""
    blocks: Dict[int, Dict[str, str]] = {}
    found: Dict[str, NDArray[np.float32]] = {}
    unknown: List[str] = []
    for name, value in own.items():
        match = re.fullmatch(re.escape(family.stem) + r"\.(\d+)\.(.+)", name)
        if match and match.group(2) in family.block:
            index = int(match.group(1))
            blocks.setdefault(index, {})[match.group(2)] = name
            found[f"blocks.{index}.{family.block[match.group(2)]}"] = value
        elif name in family.top:
            found[family.top[name]] = value
        elif not _UNUSED.fullmatch(name):
            unknown.append(name)
    if unknown:
        raise CheckpointError(
            f"{label} looks like a {family.title} ViT but has parts that latentd does not know: {_listed(unknown)}", hint=_KNOWN
        )
    _refuse_gaps(blocks, family, found, label)
    return found


def _refuse_gaps(blocks: Dict[int, Dict[str, str]], family: Family, found: Arrays, label: str) -> None:
    """Missing tensors by the names that the file's own scheme gives them."""
    inside = sorted({suffix for names in blocks.values() for suffix in names})
    depth = min(max(blocks) + 1, len(blocks) + 1)  # one gap is enough to name, however far off the last block's number is
    missing = [f"{family.stem}.{i}.{suffix}" for i in range(depth) for suffix in inside if suffix not in blocks.get(i, {})]
    needed = ("class_token", "position", "patch.weight", "patch.bias", "norm.weight", "norm.bias")
    missing += [source for source, canonical in family.top.items() if canonical in needed and canonical not in found]
    if missing:
        raise CheckpointError(
            f"{label} lacks {_listed(missing)}", hint="The file is incomplete: fetch it again, or export the whole encoder."
        )


_AXES = {"patch.weight": 4, "class_token": 3, "position": 3, "registers": 3, "distilled": 3}


def _check_axes(found: Arrays, label: str) -> None:
    """CheckpointError where an array has not the axes that its name promises: after this the arrays can be joined and measured."""
    width = found["class_token"].size
    for name, value in found.items():
        stem, _, leaf = name.rpartition(".")
        is_matrix = leaf == "weight" and stem.startswith("blocks.") and "norm" not in stem
        reads_tokens = (name in _AXES and name != "patch.weight") or (is_matrix and stem.endswith(("query", "key", "value", "qkv")))
        wrong_width = reads_tokens and value.shape[-1:] != (width,)
        if value.ndim != _AXES.get(name, 2 if is_matrix else 1) or value.size == 0 or wrong_width:
            raise CheckpointError(f"{label}: {name} has shape {value.shape}, which does not fit a width of {width}", hint=_KNOWN)


def _join(found: Dict[str, NDArray[np.float32]]) -> None:
    """One qkv a block; positions split from class and distillation token; leading axes of one dropped."""
    for name in [name for name in found if name.endswith((".query.weight", ".query.bias"))]:
        stem, part = name.split(".query.")
        parts = [found.pop(f"{stem}.{role}.{part}", None) for role in ("query", "key", "value")]
        present = [value for value in parts if value is not None]
        if len(present) == 3:
            found[f"{stem}.qkv.{part}"] = np.concatenate(present)
    width = found["class_token"].size
    found["class_token"] = found["class_token"].reshape(width)
    position = found["position"][0]  # (1+P, D), or (P, D)
    lead = 2 if "distilled" in found else 1
    grid_has_lead = not _is_square(len(position))  # timm's register models give class and registers no position
    found["class_position"] = position[0] if grid_has_lead else np.zeros(width, np.float32)
    found["registers"] = found["registers"][0] if "registers" in found else np.zeros((0, width), np.float32)
    if "distilled" in found:  # like a register: a token that every block sees and that shows no place of the image
        found["registers"] = found.pop("distilled")[0] + position[1:2]
    found["position"] = position[lead if grid_has_lead else 0 :]


def _shape(found: Arrays, family: Family, label: str, normalisation: Tuple[Any, Any]) -> VitShape:
    width, patch = len(found["class_token"]), found["patch.weight"].shape[-1]
    depth = 1 + max(int(name.split(".")[1]) for name in found if name.startswith("blocks."))
    head_width = _HEAD_WIDTHS.get(width, 64)
    places = len(found["position"])
    inner = [_rows(found, f"blocks.{i}.qkv.weight", label) // 3 for i in range(depth)]
    if any(size % head_width for size in inner) or not _is_square(places):
        reason = "heads that are not 64 wide" if _is_square(places) else "a position grid that is not square"
        raise CheckpointError(f"{label} has {reason}", hint=_KNOWN)
    first = _rows(found, "blocks.0.fc1.weight", label)
    hidden = [found[f"blocks.{i}.fc2.weight"].shape[-1] if f"blocks.{i}.fc2.weight" in found else 0 for i in range(depth)]
    return VitShape(
        width=width,
        heads=tuple(size // head_width for size in inner),
        mlp_width=tuple(hidden),
        patch=patch,
        grid=round(places**0.5),
        head_width=head_width,
        eps=family.eps if "blocks.0.scale1" not in found else 1e-6,
        layer_scale="blocks.0.scale1" in found,
        swiglu=first == 2 * hidden[0],
        registers=len(found["registers"]),
        mean=normalisation[0],
        std=normalisation[1],
    )


def _normalisation(found: Arrays, hint: str, asked: Optional[str]) -> Tuple[Any, Any]:
    if asked is not None and asked not in NORMALISATIONS:
        raise CheckpointError(f"unknown normalisation {asked}", hint=f"Use one of {', '.join(NORMALISATIONS)}.")
    trained_on_imagenet = "blocks.0.scale1" in found or re.search("deit|dino", hint.lower()) is not None
    return NORMALISATIONS[asked or ("imagenet" if trained_on_imagenet else "half")]


def _rows(found: Arrays, name: str, label: str) -> int:
    if name not in found:
        raise CheckpointError(f"{label} lacks {name}", hint=_KNOWN)
    return len(found[name])


def _is_square(count: int) -> bool:
    return bool(round(count**0.5) ** 2 == count)


def _listed(names: List[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
