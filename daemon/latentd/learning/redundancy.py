"""What each attention head of a backbone is worth, measured on images. Runs on whoever prunes; blocks for minutes, in small batches.

Three measures, each with the least useful heads lowest:
- entropy: how sharply a head looks, log N minus the mean entropy of its attention. Needs no labels, says nothing of what the head is for.
- gradient: mean |d loss / d gate| of a gate of one on each head (Michel et al. 2019, "Are sixteen heads really better than one?"). The
  loss is the cross-entropy of the closed-form head on taught labels; without labels, the features along random directions.
- leave-one-out: what is lost when a head gives its mean instead of what it sees: cross-entropy and accuracy on taught labels, and how far
  the features move.
B images, N tokens, D width, H heads, E head width, F features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from latentd.engines.stage import planar
from latentd.learning.analytic import LinearHead
from latentd.learning.gate import DEFAULT_TEMPERATURE, SURE_NATS
from latentd.vision.vit import Block, Vit, normalised

SCORES = ("entropy", "gradient", "leave-one-out")
BATCH = 8
Scores = List[NDArray[np.float64]]  # one value a head, one array a block
Progress = Callable[[int], None]  # called with the number of images just done
Pixels = NDArray[np.uint8]  # (n, S, S, 3)


@dataclass(frozen=True)
class Question:
    """What taught images are asked: the closed-form head, and for each image the column of its true class. temperature: of the scores."""

    head: LinearHead
    columns: NDArray[np.int64]

    @property
    def temperature(self) -> float:
        return max(DEFAULT_TEMPERATURE, self.head.separation / 2 / SURE_NATS)

    def loss(self, features: Tensor, first: int) -> Tensor:
        """Cross-entropy of each image, in nats, from features (B, F) of the images `first` and on."""
        weight, bias = (torch.from_numpy(part).to(features) for part in (self.head.weight, self.head.bias))
        columns = torch.from_numpy(self.columns[first : first + len(features)]).to(features.device)
        return F.cross_entropy((features @ weight + bias) / self.temperature, columns, reduction="none")

    def right(self, features: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Whether each image is answered with its class."""
        found: NDArray[np.bool_] = (features @ self.head.weight + self.head.bias).argmax(axis=1) == self.columns
        return found


class Seen(NamedTuple):
    """One pass over the images: features (n, F), and for each block what its heads give on average (H*E,)."""

    features: NDArray[np.float32]
    means: List[NDArray[np.float32]]


class Attention(NamedTuple):
    """entropy: mean of each head's attention, in nats. distance: total variation between a head's attention and that of the head of its
    block that is nearest to it, 0 (the same) to 1; 1 where it has no other."""

    entropy: Scores
    distance: Scores


class LeftOut(NamedTuple):
    """What one head less changes. change: relative movement of the features. surprise: further nats of cross-entropy; points: percentage
    points of accuracy lost; both None without labels."""

    change: Scores
    surprise: Optional[Scores]
    points: Optional[Scores]


def see(vit: Vit, pixels: Pixels, class_tokens: int, progress: Progress) -> Seen:
    """Features and head means of the images; one forward pass."""
    features: List[NDArray[np.float32]] = []
    sums = [np.zeros(block.heads * block.head_width) for block in blocks_of(vit)]
    with torch.inference_mode():
        for _, tokens in batches(vit, pixels, progress):
            states = [tokens]
            for index, block in enumerate(blocks_of(vit)):
                mixed = block.mix(states[-1])
                sums[index] += mixed.mean(dim=1).sum(dim=0).cpu().numpy()
                states.append(block.perceive(block.attended(states[-1], mixed)))
            features.append(features_of(vit, states[1:], class_tokens).cpu().numpy())
    return Seen(np.concatenate(features), [(total / len(pixels)).astype(np.float32) for total in sums])


def attention(vit: Vit, pixels: Pixels, progress: Progress) -> Attention:
    """How sharply each head looks, and how much it looks like another one; one forward pass."""
    entropy, distance = _zeros(vit), _zeros(vit)
    with torch.inference_mode():
        for _, tokens in batches(vit, pixels, progress):
            for index, block in enumerate(blocks_of(vit)):
                query, key, _ = block.heads_of(tokens)
                weights = torch.softmax((query * block.head_width**-0.5) @ key.transpose(-2, -1), dim=-1)  # (B, H, N, N)
                entropy[index] += torch.special.entr(weights).sum(dim=-1).mean(dim=-1).sum(dim=0).cpu().numpy()
                distance[index] += _nearest(weights).sum(dim=0).cpu().numpy()
                tokens = block(tokens)
    return Attention([total / len(pixels) for total in entropy], [total / len(pixels) for total in distance])


def gradient(vit: Vit, pixels: Pixels, class_tokens: int, question: Optional[Question], progress: Progress, seed: int = 0) -> Scores:
    """Mean |d loss / d gate| of each head; without a question the root mean square of d (v · features) / d gate over random v.

    One forward and one backward pass. At a gate of one the distance of the features from themselves has no slope: hence random directions.
    """
    totals = _zeros(vit)
    directions = torch.Generator().manual_seed(seed)
    for first, tokens in batches(vit, pixels, progress):
        gates = [torch.ones(len(tokens), 1, block.heads, 1, device=tokens.device, requires_grad=True) for block in blocks_of(vit)]
        features = _gated(vit, tokens, gates, class_tokens)  # (B, F)
        if question is None:
            loss = (features * torch.randn(features.shape, generator=directions).to(features)).sum()
        else:
            loss = question.loss(features, first).sum()
        for total, slope in zip(totals, torch.autograd.grad(loss, gates)):
            each = slope[:, 0, :, 0]  # (B, H)
            total += (each.square() if question is None else each.abs()).sum(dim=0).cpu().numpy()
    means = [total / len(pixels) for total in totals]
    return [np.sqrt(mean) for mean in means] if question is None else means


