"""What a head costs after repair: against plain least squares, and what that makes of heads that others can stand in for."""

from __future__ import annotations

import dataclasses
from typing import List

import numpy as np
import pytest
import torch

import tiny
from latentd.learning import residual
from latentd.learning.analytic import LinearHead, RidgeSums
from latentd.learning.redundancy import batches, blocks_of, see
from latentd.learning.residual import Evidence, alone, cheapest, observe
from latentd.vision.vit import Vit

PIXELS = tiny.pixels(24)


def quiet(_: int) -> None:
    return None


def head_of(vit: Vit) -> LinearHead:
    features = see(vit, PIXELS, 2, quiet).features
    sums = RidgeSums(features.shape[1])
    sums.add(features, (np.arange(len(PIXELS)) % 3).tolist())
    return sums.solve()


def observed(vit: Vit) -> List[Evidence]:
    return observe(vit, PIXELS, 2, head_of(vit), quiet)


def test_a_cost_is_what_least_squares_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens of one kind, slopes that are the same in all directions: the squared error of plain regression."""
    monkeypatch.setattr(residual, "RIDGE", 1e-9)
    block = list(blocks_of(tiny.vit(tiny.TIMM)))[1]
    rows = torch.randn(500, 128, generator=torch.Generator().manual_seed(3)).double()
    rows[:, 64:] += rows[:, :64] @ torch.randn(64, 64, generator=torch.Generator().manual_seed(4)).double()
    given = torch.cat([rows, torch.ones(500, 1)], dim=1)
    zero = torch.zeros(129, 129, dtype=torch.float64)
    eye = torch.eye(128, dtype=torch.float64)
    evidence = Evidence(
        torch.stack([given.T @ given / 2, zero]).repeat(2, 1, 1, 1), torch.stack([eye, 0 * eye]), torch.tensor([[1.0, 0.0]] * 2).double()
    )
    lost = rows[:, 64:] @ block.proj.weight.T[64:].double()  # (500, D)
    inputs = given[:, [*range(64), 128]]
    left = lost - inputs @ torch.linalg.lstsq(inputs, lost).solution
    assert left.square().sum() < 0.9 * lost.square().sum()
    assert residual._cost(block, evidence, [0]) == pytest.approx(float(left.square().sum()), rel=1e-4)


def test_a_head_that_says_nothing_costs_nothing() -> None:
    weights = tiny.weights(tiny.vit())
    weights["blocks.1.proj.weight"][:, :64] = 0
    vit = Vit.from_weights(weights, tiny.DINOV2)
    evidence = observed(vit)
    costs = alone(vit, evidence)
    assert costs[1][0] == 0
    assert min(value for block, row in enumerate(costs) for head, value in enumerate(row) if (block, head) != (1, 0)) > 0
    assert cheapest(vit, evidence, 1) == [(1, 0)]


def test_of_two_twins_one_is_nearly_free_and_then_the_other_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three heads in block 0: the last two see the same, and are projected in different ways."""
    shape = dataclasses.replace(tiny.DINOV2, heads=(3, 2, 2))
    weights = tiny.weights(tiny.vit(shape))
    for part in ("weight", "bias"):
        thirds = weights[f"blocks.0.qkv.{part}"].reshape(3, 3, 64, -1)
        thirds[:, 2] = thirds[:, 1]
    vit = Vit.from_weights(weights, shape)
    monkeypatch.setattr(residual, "RIDGE", 1e-6)
    evidence = observed(vit)
    costs = alone(vit, evidence)
    assert max(costs[0][1], costs[0][2]) < 0.01 * min(costs[0][0], *costs[1])
    assert cheapest(vit, evidence, 1)[0] in ((0, 1), (0, 2))
    both = residual._cost(next(blocks_of(vit)), evidence[0], [0])
    assert both > 10 * max(costs[0][1], costs[0][2]), f"{both} for both, {costs} for one"


def test_heads_go_one_after_the_other_and_every_block_keeps_one() -> None:
    vit = tiny.vit()
    evidence = observed(vit)
    gone = cheapest(vit, evidence, 99)
    assert sorted(block for block, _ in gone) == [0, 1, 2]
    assert cheapest(vit, evidence, 2) == gone[:2]


def test_nothing_hangs_on_the_other_tokens_of_the_last_block() -> None:
    evidence = observed(tiny.vit())
    assert evidence[-1].stakes[:, 1].tolist() == [0, 0]
    assert (torch.stack([each.stakes for each in evidence])[:, :, 0] > 0).all()
    assert (torch.stack([each.stakes for each in evidence[:-1]])[:, :, 1] > 0).all()


def test_stakes_are_the_slopes_in_all_directions() -> None:
    for each in observed(tiny.vit()):
        traces = torch.stack([slopes.trace() for slopes in each.slopes])
        torch.testing.assert_close(each.stakes[0], traces, rtol=1e-5, atol=1e-12)


def test_a_stake_is_how_the_answer_moves_with_the_class_token() -> None:
    """One image, after the last block, against a finite difference along every axis."""
    vit, head = tiny.vit(), head_of(tiny.vit())
    head = LinearHead(head.class_ids, head.weight[128:], head.bias)
    stakes = observe(vit, PIXELS[:1], 1, head, quiet, seed=7)[-1].stakes
    mix = torch.randn(1, 3, generator=torch.Generator().manual_seed(7)) @ torch.from_numpy(head.weight).T
    _, tokens = next(batches(vit, PIXELS[:1], quiet))
    token = vit.run(tokens, 0, vit.depth)[0, :1].double()  # (1, D)
    steps = 1e-4 * torch.eye(128).double()
    vit.norm.double()
    slopes = ((vit.norm(token + steps) - vit.norm(token - steps)) @ mix[0].double()) / 2e-4  # (D,)
    assert float(stakes[1, 0]) == pytest.approx(float(slopes.square().sum() * token.var()), rel=1e-3)


def test_a_fit_by_heart_is_no_saving() -> None:
    """The last block has a class token an image, and fewer images here than a head has inputs: what stays can't be trusted to stand in."""
    vit = tiny.vit()
    evidence = observed(vit)[-1]
    block = list(blocks_of(vit))[-1]
    twice = evidence.given.sum(dim=0, keepdim=True).repeat(2, 1, 1, 1) / 2  # asked on what it was fitted on
    by_heart = residual._cost(block, evidence._replace(given=twice), [0])
    assert residual._cost(block, evidence, [0]) > 2 * by_heart
