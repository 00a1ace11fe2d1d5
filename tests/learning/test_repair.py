"""The closed-form repair: it changes nothing that is whole, and brings what is pruned nearer to the whole."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import tiny
from latentd.learning import repair as repairing
from latentd.learning.redundancy import see
from latentd.learning.repair import repair
from latentd.vision.prune import without_heads
from latentd.vision.shape import VitShape
from latentd.vision.vit import Vit

SHOWN, OTHERS = tiny.pixels(48, seed=1), tiny.pixels(16, seed=2)


STAKES = [torch.ones(2, 2)] * 3


def quiet(_: int) -> None:
    return None


def features(vit: Vit, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    return see(vit, pixels, 2, quiet).features


def test_a_backbone_that_is_whole_stays_as_it_is() -> None:
    whole = tiny.vit()
    copy = Vit.from_weights(tiny.weights(whole), whole.shape)
    repair(whole, copy, SHOWN[:8], STAKES, quiet)
    for name, value in tiny.weights(whole).items():
        np.testing.assert_allclose(tiny.weights(copy)[name], value, atol=1e-4)


def with_twins(shape: VitShape) -> Vit:
    """In blocks 0 and 1 both heads see the same; each is projected in its own way, so neither can just be dropped."""
    weights = tiny.weights(tiny.vit(shape))
    for block in range(2):
        for part in ("weight", "bias"):
            thirds = weights[f"blocks.{block}.qkv.{part}"].reshape(3, 2, 64, -1)
            thirds[:, 1] = thirds[:, 0]
    return Vit.from_weights(weights, shape)


@pytest.mark.parametrize("shape", [tiny.DINOV2, tiny.TIMM, dataclasses.replace(tiny.DINOV2, swiglu=True)], ids=["DINOv2", "timm", "gated"])
def test_what_a_removed_twin_said_is_said_by_the_other_on_images_it_was_not_repaired_on(
    shape: VitShape, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repairing, "PRIOR_IMAGES", 0.1)
    whole = with_twins(shape)
    cut = without_heads(tiny.weights(whole), shape, [(0, 1), (1, 0)], see(whole, SHOWN, 2, quiet).means)
    pruned = Vit.from_weights(cut.weights, cut.shape)
    wanted = features(whole, OTHERS)
    before = np.linalg.norm(features(pruned, OTHERS) - wanted)
    repair(whole, pruned, SHOWN, STAKES, quiet)
    assert np.linalg.norm(features(pruned, OTHERS) - wanted) < 0.1 * before


def test_a_channel_that_layer_scale_switched_off_does_no_harm() -> None:
    whole = tiny.vit()
    weights = tiny.weights(whole)
    for block in range(3):
        weights[f"blocks.{block}.scale1"][:5] = 0
        weights[f"blocks.{block}.scale2"][:5] = 0
    whole = Vit.from_weights(weights, whole.shape)
    cut = without_heads(weights, whole.shape, [(0, 1)])
    pruned = Vit.from_weights(cut.weights, cut.shape)
    repair(whole, pruned, SHOWN, STAKES, quiet)
    assert np.isfinite(features(pruned, OTHERS)).all()


def test_the_class_token_is_repaired_first_where_all_hangs_on_it() -> None:
    whole = tiny.vit()
    cut = without_heads(tiny.weights(whole), whole.shape, [(0, 1), (2, 0)], see(whole, SHOWN, 2, quiet).means)
    errors = []
    for others in (1.0, 1e-6):
        pruned = Vit.from_weights(cut.weights, cut.shape)
        stakes = [torch.tensor([[1.0, others]] * 2)] * 3
        repair(whole, pruned, SHOWN, stakes, quiet)
        errors.append(np.linalg.norm(features(pruned, SHOWN) - features(whole, SHOWN)))
    assert errors[1] < 0.9 * errors[0]


def test_with_few_images_the_weights_stay_nearer_to_what_they_were() -> None:
    whole = tiny.vit()
    cut = without_heads(tiny.weights(whole), whole.shape, [(0, 1)])
    moved = []
    for count in (2, 48):
        pruned = Vit.from_weights(cut.weights, cut.shape)
        repair(whole, pruned, SHOWN[:count], STAKES, quiet)
        moved.append(np.linalg.norm(tiny.weights(pruned)["blocks.0.fc2.weight"] - cut.weights["blocks.0.fc2.weight"]))
    assert moved[0] < moved[1]
