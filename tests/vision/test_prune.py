"""Heads cut out of the matrices: what stays is what it was, and the result is a backbone like any other."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny
from latentd.errors import CheckpointError
from latentd.vision import checkpoints, prune
from latentd.vision.vit import Vit

REMOVED = ((0, 1), (2, 0))


def loaded(pruned: prune.Pruned) -> Vit:
    return Vit.from_weights(pruned.weights, pruned.shape)


def silenced(module: Vit, heads: prune.Head = (1, 0)) -> Vit:
    """The same module with the head's columns of the projection at zero."""
    arrays = tiny.weights(module)
    block, head = heads
    arrays[f"blocks.{block}.proj.weight"][:, head * 64 : (head + 1) * 64] = 0
    return Vit.from_weights(arrays, module.shape)


def test_a_head_that_says_nothing_can_go_without_a_trace() -> None:
    module = silenced(tiny.vit())
    pruned = loaded(prune.without_heads(tiny.weights(module), module.shape, [(1, 0)]))
    images = tiny.normalised(2, module.shape)
    assert pruned.shape.heads == (2, 1, 2)
    np.testing.assert_allclose(pruned.final_tokens(images), module.final_tokens(images), atol=1e-6)


@pytest.mark.parametrize("head", [(0, 0), (0, 1), (1, 0), (2, 1)])
def test_what_is_cut_out_equals_what_is_masked(head: prune.Head) -> None:
    module = tiny.vit()
    pruned = loaded(prune.without_heads(tiny.weights(module), module.shape, [head]))
    images = tiny.normalised(2, module.shape)
    masked = silenced(module, head).final_tokens(images)
    assert np.abs(pruned.final_tokens(images) - masked).max() <= 1e-6 * np.abs(masked).max()
    assert np.abs(masked - module.final_tokens(images)).max() > 1e-2, "the head said something"


def test_the_mean_of_a_removed_head_goes_on_in_the_bias() -> None:
    module = tiny.vit()
    means = [np.full(128, 0.5, np.float32) for _ in range(3)]
    weights = tiny.weights(module)
    pruned = prune.without_heads(weights, module.shape, REMOVED, means)
    expected = weights["blocks.0.proj.bias"] + 0.5 * weights["blocks.0.proj.weight"][:, 64:].sum(axis=1)
    np.testing.assert_allclose(pruned.weights["blocks.0.proj.bias"], expected, atol=1e-5)
    np.testing.assert_array_equal(pruned.weights["blocks.1.proj.bias"], weights["blocks.1.proj.bias"])


def test_a_block_keeps_one_head_and_only_its_own_heads_can_go() -> None:
    weights = tiny.weights(tiny.vit())
    with pytest.raises(AssertionError, match="block 1 would lose all its heads"):
        prune.without_heads(weights, tiny.DINOV2, [(1, 0), (1, 1)])
    with pytest.raises(AssertionError, match="no such head"):
        prune.without_heads(weights, tiny.DINOV2, [(1, 2)])


def test_the_parameters_are_those_of_the_matrices() -> None:
    assert prune.parameters(tiny.DINOV2) == sum(value.size for value in tiny.weights(tiny.vit()).values())
    fewer = dataclasses.replace(tiny.DINOV2, heads=(2, 1, 2))
    assert prune.parameters(tiny.DINOV2) - prune.parameters(fewer) == 64 * (4 * 128 + 3)  # qkv rows with their biases, proj columns


class TestInstalled:
    def test_a_pruned_backbone_is_found_read_and_gives_the_same(self, tmp_path: Path) -> None:
        base = tiny.backbone(tmp_path)
        pruned = prune.without_heads(checkpoints.read_weights(base), base.shape, REMOVED)
        prune.install(tmp_path / "cache", base, pruned, REMOVED, prune.default_name(base.name, 2, 6))
        found = checkpoints.find(tmp_path / "cache", "tiny-pruned-33")
        assert {each.name for each in checkpoints.installed(tmp_path / "cache")} == {"tiny", "tiny-pruned-33"}
        assert found.shape.heads == (1, 2, 1)
        assert base.sha256 in found.source
        assert "without heads 1.2 3.1 " in found.source
        images = tiny.normalised(2, base.shape)
        np.testing.assert_array_equal(Vit.load(found).final_tokens(images), loaded(pruned).final_tokens(images))

    def test_a_taken_name_is_refused_or_numbered(self, tmp_path: Path) -> None:
        base = tiny.backbone(tmp_path)
        cache = tmp_path / "cache"
        pruned = [prune.without_heads(checkpoints.read_weights(base), base.shape, [head]) for head in REMOVED]
        prune.install(cache, base, pruned[0], REMOVED[:1], "small")
        with pytest.raises(CheckpointError, match="already another backbone small"):
            prune.install(cache, base, pruned[1], REMOVED[1:], "small")
        assert prune.install(cache, base, pruned[1], REMOVED[1:], "small", numbered=True).name == "small-2"
        assert prune.install(cache, base, pruned[1], REMOVED[1:], "small", numbered=True).name == "small-2", "the same weights, once more"
        assert prune.install(cache, base, pruned[0], REMOVED[:1], "small", numbered=True).name == "small"

    def test_weights_that_are_not_those_of_the_shape_are_refused(self, tmp_path: Path) -> None:
        base = tiny.backbone(tmp_path)
        pruned = prune.without_heads(checkpoints.read_weights(base), base.shape, REMOVED)
        with pytest.raises(CheckpointError, match="has shape"):
            checkpoints.add(tmp_path / "cache", "odd", pruned.weights, base.shape, "a test")


def test_a_pruned_backbone_can_be_pruned_again() -> None:
    module = tiny.vit()
    once = prune.without_heads(tiny.weights(module), module.shape, [(0, 0)])
    twice = prune.without_heads(once.weights, once.shape, [(2, 1)])
    both = prune.without_heads(tiny.weights(module), module.shape, [(0, 0), (2, 1)])
    assert twice.shape == both.shape
    assert all(np.array_equal(twice.weights[name], both.weights[name]) for name in both.weights)
    assert torch.isfinite(torch.from_numpy(loaded(twice).final_tokens(tiny.normalised(1, module.shape)))).all()
