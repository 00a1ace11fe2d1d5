"""What a head is worth, against what its definition says."""

from __future__ import annotations

from typing import List, Tuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import tiny
from latentd.learning import redundancy
from latentd.learning.analytic import LinearHead, RidgeSums
from latentd.learning.redundancy import Question
from latentd.vision.vit import Vit

PIXELS = tiny.pixels(10)
CLASS_TOKENS = 2
DONE: List[int] = []


def quiet(images: int) -> None:
    DONE.append(images)


def silent_head(head: int = 0, block: int = 1) -> Vit:
    """A module in which one head's output is projected to nothing."""
    module = tiny.vit()
    weights = tiny.weights(module)
    weights[f"blocks.{block}.proj.weight"][:, head * 64 : (head + 1) * 64] = 0
    return Vit.from_weights(weights, module.shape)


def question(vit: Vit) -> Question:
    """Two classes that any linear head of random images can be asked for."""
    features = redundancy.see(vit, PIXELS, CLASS_TOKENS, quiet).features
    sums = RidgeSums(features.shape[1])
    columns = np.arange(len(PIXELS), dtype=np.int64) % 2
    sums.add(features, columns.tolist())
    return Question(sums.solve(), columns)


def frozen(vit: Vit, pixels: NDArray[np.uint8] = PIXELS) -> Tuple[NDArray[np.float32], NDArray[np.float32]]:
    from latentd.engines.eager import EagerStage
    from latentd.engines.stage import StageSpec

    spec = StageSpec("tiny", "0" * 64, tiny.SIZE, 3, CLASS_TOKENS, 128, vit.count)
    answer = EagerStage(spec, vit).encode(pixels, tokens=True)
    assert answer.tokens is not None
    return answer.features, answer.tokens


def test_seeing_gives_the_features_of_the_frozen_stage_and_counts_the_images() -> None:
    vit = tiny.vit()
    DONE.clear()
    seen = redundancy.see(vit, PIXELS, CLASS_TOKENS, quiet)
    np.testing.assert_allclose(seen.features, frozen(vit)[0], atol=1e-5)
    assert sum(DONE) == len(PIXELS)
    assert [mean.shape for mean in seen.means] == [(128,)] * 3


def test_the_means_are_those_of_the_heads_outputs() -> None:
    vit = tiny.vit()
    tokens = vit.embed(torch.from_numpy(tiny.normalised(10, vit.shape)))
    first = next(redundancy.blocks_of(vit))
    expected = first.mix(tokens).mean(dim=(0, 1)).numpy()
    np.testing.assert_allclose(redundancy.see(vit, PIXELS, CLASS_TOKENS, quiet).means[0], expected, atol=1e-4)


def test_attention_that_looks_everywhere_has_the_entropy_of_all_tokens_and_is_its_neighbours_twin() -> None:
    vit = tiny.vit()
    with torch.no_grad():
        next(redundancy.blocks_of(vit)).qkv.weight[:256] = 0  # queries and keys
        next(redundancy.blocks_of(vit)).qkv.bias[:256] = 0
    found = redundancy.attention(vit, PIXELS, quiet)
    np.testing.assert_allclose(found.entropy[0], np.log(vit.count), rtol=1e-5)
    np.testing.assert_allclose(found.distance[0], 0, atol=1e-5)
    assert (found.entropy[1] < np.log(vit.count) - 0.01).all()
    assert (found.distance[1] > 0.01).all()
    scores = redundancy.worth("entropy", vit, PIXELS, CLASS_TOKENS, None, redundancy.see(vit, PIXELS, CLASS_TOKENS, quiet), quiet)
    assert scores[0].max() < scores[1].min()


