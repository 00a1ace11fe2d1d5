"""The blocks above the split: what they compute pretrained, and the change of low rank that learning makes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import latentd.learning.layers
import tiny
from latentd.learning.blocks import RankedBlocks, UpperBlocks, parameter_bytes
from latentd.learning.layers import HalfLinear, widened_bytes
from latentd.vision.shape import VitShape

SPLIT = 1


@pytest.fixture
def base(tmp_path: Path) -> UpperBlocks:
    return UpperBlocks.load(tiny.backbone(tmp_path), SPLIT)


def some_tokens(count: int = 2) -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal((count, 37, 128)).astype(np.float32)


def test_pretrained_blocks_continue_what_the_whole_backbone_computes(base: UpperBlocks) -> None:
    vit = tiny.vit()
    images = torch.from_numpy(tiny.normalised(2, vit.shape))
    with torch.no_grad():
        cut = vit.run(vit.embed(images), 0, SPLIT)
        last = vit.run(cut, SPLIT, vit.depth)
        before = vit.run(cut, SPLIT, SPLIT + 1)
        expected = [vit.norm(before[:, 0]), vit.norm(last[:, 0]), vit.norm(before[:, 1:]).mean(dim=1)]
    found = base.features(cut.numpy())
    assert found.shape == (2, base.features_width) == (2, 3 * 128)
    np.testing.assert_allclose(found, torch.cat(expected, dim=1).numpy(), atol=5e-3)  # the matrices are kept in half precision


def pretrained(shape: VitShape, split: int) -> UpperBlocks:
    blocks, weights = UpperBlocks(shape, split), dict(tiny.vit(shape).named_parameters())
    with torch.no_grad():
        for name, parameter in blocks.named_parameters():
            first, _, rest = name.partition(".")
            index, _, rest = rest.partition(".")
            parameter.copy_(weights[f"blocks.{int(index) + split}.{rest}" if first == "blocks" else name])
    return blocks.eval().requires_grad_(False)


def learning(base: UpperBlocks) -> RankedBlocks:
    """With a change in every matrix and norm."""
    blocks = RankedBlocks(base, 4, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in blocks.learned():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return blocks


def in_the_order_of_the_papers(blocks: UpperBlocks, tokens: torch.Tensor) -> torch.Tensor:
    """Keys and values of every token, and attention to them."""
    seen = []
    for block in blocks.blocks[:-1]:
        tokens = block(tokens)
        seen.append(tokens[:, :1])
    seen.append(blocks.blocks[-1](tokens)[:, :1])
    class_tokens = blocks.norm(torch.cat(seen, dim=1)).flatten(1)
    return torch.cat([class_tokens, blocks.norm(tokens[:, blocks.lead :]).mean(dim=1)], dim=1)


@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize(
    "shape", [tiny.DINOV2, replace(tiny.TIMM, registers=2, swiglu=True, heads=(2, 2, 1))], ids=["dinov2", "registers, gated, pruned"]
)
def test_without_keys_and_values_the_last_block_gives_the_same_and_the_same_gradients(shape: VitShape, split: int) -> None:
    blocks = learning(pretrained(shape, split))
    tokens = torch.from_numpy(some_tokens(3)).requires_grad_()
    for _ in range(2):  # the second pass finds the widened matrices there
        inputs = [tokens, *(parameter for _, parameter in blocks.learned())]
        found, expected = blocks(tokens), in_the_order_of_the_papers(blocks, tokens)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        towards = torch.randn(found.shape, generator=torch.Generator().manual_seed(2))
        for own, wanted in zip(torch.autograd.grad(found, inputs, towards), torch.autograd.grad(expected, inputs, towards)):
            torch.testing.assert_close(own, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


@pytest.mark.parametrize("split", [1, 2])
def test_tokens_in_another_basis_mean_the_same(split: int) -> None:
    blocks = learning(pretrained(tiny.DINOV2, split)).frozen()
    basis = np.linalg.qr(np.random.default_rng(1).standard_normal((4, 32, 32)))[0].astype(np.float32)
    rotated = np.einsum("btpj,pij->btpi", some_tokens().reshape(2, 37, 4, 32), basis).reshape(2, 37, 128)
    np.testing.assert_allclose(blocks.features(rotated, basis=basis), blocks.features(some_tokens()), atol=1e-4)


def test_tokens_of_little_size_and_far_from_zero_are_normalised_alike() -> None:
    blocks = pretrained(tiny.DINOV2, 2)
    for scale, offset in ((1e-3, 0.0), (1.0, 3.0), (1e-3, 3e-3)):
        tokens = torch.from_numpy(some_tokens()) * scale + offset
        torch.testing.assert_close(blocks(tokens), in_the_order_of_the_papers(blocks, tokens), rtol=1e-3, atol=1e-3)


def test_before_it_learns_the_low_rank_change_is_nothing(base: UpperBlocks) -> None:
    np.testing.assert_allclose(RankedBlocks(base, 4, seed=0).features(some_tokens()), base.features(some_tokens()), atol=1e-6)


def test_learning_changes_neither_the_base_nor_what_was_frozen_before(base: UpperBlocks) -> None:
    tokens = some_tokens()
    blocks = RankedBlocks(base, 4, seed=0)
    before, frozen = base.features(tokens), blocks.frozen()
    optimizer = torch.optim.SGD([parameter for _, parameter in blocks.learned()], lr=0.1)
    blocks(torch.from_numpy(tokens)).square().mean().backward()
    optimizer.step()
    assert np.abs(blocks.features(tokens) - before).max() > 1e-3
    np.testing.assert_array_equal(base.features(tokens), before)
    np.testing.assert_allclose(frozen.features(tokens), before, atol=1e-6)


def test_what_was_learned_comes_back_from_its_arrays(base: UpperBlocks) -> None:
    blocks = RankedBlocks(base, 4, seed=0)
    with torch.no_grad():
        for _, parameter in blocks.learned():
            parameter.add_(0.01)
    again = RankedBlocks(base, 4, seed=1)
    again.restore(blocks.state())
    np.testing.assert_array_equal(again.features(some_tokens()), blocks.features(some_tokens()))
    frozen = blocks.frozen()
    assert isinstance(frozen, RankedBlocks)
    assert frozen.state().keys() == blocks.state().keys()


def test_the_copies_share_the_base_in_memory(base: UpperBlocks) -> None:
    blocks = RankedBlocks(base, 4, seed=0)
    alone, together = parameter_bytes([base]), parameter_bytes([base, blocks, blocks.frozen()])
    assert alone < together < 1.5 * alone


def test_a_half_layer_gives_the_gradient_of_a_whole_one() -> None:
    half, whole = HalfLinear(8, 4), torch.nn.Linear(8, 4)
    with torch.no_grad():
        half.weight.copy_(whole.weight)
        whole.weight.copy_(half.weight.float())
        half.bias.copy_(whole.bias)
    ones, twos = (torch.arange(16.0).reshape(2, 8).requires_grad_() for _ in range(2))
    np.testing.assert_allclose(half(ones).detach().numpy(), whole(twos).detach().numpy(), rtol=1e-5)
    half(ones).square().sum().backward()
    whole(twos).square().sum().backward()
    assert ones.grad is not None
    assert twos.grad is not None
    np.testing.assert_allclose(ones.grad.numpy(), twos.grad.numpy(), rtol=1e-4)


@pytest.mark.parametrize("room_bytes", [0, 300_000, 8 << 20])
def test_the_room_keeps_what_fits_and_one_more_and_is_given_back(
    base: UpperBlocks, monkeypatch: pytest.MonkeyPatch, room_bytes: int
) -> None:
    monkeypatch.setattr(latentd.learning.layers, "ROOM_BYTES", room_bytes)
    blocks, answers = (RankedBlocks(base, 4, seed=0) for _ in range(2))
    serving = answers.frozen().requires_grad_(True)
    for module in (blocks, serving):
        for _ in range(2):  # the second pass begins with what the first one left in the room
            module(torch.from_numpy(some_tokens())).square().sum().backward()
    wanted = dict(serving.named_parameters())
    for name, parameter in blocks.learned():
        torch.testing.assert_close(parameter.grad, wanted[name].grad)
    sizes = [parameter.numel() for parameter in base.parameters() if parameter.dtype == torch.float16]
    most = widened_bytes(sizes)  # at the largest of those that pass
    assert most - 4 * max(sizes) < blocks.room_bytes() <= most <= room_bytes + 4 * max(sizes)
    blocks.rest()
    assert blocks.room_bytes() == 0


def test_the_matrices_that_do_not_learn_take_half_the_bytes(base: UpperBlocks) -> None:
    assert {parameter.dtype for name, parameter in base.named_parameters() if name.endswith("qkv.weight")} == {torch.float16}
