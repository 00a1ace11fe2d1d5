"""What is lost for good when heads go: the part of their output that the heads beside them cannot say, in units of the answer.

A score like those of `redundancy`, and a way to choose by it: optimal brain surgery (Hassibi & Stork 1993) of whole heads. What the heads
of a block give is nearly linear in each other, so least squares on what stays (`repair`) brings back much of a head. What that can't
bring back, times how steeply the answer hangs on it, is what the head costs: with G the second moments of the block's head outputs, S
those that go, K those that stay, it is the Schur complement G_SS - G_SK G_KK^-1 G_KS, seen through the projection and the slopes of the
answer. With each head that goes all costs of its block change, so heads are taken one at a time. What stays is fitted on one half of the
images and asked on the other, in turn: late blocks hang on the class token alone, one an image, and as many of those as a head has inputs
are fitted without error. Two kinds of token are told apart everywhere, the class token, which answers, and all others.

One pass forward and one back over the images; runs on whoever prunes. B images, N tokens, D width, K = H*E head outputs of a block.
"""

from __future__ import annotations

from typing import List, NamedTuple, Sequence, Tuple

import numpy as np
import torch
from torch import Tensor

from latentd.learning.analytic import LinearHead
from latentd.learning.redundancy import Pixels, Progress, Scores, batches, blocks_of, features_of
from latentd.vision.prune import Head, columns_of
from latentd.vision.vit import Block, Vit

RIDGE = 0.1  # of the mean square of a block's head outputs: about that of a repair on some hundred images
KINDS = (slice(0, 1), slice(1, None))  # of tokens: the class token, all others


class Evidence(NamedTuple):
    """What one block's heads give and what hangs on it, for each kind of token; means over the images.

    given: (2, 2, K+1, K+1), [half of the images] by [kind]: second moments of the head outputs and a one, summed over the tokens of an
    image; the two halves add up to the mean over all. slopes: (2, D, D) second moments
    of the answer's slope at the attention output of one token. stakes: (2, 2) mean square of that slope, [after the attention, after the
    block] by [kind]. Everything is in standard deviations of the token, because a LayerNorm reads it.
    """

    given: Tensor
    slopes: Tensor
    stakes: Tensor


def observe(vit: Vit, pixels: Pixels, class_tokens: int, head: LinearHead, progress: Progress, seed: int = 0) -> List[Evidence]:
    """Evidence of every block. The answer is a random mix of the head's scores, a new one for every image; labels are not asked."""
    found = [_nothing(block) for block in blocks_of(vit)]
    random = torch.Generator().manual_seed(seed)
    weight = torch.from_numpy(head.weight)
    for _, tokens in batches(vit, pixels, progress):
        mixed, attended, after = _passed(vit, tokens.requires_grad_())
        mix = torch.randn(len(tokens), weight.shape[1], generator=random) @ weight.T  # (B, F)
        answer = (features_of(vit, after, class_tokens) * mix.to(tokens)).sum()
        slopes = torch.autograd.grad(answer, attended + after)
        for index, evidence in enumerate(found):
            _note(
                evidence, mixed[index].detach(), (attended[index].detach(), after[index].detach()), slopes[index :: vit.depth], len(pixels)
            )
    return found


def _nothing(block: Block) -> Evidence:
    width, inputs = block.proj.out_features, block.proj.in_features + 1
    shapes = ((2, 2, inputs, inputs), (2, width, width), (2, 2))
    return Evidence(*(torch.zeros(shape, dtype=torch.float64) for shape in shapes))


def _passed(vit: Vit, tokens: Tensor) -> Tuple[List[Tensor], List[Tensor], List[Tensor]]:
    """Of every block the head outputs (B, N, K), the tokens after its attention and those after it (B, N, D)."""
    mixed, attended, after = [], [], [tokens]
    for block in blocks_of(vit):
        mixed.append(block.mix(after[-1]))
        attended.append(block.attended(after[-1], mixed[-1]))
        after.append(block.perceive(attended[-1]))
    return mixed, attended, after[1:]