@pytest.mark.parametrize("score", ["gradient", "leave-one-out"])
@pytest.mark.parametrize("labelled", [True, False])
def test_a_head_that_says_nothing_is_worth_nothing(score: str, labelled: bool) -> None:
    vit = silent_head()
    seen = redundancy.see(vit, PIXELS, CLASS_TOKENS, quiet)
    asked = question(vit) if labelled else None
    scores = redundancy.worth(score, vit, PIXELS, CLASS_TOKENS, asked, seen, quiet)
    assert abs(scores[1][0]) < 1e-6
    others = [abs(value) for block, row in enumerate(scores) for head, value in enumerate(row) if (block, head) != (1, 0)]
    assert min(others) > 1e-5


def test_the_gradient_of_a_gate_is_the_slope_of_the_loss() -> None:
    """Against a finite difference of the projection's columns, for one image."""
    vit, asked = tiny.vit(), question(tiny.vit())
    one = Question(asked.head, asked.columns[:1])
    found = redundancy.gradient(vit, PIXELS[:1], CLASS_TOKENS, one, quiet)

    def loss(gate: float) -> float:
        weights = tiny.weights(vit)
        weights["blocks.1.proj.weight"][:, 64:] *= gate
        features = redundancy.see(Vit.from_weights(weights, vit.shape), PIXELS[:1], CLASS_TOKENS, quiet).features
        return float(one.loss(torch.from_numpy(features).double(), 0)[0])

    slope = abs(loss(1.01) - loss(0.99)) / 0.02
    assert slope > 0
    assert found[1][1] == pytest.approx(slope, rel=0.02)


def test_leaving_a_head_out_is_pruning_it_with_its_mean_in_the_bias() -> None:
    from latentd.vision.prune import without_heads

    vit, asked = tiny.vit(), question(tiny.vit())
    seen = redundancy.see(vit, PIXELS, CLASS_TOKENS, quiet)
    found = redundancy.leave_one_out(vit, PIXELS, CLASS_TOKENS, asked, seen, quiet)
    pruned = without_heads(tiny.weights(vit), vit.shape, [(1, 0)], seen.means)
    features = redundancy.see(Vit.from_weights(pruned.weights, pruned.shape), PIXELS, CLASS_TOKENS, quiet).features
    moved = np.linalg.norm(features - seen.features, axis=1) / np.linalg.norm(seen.features, axis=1)
    assert found.change[1][0] == pytest.approx(moved.mean(), rel=1e-3)
    assert found.points is not None and found.surprise is not None
    assert found.points[1][0] == pytest.approx(100 * (asked.right(seen.features).mean() - asked.right(features).mean()))
    losses = [float(asked.loss(torch.from_numpy(each), 0).mean()) for each in (features, seen.features)]
    assert found.surprise[1][0] == pytest.approx(losses[0] - losses[1], rel=1e-3, abs=1e-6)


def test_without_labels_leaving_out_tells_the_movement_only() -> None:
    vit = tiny.vit()
    found = redundancy.leave_one_out(vit, PIXELS, CLASS_TOKENS, None, redundancy.see(vit, PIXELS, CLASS_TOKENS, quiet), quiet)
    assert found.surprise is None and found.points is None


def test_a_block_with_one_head_has_no_twin() -> None:
    import dataclasses

    vit = tiny.vit(dataclasses.replace(tiny.DINOV2, heads=(2, 1, 2)))
    assert redundancy.attention(vit, PIXELS, quiet).distance[1].tolist() == [1.0]


def test_an_unknown_score_is_a_bug_of_the_caller() -> None:
    empty = redundancy.Seen(np.zeros((0, 256), np.float32), [])
    with pytest.raises(AssertionError, match="none of"):
        redundancy.worth("weight", tiny.vit(), PIXELS, CLASS_TOKENS, None, empty, quiet)


def test_the_loss_of_a_sure_right_answer_is_small_and_of_a_sure_wrong_one_large() -> None:
    head = LinearHead((7, 9), np.array([[10.0, -10.0]], np.float32), np.zeros(2, np.float32), separation=16.0)
    losses = Question(head, np.array([0, 1])).loss(torch.ones(2, 1), 0)
    assert losses[0] < 0.01 < 10 < losses[1]
