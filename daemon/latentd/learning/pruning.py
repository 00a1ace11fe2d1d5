"""Which heads go, in rounds: score, take out a few, repair, imitate, ask, until the wanted share is gone or it costs too much.

Runs on whoever prunes; blocks for minutes. Heads are named by (block, head) of the backbone that was given, counted from 0, however many
went before them. Images are shown (scores, repair, imitation and the closed-form head come from them) or held out (only asked): the cost
is measured on images that nothing was chosen or fitted on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Callable, Dict, FrozenSet, List, Mapping, NamedTuple, Optional, Tuple

import numpy as np
from numpy.typing import NDArray

from latentd.learning import redundancy
from latentd.learning.analytic import LinearHead, RidgeSums
from latentd.learning.imitation import BATCH, imitate, steps_of
from latentd.learning.redundancy import Pixels, Question, Scores, Seen, see, worth
from latentd.learning.repair import repair
from latentd.learning.residual import Evidence, alone, cheapest, observe
from latentd.vision.prune import Head, Pruned, heads_in, without_heads
from latentd.vision.shape import VitShape
from latentd.vision.vit import Vit

RESIDUAL = "residual"
SCORES = (RESIDUAL, *redundancy.SCORES)
REPAIR_IMAGES = 512  # their tokens must fit into memory twice
OBSERVED_IMAGES = 256  # each counts with all its tokens
Arrays = Mapping[str, NDArray[np.float32]]
Watch = Callable[[str, int, int], None]  # what is being done, images done so far, images in all


class Lesson(NamedTuple):
    """Taught images: pixels (n, S, S, 3) and a class for each."""

    pixels: Pixels
    class_ids: NDArray[np.int64]

    def of(self, chosen: NDArray[np.int64]) -> Lesson:
        return Lesson(self.pixels[chosen], self.class_ids[chosen])


@dataclass(frozen=True)
class Wish:
    """share: of all heads, to be gone at the end. max_cost: percentage points of accuracy on the held-out images that may be lost.
    repaired: whether what is left is refitted after each round. epochs: how often it then goes through the shown images to learn to give
    the features that the whole gave; 0: it does not."""

    share: float
    max_cost: float
    score: str
    rounds: int = 4
    repaired: bool = True
    epochs: float = 2.0


class Step(NamedTuple):
    """One round: every head that is gone after it, and the accuracy on the held-out images, in percent."""

    removed: Tuple[Head, ...]
    accuracy: float


Keep = Callable[[Step, Pruned], None]


class Outcome(NamedTuple):
    """best: the weights of the last step within the cost; None where not even the first was. worth: of every head, before any went.
    steps: all that were made, the one that cost too much included."""

    before: float
    worth: Scores
    steps: Tuple[Step, ...]
    kept_steps: int
    best: Pruned

    @property
    def removed(self) -> Tuple[Head, ...]:
        return self.steps[self.kept_steps - 1].removed if self.kept_steps else ()

    @property
    def after(self) -> float:
        return self.steps[self.kept_steps - 1].accuracy if self.kept_steps else self.before


def halves(class_ids: NDArray[np.int64]) -> Tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Two sets of indices, each in order: of each class every other image, the first half having one more where they are odd."""
    turns: Dict[int, int] = {}
    second = np.zeros(len(class_ids), dtype=np.bool_)
    for index, class_id in enumerate(class_ids.tolist()):
        second[index] = turns.get(class_id, 0) % 2 == 1
        turns[class_id] = turns.get(class_id, 0) + 1
    return np.flatnonzero(~second), np.flatnonzero(second)


def prune(
    weights: Arrays,
    shape: VitShape,
    image_size: int,
    class_tokens: int,
    shown: Lesson,
    held: Lesson,
    wish: Wish,
    watch: Watch,
    keep: Optional[Keep] = None,
) -> Outcome:
    """The backbone with as many heads fewer as the wish allows. weights, shape: as stored; they come back with the stored position grid.

    shown and held need two classes at least, the same ones, and shown two images of each. Every block keeps one head.
    keep: is given every step with its weights, which are many.
    """
    return _Rounds(weights, shape, image_size, class_tokens, shown, held, watch).run(wish, keep or (lambda step, pruned: None))


