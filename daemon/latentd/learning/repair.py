"""A pruned backbone taught in closed form to give what the whole one gave: no labels, no gradients.

Blocks for two forward passes and the equations. Block by block, on images: the projection of the heads that are left, then the second
layer of the MLP, are refitted by least squares so that the tokens after them come near to those of the whole backbone, whatever the blocks
before them got wrong (asymmetric reconstruction, as in Zhang et al. 2016, "Accelerating very deep convolutional networks"). A ridge keeps
the weights near to what they were: the fewer the images, the nearer. Each token counts by the inverse of its variance, because a LayerNorm
reads it: otherwise a few loud tokens decide everything. And the class token counts for more than another by what hangs on it (the root of
their stakes: the stakes themselves would leave too few tokens to learn from). B images, N tokens, D width, K inputs of a layer.
"""

from __future__ import annotations

from typing import Callable, Iterable, List, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from latentd.learning.redundancy import Pixels, Progress, batches, blocks_of
from latentd.vision.vit import Block, Vit

PRIOR_IMAGES = 30.0  # the weights as they were count as so many images: with a tenth of it, 300 images are learned by heart
TOKENS = 64  # of an image, about, take part in the equations: neighbours say nearly the same, and the MLP's equations are what takes time

Equations = Iterable[Tuple[Tensor, Tensor, Tensor]]  # inputs (R, K), wanted outputs (R, D), weights (R,)


def repair(whole: Vit, pruned: Vit, pixels: Pixels, stakes: Sequence[Tensor], progress: Progress) -> None:
    """Refits `pruned` in place. Holds the tokens of all images twice: 0.8 MB an image for a ViT-S at 224 pixels.

    stakes: (2, 2) of every block of the whole one, as `residual.Evidence` has them.
    """
    with torch.inference_mode():
        targets = [tokens for _, tokens in batches(whole, pixels, progress)]
        tokens = [each.clone() for each in targets]
        for teacher, block, stake in zip(blocks_of(whole), blocks_of(pruned), stakes):
            targets, tokens = _repaired(teacher, block, targets, tokens, stake)


def _repaired(
    teacher: Block, block: Block, targets: List[Tensor], tokens: List[Tensor], stakes: Tensor
) -> Tuple[List[Tensor], List[Tensor]]:
    """One block: refitted, and both streams of tokens, (B, N, D) a batch, after it."""
    mixed = [block.mix(each) for each in tokens]
    targets = [teacher.attended(each, teacher.mix(each)) for each in targets]
    images = sum(len(each) for each in tokens)
    _refit(block.proj, _equations(mixed, targets, tokens, block.scale1, stakes[0], lambda each: each), images)
    tokens = [block.attended(each, heads) for each, heads in zip(tokens, mixed)]
    del mixed
    targets = [teacher.perceive(each) for each in targets]
    _refit(block.fc2, _equations(tokens, targets, tokens, block.scale2, stakes[1], lambda each: block.hidden(block.norm2(each))), images)
    return targets, [block.perceive(each) for each in tokens]


def _equations(
    inputs: List[Tensor],
    targets: List[Tensor],
    tokens: List[Tensor],
    scale: Optional[Tensor],
    stakes: Tensor,
    read: Callable[[Tensor], Tensor],
) -> Equations:
    """What the layer should give, from what it reads: the way from the tokens at hand to the target, before LayerScale."""
    count = tokens[0].shape[1]
    step = count // TOKENS | 1  # odd: an even one would take the same columns of every image row
    chosen = torch.cat([torch.zeros(1, dtype=torch.long), torch.arange(1, count, step)])
    kinds = stakes.sqrt().float().to(tokens[0].device)[(chosen > 0).long()] * torch.where(chosen > 0, float(step), 1.0)
    for given, target, start in zip(*([each[:, chosen] for each in every] for every in (inputs, targets, tokens))):
        read_in = read(given)
        wanted = target - start if scale is None else (target - start) / _away_from_zero(scale)
        weights = kinds / (target.var(dim=-1) + 1e-6)
        yield read_in.reshape(-1, read_in.shape[-1]), wanted.reshape(-1, wanted.shape[-1]), weights.reshape(-1)


def _away_from_zero(scale: Tensor) -> Tensor:
    """LayerScale that can be divided by: a channel that is switched off stays so, whatever is fitted for it."""
    return torch.where(scale.abs() < 1e-6, torch.full_like(scale, 1e-6), scale)


def _refit(layer: nn.Linear, equations: Equations, images: int) -> None:
    """Weighted ridge regression of the layer's error on its inputs, added to the layer: with an infinite ridge nothing changes."""
    width, count = layer.out_features, layer.in_features + 1
    now = torch.cat([layer.weight.T, layer.bias[None]])  # (K+1, D)
    gram = torch.zeros(count, count, dtype=torch.float64)
    cross = torch.zeros(count, width, dtype=torch.float64)
    for inputs, wanted, weights in equations:
        rows = torch.cat([inputs, torch.ones_like(inputs[:, :1])], dim=1)  # (R, K+1)
        weighted = rows * weights[:, None]
        gram += (rows.T @ weighted).cpu().double()
        cross += (weighted.T @ (wanted - rows @ now)).cpu().double()
    gram.diagonal().add_(PRIOR_IMAGES / images * float(gram.diagonal().mean()))
    change = torch.cholesky_solve(cross, torch.linalg.cholesky(gram)).to(layer.weight)
    layer.weight.copy_((now + change)[:-1].T)
    layer.bias.copy_((now + change)[-1])
