"""The ViT: cut anywhere, the answer stays the same; and it is the original DINOv2, to 1e-4."""

from __future__ import annotations

import dataclasses
from typing import cast

import numpy as np
import pytest
import torch

import tiny
from latentd.errors import ConfigError
from latentd.vision import checkpoints, focus
from latentd.vision.vit import Block, Vit, resized_position


@pytest.mark.parametrize("cut", [0, 1, 2, 3])
def test_cut_at_any_block_the_two_parts_give_what_the_whole_gives(cut: int) -> None:
    module = tiny.vit()
    images = torch.from_numpy(tiny.normalised(2, module.shape))
    whole = module.run(module.embed(images), 0, 3)
    assert torch.equal(module.run(module.run(module.embed(images), 0, cut), cut, 3), whole)


def test_features_are_the_class_tokens_of_the_last_blocks_through_the_final_norm_in_block_order() -> None:
    module = tiny.vit()
    images = torch.from_numpy(tiny.normalised(2, module.shape))
    features, tokens = module.frozen(images, split=1, class_tokens=2)
    after = [module.run(module.embed(images), 0, last) for last in (1, 2, 3)]
    expected = torch.cat([module.norm(after[1][:, 0]), module.norm(after[2][:, 0])], dim=1)
    torch.testing.assert_close(features, expected)
    assert torch.equal(tokens, after[0])


@pytest.mark.parametrize("queries", [1, 3, 37])
def test_a_block_gives_the_first_tokens_alone_what_it_gives_them_among_all(queries: int) -> None:
    module = tiny.vit()
    tokens = module.embed(torch.from_numpy(tiny.normalised(2, module.shape)))
    torch.testing.assert_close(module.blocks[0](tokens, queries), module.blocks[0](tokens)[:, :queries])


def test_tokens_at_full_depth_are_not_normalised() -> None:
    module = tiny.vit()
    images = torch.from_numpy(tiny.normalised(1, module.shape))
    _, tokens = module.frozen(images, split=3, class_tokens=1)
    assert torch.equal(tokens, module.run(module.embed(images), 0, 3))


def test_tokens_come_as_class_token_then_registers_then_patches_in_reading_order() -> None:
    shape = dataclasses.replace(tiny.DINOV2, registers=2)
    module = tiny.vit(shape)
    tokens = module.embed(torch.from_numpy(tiny.normalised(1, shape)))[0]
    assert tokens.shape == (1 + 2 + 36, shape.width)
    torch.testing.assert_close(tokens[0], module.class_token + module.class_position)
    torch.testing.assert_close(tokens[1:3], module.registers.data)
    changed = torch.from_numpy(tiny.normalised(1, shape))
    changed[0, :, 4:8, 8:12] += 1.0  # the patch in row 1, column 2
    moved = (module.embed(changed)[0] != tokens).any(dim=1).nonzero().flatten().tolist()
    assert moved == [3 + 1 * 6 + 2]


def test_one_image_gives_the_same_alone_and_in_a_batch() -> None:
    module = tiny.vit()
    images = tiny.normalised(3, module.shape)
    torch.testing.assert_close(torch.from_numpy(module.final_tokens(images)[1:2]), torch.from_numpy(module.final_tokens(images[1:2])))


def test_a_block_may_have_fewer_heads_and_neurons_than_the_others() -> None:
    shape = dataclasses.replace(tiny.DINOV2, heads=(2, 1, 2), mlp_width=(96, 40, 96))
    module = tiny.vit(shape)
    loaded = Vit.from_weights(tiny.weights(module), shape)
    images = tiny.normalised(2, shape)
    assert np.array_equal(loaded.final_tokens(images), module.final_tokens(images))