class _Rounds:
    """The state of one pruning: the whole backbone, and the one at hand with the base's numbers of its heads."""

    def __init__(
        self, weights: Arrays, shape: VitShape, image_size: int, class_tokens: int, shown: Lesson, held: Lesson, watch: Watch
    ) -> None:
        self.weights, self.shape, self.size, self.class_tokens = weights, shape, image_size, class_tokens
        self.shown, self.held, self.watch = shown, held, watch
        self.whole = Vit.from_weights(weights, shape, image_size)
        self.means: List[NDArray[np.float32]] = []
        self.features: NDArray[np.float32] = np.zeros((0, 0), np.float32)  # of the shown images, as the whole backbone gives them
        self.evidence: List[Evidence] = []  # of the whole backbone

    def run(self, wish: Wish, keep: Keep) -> Outcome:
        total = len(heads_in(self.shape))
        wanted = min(max(1, round(wish.share * total)), total - self.shape.depth)
        vit, kept = self.whole, 0
        gone: FrozenSet[Head] = frozenset()
        steps: List[Step] = []
        best = Pruned(dict(self.weights), self.shape)
        seen, before = self._ask(vit)
        self.means, self.features = seen.means, seen.features
        self.evidence = self._observed(vit, seen)
        first: Scores = []
        while len(gone) < wanted:
            count = min(wanted - len(gone), math.ceil(wanted / wish.rounds))
            scores, chosen = self._chosen(vit, wish.score, seen, gone, count)
            first = first or scores
            gone = gone | set(chosen)
            pruned = self._without(gone, wish)
            vit = Vit.from_weights(pruned.weights, pruned.shape, self.size)
            seen, accuracy = self._ask(vit)
            steps.append(Step(tuple(sorted(gone)), accuracy))
            keep(steps[-1], pruned)
            if before - accuracy > wish.max_cost:
                break
            best, kept = pruned, len(steps)
        return Outcome(before, first, tuple(steps), kept, best)

    def _ask(self, vit: Vit) -> Tuple[Seen, float]:
        """What the shown images give, and the accuracy on the held-out ones of the closed-form head fitted on the shown ones."""
        total = len(self.shown.pixels) + len(self.held.pixels)
        shown = see(vit, self.shown.pixels, self.class_tokens, self._counter("asking", total))
        held = see(vit, self.held.pixels, self.class_tokens, self._counter("asking", total, len(self.shown.pixels)))
        question = ask(_fitted(shown.features, self.shown.class_ids), self.held.class_ids)
        return shown, 100 * float(question.right(held.features).mean())

    def _chosen(self, vit: Vit, score: str, seen: Seen, gone: FrozenSet[Head], count: int) -> Tuple[Scores, List[Head]]:
        """What the heads at hand are worth, and which of them go, as the base numbers them."""
        if score != RESIDUAL:
            scores = self._worth(vit, score, seen)
            return scores, least(scores, self.shape, gone, count)
        evidence = self._observed(vit, seen) if gone else self.evidence
        left = _left(self.shape, gone)
        return alone(vit, evidence), [(block, left[block][head]) for block, head in cheapest(vit, evidence, count)]

    def _observed(self, vit: Vit, seen: Seen) -> List[Evidence]:
        pixels = self.shown.pixels[spread(len(self.shown.pixels), OBSERVED_IMAGES)]
        head = _fitted(seen.features, self.shown.class_ids)
        return observe(vit, pixels, self.class_tokens, head, self._counter("scoring heads", len(pixels)))

    def _worth(self, vit: Vit, score: str, seen: Seen) -> Scores:
        """Scores of the heads at hand; a head of its own is fitted on one half of the shown images and asked on the other."""
        fitted, asked = halves(self.shown.class_ids)
        question = ask(_fitted(seen.features[fitted], self.shown.class_ids[fitted]), self.shown.class_ids[asked])
        half = Seen(seen.features[asked], seen.means)
        return worth(score, vit, self.shown.pixels[asked], self.class_tokens, question, half, self._counter("scoring heads", len(asked)))

    def _without(self, gone: FrozenSet[Head], wish: Wish) -> Pruned:
        """Always cut from the whole backbone, so that repairs of repairs don't add up."""
        cut = without_heads(self.weights, self.shape, gone, self.means)
        vit = Vit.from_weights(cut.weights, cut.shape, self.size)
        if wish.repaired:
            pixels = self.shown.pixels[spread(len(self.shown.pixels), REPAIR_IMAGES)]
            repair(self.whole, vit, pixels, [each.stakes for each in self.evidence], self._counter("repairing", len(pixels)))
        if wish.epochs > 0:
            metric = _learned(self.features, self.shown.class_ids).metric()
            total = BATCH * steps_of(len(self.shown.pixels), wish.epochs)
            imitate(vit, self.shown.pixels, self.features, metric, wish.epochs, self._counter("imitating the whole", total))
        changed = {name: value.numpy() for name, value in vit.state_dict().items() if name.startswith(("blocks.", "norm."))}
        return Pruned({**cut.weights, **changed}, cut.shape)

    def _counter(self, doing: str, total: int, done: int = 0) -> Callable[[int], None]:
        at = [done]

        def count(images: int) -> None:
            at[0] += images
            self.watch(doing, at[0], total)

        return count


def spread(count: int, most: int) -> NDArray[np.int64]:
    """At most `most` of `count` indices, evenly spaced and in order."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(np.int64))


def ask(head: LinearHead, class_ids: NDArray[np.int64]) -> Question:
    """The question whether this head knows these classes; all of them must be its own."""
    column = {class_id: index for index, class_id in enumerate(head.class_ids)}
    return Question(head, np.array([column[class_id] for class_id in class_ids.tolist()], dtype=np.int64))


def _fitted(features: NDArray[np.float32], class_ids: NDArray[np.int64]) -> LinearHead:
    return _learned(features, class_ids).solve()


def _learned(features: NDArray[np.float32], class_ids: NDArray[np.int64]) -> RidgeSums:
    sums = RidgeSums(features.shape[1])
    sums.add(features, class_ids.tolist())
    return sums


def _left(shape: VitShape, gone: FrozenSet[Head]) -> List[List[int]]:
    """For each block the base's numbers of the heads that are left."""
    return [[head for head in range(count) if (block, head) not in gone] for block, count in enumerate(shape.heads)]


def least(scores: Scores, shape: VitShape, gone: FrozenSet[Head], count: int) -> List[Head]:
    """The `count` heads of least worth among those that are left, as the base numbers them; every block keeps one.

    scores: of the heads that are left, in order. Equal scores go by block and head, so that the same images prune the same heads.
    """
    left = _left(shape, gone)
    order = sorted((float(value), block, head) for block, row in enumerate(left) for value, head in zip(scores[block], row))
    room = [len(row) - 1 for row in left]
    chosen: List[Head] = []
    for _, block, head in order:
        if len(chosen) < count and room[block]:
            chosen.append((block, head))
            room[block] -= 1
    return chosen