def leave_one_out(vit: Vit, pixels: Pixels, class_tokens: int, question: Optional[Question], seen: Seen, progress: Progress) -> LeftOut:
    """The exact effect of each head on its own; `seen` is what `see` gave for the same images.

    The tokens that enter each block are kept for one batch at a time, and each head's absence is computed from its block on: half the
    blocks a head, on average.
    """
    change, surprise, points = _zeros(vit), _zeros(vit), _zeros(vit)
    whole = torch.from_numpy(seen.features)
    with torch.inference_mode():
        for first, tokens in batches(vit, pixels, progress):
            base = whole[first : first + len(tokens)]
            for block, head, features in _each_left_out(vit, tokens, class_tokens, seen.means):
                moved = (features - base).norm(dim=1) / base.norm(dim=1)
                change[block][head] += float(moved.sum()) / len(pixels)
                if question is not None:
                    surprise[block][head] += float((question.loss(features, first) - question.loss(base, first)).sum()) / len(pixels)
                    points[block][head] += 100 * _lost(question, base, features, first) / len(pixels)
    return LeftOut(change, None, None) if question is None else LeftOut(change, surprise, points)


def worth(score: str, vit: Vit, pixels: Pixels, class_tokens: int, question: Optional[Question], seen: Seen, progress: Progress) -> Scores:
    """One of SCORES, each with the least useful heads lowest; `seen` is what `see` gave for the same images."""
    assert score in SCORES, f"{score} is none of {SCORES}"
    if score == "entropy":
        return [np.log(vit.count) - entropy for entropy in attention(vit, pixels, progress).entropy]
    if score == "gradient":
        return gradient(vit, pixels, class_tokens, question, progress)
    left_out = leave_one_out(vit, pixels, class_tokens, question, seen, progress)
    return left_out.change if left_out.surprise is None else left_out.surprise


def blocks_of(vit: Vit) -> Iterator[Block]:
    for block in vit.blocks:
        assert isinstance(block, Block), "a Vit is made of Blocks"
        yield block


def batches(vit: Vit, pixels: Pixels, progress: Progress) -> Iterator[Tuple[int, Tensor]]:
    """(index of the first image, embedded tokens (B, N, D)) of a few images at a time, on the module's device."""
    for first in range(0, len(pixels), BATCH):
        some = pixels[first : first + BATCH]
        yield first, embedded(vit, some)
        progress(len(some))


def embedded(vit: Vit, pixels: Pixels) -> Tensor:
    """(B, N, D) tokens before the first block, on the module's device; no gradient goes back through them."""
    with torch.no_grad():
        tokens: Tensor = vit.embed(normalised(torch.from_numpy(planar(pixels)).to(vit.class_token.device), vit.shape))
    return tokens


def features_of(vit: Vit, after: Sequence[Tensor], class_tokens: int) -> Tensor:
    """Features (B, F) from the tokens after each block, as Vit.frozen gives them."""
    lead = torch.cat([tokens[:, :1] for tokens in after[-class_tokens:]], dim=1)  # (B, m, D)
    features: Tensor = vit.norm(lead).reshape(len(lead), -1)
    return features


def _gated(vit: Vit, tokens: Tensor, gates: Sequence[Tensor], class_tokens: int) -> Tensor:
    """Features (B, F) with every head's output multiplied by its gate (B, 1, H, 1)."""
    after = []
    for block, gate in zip(blocks_of(vit), gates):
        mixed = block.mix(tokens)
        split = mixed.reshape(len(mixed), -1, block.heads, block.head_width) * gate  # (B, N, H, E)
        tokens = block.perceive(block.attended(tokens, split.reshape(mixed.shape)))
        after.append(tokens)
    return features_of(vit, after, class_tokens)


def _each_left_out(vit: Vit, tokens: Tensor, class_tokens: int, means: Sequence[NDArray[np.float32]]) -> Iterator[Tuple[int, int, Tensor]]:
    """(block, head, features (B, F) on the CPU) for every head that gives its mean."""
    after: List[Tensor] = []
    for index, block in enumerate(blocks_of(vit)):
        mixed, mean = block.mix(tokens), torch.from_numpy(means[index]).to(tokens)
        for head in range(block.heads):
            own = slice(head * block.head_width, (head + 1) * block.head_width)
            blind = mixed.clone()
            blind[..., own] = mean[own]
            states = [*after, block.perceive(block.attended(tokens, blind))]
            for later in list(blocks_of(vit))[index + 1 :]:
                states.append(later(states[-1]))
            yield index, head, features_of(vit, states, class_tokens).cpu()
        tokens = block.perceive(block.attended(tokens, mixed))
        after.append(tokens)


def _lost(question: Question, base: Tensor, features: Tensor, first: int) -> int:
    """Right answers that the change turned wrong, less those that it turned right."""
    asked = Question(question.head, question.columns[first : first + len(base)])
    return int(asked.right(base.numpy()).sum()) - int(asked.right(features.numpy()).sum())


def _nearest(weights: Tensor) -> Tensor:
    """Attention (B, H, N, N) -> (B, H) total variation to the nearest other head, mean over the tokens that look."""
    heads = weights.shape[1]
    apart = torch.ones(len(weights), heads, heads, device=weights.device)
    for one in range(heads):
        for other in range(one + 1, heads):
            apart[:, one, other] = apart[:, other, one] = (weights[:, one] - weights[:, other]).abs().sum(dim=-1).mean(dim=-1) / 2
    return apart.min(dim=-1).values


def _zeros(vit: Vit) -> Scores:
    return [np.zeros(block.heads) for block in blocks_of(vit)]