def test_a_pruned_head_leaves_what_a_silenced_head_leaves() -> None:
    """Cutting a head out of block 1 equals zeroing its columns of the output projection."""
    module = tiny.vit()
    arrays = tiny.weights(module)
    kept = {name: value.copy() for name, value in arrays.items()}
    arrays["blocks.1.proj.weight"][:, :64] = 0
    for part in ("weight", "bias"):
        thirds = np.split(kept[f"blocks.1.qkv.{part}"], 3)
        kept[f"blocks.1.qkv.{part}"] = np.concatenate([third[64:] for third in thirds])
    kept["blocks.1.proj.weight"] = kept["blocks.1.proj.weight"][:, 64:]
    silenced = Vit.from_weights(arrays, tiny.DINOV2)
    pruned = Vit.from_weights(kept, dataclasses.replace(tiny.DINOV2, heads=(2, 1, 2)))
    images = tiny.normalised(1, tiny.DINOV2)
    np.testing.assert_allclose(pruned.final_tokens(images), silenced.final_tokens(images), atol=1e-5)


def test_the_gated_mlp_multiplies_the_second_half_by_silu_of_the_first() -> None:
    """DINOv2 giant's feed-forward layer, by its definition."""
    block = cast(Block, tiny.vit(dataclasses.replace(tiny.DINOV2, swiglu=True)).blocks[0])
    tokens = torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(0))
    gate, value = np.split((tokens @ block.fc1.weight.T + block.fc1.bias).numpy(), 2, axis=-1)
    expected = torch.from_numpy(gate / (1 + np.exp(-gate)) * value) @ block.fc2.weight.T + block.fc2.bias
    torch.testing.assert_close(block.mlp(tokens), expected, atol=1e-4, rtol=1e-4)


def test_the_position_grid_is_resized_once_for_another_image_size() -> None:
    module = Vit.from_weights(tiny.weights(tiny.vit()), tiny.DINOV2, image_size=32)
    assert module.position.shape == (64, 128)
    assert module.final_tokens(tiny.normalised(1, tiny.DINOV2, size=32)).shape == (1, 65, 128)


def cubic(distance: float) -> float:
    """Keys' kernel with a = -0.75, written from its definition."""
    x = abs(distance)
    if x >= 2:
        return 0.0
    return 1.25 * x**3 - 2.25 * x**2 + 1 if x < 1 else -0.75 * (x**3 - 5 * x**2 + 8 * x - 4)


def test_resizing_is_bicubic_around_pixel_centres() -> None:
    grid = torch.randn(36, 3, generator=torch.Generator().manual_seed(0))
    matrix = torch.zeros(8, 6)  # output place i is a mixture of the four places around its centre, edges repeated
    for place in range(8):
        centre = (place + 0.5) * 6 / 8 - 0.5
        for offset in range(int(centre // 1) - 1, int(centre // 1) + 3):
            matrix[place, min(max(offset, 0), 5)] += cubic(centre - offset)
    expected = torch.einsum("ai,bj,ijd->abd", matrix, matrix, grid.reshape(6, 6, 3)).reshape(64, 3)
    torch.testing.assert_close(resized_position(grid, 8), expected, atol=1e-5, rtol=1e-5)
    assert resized_position(grid, 6) is grid


def test_loaded_modules_do_not_learn_by_accident() -> None:
    module = Vit.from_weights(tiny.weights(tiny.vit()), tiny.DINOV2)
    assert not module.training
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert all(parameter.dtype == torch.float32 for parameter in module.parameters())


def test_an_image_size_that_patches_do_not_fill_names_the_nearest_that_they_do() -> None:
    with pytest.raises(ConfigError) as refused:
        Vit(tiny.DINOV2, image_size=26)
    assert "26" in refused.value.detail
    assert "24" in refused.value.hint


def test_the_pulled_backbone_equals_the_graph_it_came_from(backbone: checkpoints.Backbone) -> None:
    """Final-norm tokens of two probe images, as the original ONNX graph computed them when the backbone was installed."""
    if not backbone.reference_path.is_file():
        pytest.skip("pulled where ONNX Runtime was absent: there are no answers of the original graph to compare with")
    with np.load(backbone.reference_path) as stored:
        original = focus.Reference(stored["pixels"], stored["final"])
    ours = Vit.load(backbone, focus.REFERENCE_SIZE).final_tokens(focus.normalised(original.pixels, backbone.shape))
    assert original.final.shape == (2, 257, 384)
    assert np.abs(original.final).max() > 5.0
    assert np.abs(ours - original.final).max() <= 1e-4