def _note(evidence: Evidence, mixed: Tensor, places: Sequence[Tensor], slopes: Sequence[Tensor], images: int) -> None:
    """Adds one batch. places, slopes: tokens after the attention and after the block, and what hangs on them."""
    scaled = [slope * place.std(dim=-1, keepdim=True) for place, slope in zip(places, slopes)]  # (B, N, D)
    ones = torch.ones_like(mixed[..., :1])
    given = torch.cat([mixed, ones], dim=-1) / (places[0].std(dim=-1, keepdim=True) + 1e-6)  # (B, N, K+1)
    for kind, tokens in enumerate(KINDS):
        for half in range(2):
            evidence.given[half, kind] += _moments(given[half::2, tokens]) / images
        count = given[:, tokens].shape[1]
        evidence.slopes[kind] += _moments(scaled[0][:, tokens]) / (images * count)
        for place, slope in enumerate(scaled):
            evidence.stakes[place, kind] += slope[:, tokens].square().sum().cpu() / (images * count)


def _moments(rows: Tensor) -> Tensor:
    """(B, N, X) -> (X, X), on the CPU in float64."""
    flat = rows.reshape(-1, rows.shape[-1])
    return (flat.T @ flat).cpu().double()


def alone(vit: Vit, evidence: Sequence[Evidence]) -> Scores:
    """What each head costs when it is the only one to go."""
    return [
        np.array([_cost(block, each, [other for other in range(block.heads) if other != head]) for head in range(block.heads)])
        for block, each in zip(blocks_of(vit), evidence)
    ]


def cheapest(vit: Vit, evidence: Sequence[Evidence], count: int) -> List[Head]:
    """`count` heads of this backbone, in the order in which they go: each the one that adds least to the cost. Every block keeps one."""
    blocks = list(blocks_of(vit))
    left = [list(range(block.heads)) for block in blocks]
    spent = [0.0] * len(blocks)
    offers = [_offer(block, each, heads) for block, each, heads in zip(blocks, evidence, left)]
    gone: List[Head] = []
    while len(gone) < count:
        added, index = min((offer[0] - spent[index], index) for index, offer in enumerate(offers))
        if added == np.inf:
            break
        spent[index], head = offers[index]
        left[index].remove(head)
        gone.append((index, head))
        offers[index] = _offer(blocks[index], evidence[index], left[index])
    return gone


def _offer(block: Block, evidence: Evidence, heads: Sequence[int]) -> Tuple[float, int]:
    """What the block costs in all without the cheapest of these heads, and that head; infinity for the last one."""
    if len(heads) == 1:
        return np.inf, heads[0]
    return min((_cost(block, evidence, [other for other in heads if other != head]), head) for head in heads)


def _cost(block: Block, evidence: Evidence, kept: Sequence[int]) -> float:
    """What the block is worth less with these heads alone, its projection refitted to them."""
    inner = block.proj.in_features
    stay = np.append(columns_of(kept, block.head_width) if kept else np.zeros(0, np.int64), inner)  # the bias stays
    scale = torch.ones_like(block.proj.bias) if block.scale1 is None else block.scale1
    lost = torch.cat([block.proj.weight.T * scale, torch.zeros_like(scale)[None]]).cpu().double()  # (K+1, D), as the tokens get it
    lost[stay] = 0
    total = 0.0
    for half, given in enumerate(evidence.given):
        gram = (evidence.stakes[0, :, None, None] * evidence.given[1 - half]).sum(dim=0)
        ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(stay), dtype=gram.dtype)
        error = lost.clone()
        error[stay] = -torch.cholesky_solve(gram[stay] @ lost, torch.linalg.cholesky(gram[stay][:, stay] + ridge))
        total += float((evidence.slopes * (error.T @ given @ error)).sum())
    return total
