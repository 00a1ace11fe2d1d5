"""Every naming scheme gives the same module; whatever is not whole or not known is refused by name."""

from __future__ import annotations

import dataclasses
from typing import Any, Callable, Dict, Optional, Tuple

import numpy as np
import pytest
from numpy.typing import NDArray

import tiny
from latentd.errors import CheckpointError
from latentd.vision import names
from latentd.vision.shape import IMAGENET_MEAN, VitShape
from latentd.vision.vit import Vit

REGISTERS = dataclasses.replace(tiny.DINOV2, registers=4)
GATED = dataclasses.replace(tiny.DINOV2, swiglu=True)
HUGGING_FACE_VIT = dataclasses.replace(tiny.TIMM, eps=1e-12)

SCHEMES: Dict[str, Tuple[VitShape, Callable[[Vit], tiny.Arrays], str]] = {
    "timm ViT": (tiny.TIMM, lambda vit: tiny.as_timm(vit), "vit_tiny_patch16_224"),
    "timm DINOv2": (tiny.DINOV2, lambda vit: tiny.as_timm(vit), "model"),
    "timm DINOv2 with registers": (REGISTERS, lambda vit: tiny.as_timm(vit), "model"),
    "original DINOv2": (tiny.DINOV2, lambda vit: tiny.as_timm(vit, dinov2=True), "model"),
    "original DINOv2 with registers": (REGISTERS, lambda vit: tiny.as_timm(vit, dinov2=True), "model"),
    "original DINOv2 giant": (GATED, lambda vit: tiny.as_timm(vit, dinov2=True), "model"),
    "Hugging Face ViT": (HUGGING_FACE_VIT, lambda vit: tiny.as_hugging_face(vit, "vit."), "model"),
    "Hugging Face DINOv2": (tiny.DINOV2, lambda vit: tiny.as_hugging_face(vit, dinov2=True), "model"),
    "Hugging Face DINOv2 classifier": (tiny.DINOV2, lambda vit: tiny.as_hugging_face(vit, "dinov2.", dinov2=True), "model"),
    "Hugging Face DINOv2 with registers": (REGISTERS, lambda vit: tiny.as_hugging_face(vit, dinov2=True), "model"),
    "Hugging Face DINOv2 giant": (GATED, lambda vit: tiny.as_hugging_face(vit, dinov2=True), "model"),
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_same_weights_under_every_scheme_make_the_same_module(scheme: str) -> None:
    shape, rename, label = SCHEMES[scheme]
    original = tiny.vit(shape)
    converted = names.convert(rename(original), label)
    assert converted.shape == shape
    images = tiny.normalised(2, shape)
    loaded = Vit.from_weights(converted.weights, converted.shape)
    assert np.array_equal(loaded.final_tokens(images), original.final_tokens(images))


def test_a_distillation_token_becomes_a_register_with_its_position_added() -> None:
    original = tiny.vit(dataclasses.replace(tiny.TIMM, registers=1))
    named = tiny.as_timm(original)
    register = named.pop("reg_token")
    position = np.full((1, 1, 128), 0.25, np.float32)
    named["dist_token"] = register - position
    named["pos_embed"] = np.concatenate([named["pos_embed"][:, :1], position, named["pos_embed"][:, 1:]], axis=1)
    converted = names.convert(named, "deit_tiny_distilled_patch16_224")
    assert converted.shape.registers == 1
    np.testing.assert_allclose(converted.weights["registers"], register[0], atol=1e-6)
    assert np.array_equal(converted.weights["position"], original.position.numpy())


def test_a_grid_without_a_place_for_the_class_token_is_understood() -> None:
    """timm's register models and DeiT III add no position to the class token."""
    named = tiny.as_timm(tiny.vit())
    named["pos_embed"] = named["pos_embed"][:, 1:]
    converted = names.convert(named, "model")
    assert converted.shape == tiny.DINOV2
    assert not converted.weights["class_position"].any()


@pytest.mark.parametrize(
    ("label", "shape", "asked", "imagenet"),
    [
        ("vit_tiny_patch16_224.safetensors", tiny.TIMM, None, False),
        ("deit_tiny_patch16_224.safetensors", tiny.TIMM, None, True),
        ("dino_vits8.safetensors", tiny.TIMM, None, True),
        ("anything.safetensors", tiny.DINOV2, None, True),
        ("vit_tiny_patch16_224.safetensors", tiny.TIMM, "imagenet", True),
        ("anything.safetensors", tiny.DINOV2, "half", False),
    ],
)
def test_the_normalisation_follows_the_family_unless_it_is_given(label: str, shape: VitShape, asked: Optional[str], imagenet: bool) -> None:
    converted = names.convert(tiny.as_timm(tiny.vit(shape)), label, asked)
    assert (converted.shape.mean == IMAGENET_MEAN) is imagenet


def test_an_unknown_normalisation_is_refused_with_the_known_ones() -> None:
    with pytest.raises(CheckpointError) as refused:
        names.convert(tiny.as_timm(tiny.vit()), "model", "cifar")
    assert "imagenet, half" in refused.value.hint


def without(*keys: str) -> Callable[[tiny.Arrays], None]:
    def damage(arrays: tiny.Arrays) -> None:
        for key in keys:
            del arrays[key]

    return damage


def put(key: str, value: NDArray[Any]) -> Callable[[tiny.Arrays], None]:
    return lambda arrays: arrays.update({key: value.astype(np.float32)})


def text_model(arrays: tiny.Arrays) -> None:
    arrays.clear()
    arrays["wte.weight"] = np.zeros((2, 2), np.float32)


BROKEN: Dict[str, Tuple[Callable[[tiny.Arrays], None], str]] = {
    "a tensor missing in one block": (without("blocks.1.mlp.fc1.weight"), "blocks.1.mlp.fc1.weight"),
    "a whole block missing": (without(*(k for k in tiny.as_timm(tiny.vit()) if k.startswith("blocks.1."))), "and 9 more"),
    "no class token": (without("cls_token"), "cls_token"),
    "no final norm": (without("norm.weight", "norm.bias"), "norm.weight, norm.bias"),
    "biases missing everywhere": (without(*(f"blocks.{i}.attn.qkv.bias" for i in range(3))), "blocks.0.qkv.bias"),
    "a block numbered far off": (put("blocks.987654321.norm1.weight", np.zeros(128)), "blocks.3."),
    "another architecture's parts": (put("blocks.0.attn.rel_pos.weight", np.zeros((2, 2))), "rel_pos"),
    "a norm before the blocks": (put("norm_pre.weight", np.zeros(128)), "norm_pre.weight"),
    "a wrong matrix": (put("blocks.2.mlp.fc2.weight", np.zeros((64, 96))), "blocks.2.fc2.weight has shape (64, 96), expected (128, 96)"),
    "a matrix with too many axes": (put("blocks.2.mlp.fc2.weight", np.zeros((128, 96, 1))), "blocks.2.fc2.weight"),
    "a grid that is no square": (put("pos_embed", np.zeros((1, 38, 128))), "not square"),
    "a grid of another width": (put("pos_embed", np.zeros((1, 37, 100))), "position has shape (1, 37, 100)"),
    "heads of another width": (put("blocks.0.attn.qkv.weight", np.zeros((3 * 100, 128))), "64 wide"),
    "an empty tensor": (put("cls_token", np.zeros((1, 1, 0))), "a width of 0"),
    "NaN": (put("blocks.1.norm1.bias", np.full(128, np.nan)), "blocks.1.norm1.bias holds NaN"),
    "infinity": (put("cls_token", np.full((1, 1, 128), np.inf)), "class_token holds NaN or infinite"),
    "a text model": (text_model, "wte.weight"),
    "nothing": (lambda arrays: arrays.clear(), "nothing"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_or_unknown_checkpoint_is_refused_by_name(what: str) -> None:
    damage, expected = BROKEN[what]
    arrays = tiny.as_timm(tiny.vit())
    damage(arrays)
    with pytest.raises(CheckpointError) as refused:
        names.convert(arrays, "weights.safetensors")
    assert expected in refused.value.detail
    assert "weights.safetensors" in refused.value.detail
    assert refused.value.hint


def test_a_hugging_face_gap_is_named_as_the_file_names_it() -> None:
    arrays = tiny.as_hugging_face(tiny.vit(), dinov2=True)
    del arrays["encoder.layer.2.attention.attention.key.weight"]
    with pytest.raises(CheckpointError, match=r"encoder\.layer\.2\.attention\.attention\.key\.weight"):
        names.convert(arrays, "weights.safetensors")


def test_of_many_missing_tensors_five_are_named() -> None:
    arrays = tiny.as_timm(tiny.vit())
    for key in [key for key in arrays if key.startswith("blocks.2.")][1:]:
        del arrays[key]
    with pytest.raises(CheckpointError) as refused:
        names.convert(arrays, "weights.safetensors")
    assert refused.value.detail.count("blocks.2.") == 5
    assert refused.value.detail.endswith("and 8 more")
