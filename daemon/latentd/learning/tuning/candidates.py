"""Candidates for the configuration, judged against limits: pure functions of what was measured. Nothing is measured here.

The rule of choice, in `recommend`:

1. A candidate is feasible when it keeps every stated limit and its replay memory holds at least one mini-batch.
2. Where accuracy was asked: of the feasible ones, the most accurate and all that are within its 95 % interval and, having answered the same
   questions, not worse than it beyond chance (one-sided sign test, 5 %). Of those the least memory, then the least latency, then the most
   bits; a tenth more of memory or latency counts as the same.
3. Where it was not: the split and tokens in force if they are feasible, else the deepest split; there the most slots, then the most bits,
   then the least memory, then the least latency: accuracy that nobody measured is not traded for anything.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Callable, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from latentd.config import rows
from latentd.learning.accuracy import Score
from latentd.learning.floor import HELD_SHARE
from latentd.replay.memory import slot_bytes

CHANCE_Z = 1.64  # standard deviations of a fair coin: 5 % one-sided
FEATURES_EACH = 4  # samples that are kept as features for each that is kept with its tokens
SAME = 1.1  # costs that differ by less are alike: no measurement here is finer
LEAST_REPLAY_BYTES = next(int(row.low) for row in rows() if row.key == "learn.replay_bytes" and row.low is not None)


@dataclass(frozen=True)
class Limits:
    """What the configuration must keep; None: no limit. memory_bytes: all that learning takes, replay memory included."""

    memory_bytes: Optional[int] = None
    latency_s: Optional[float] = None
    power_w: Optional[float] = None


class HoldOut(NamedTuple):
    """Latents kept out of training beside those in the replay memory: one in `every` (0: none), `most` of all classes together, with
    `each_bytes` for one."""

    every: int
    most: int
    each_bytes: int

    def latents(self, slots: int) -> int:
        """How many there are when the replay memory is just full."""
        return 0 if self.every < 1 else min(self.most, slots if self.every == 1 else slots // (self.every - 1))


@dataclass(frozen=True)
class Candidate:
    """One choice of split, tokens and codec, with what it costs and gives here.

    token_grid: 0 all tokens; otherwise patches pooled to such a grid. tokens: stored of a latent; 0 where the head alone learns. codec,
    codec_kind: of the tokens where they are stored, else of the features. latent_bytes: one latent's code; features_bytes: of its features
    alone. slot_bytes: the code with its place in the replay memory; with tokens, what `whole_slot_bytes` says. fixed_bytes: learning's
    memory besides replay memory and hold-out. slots: latents that the replay memory gets. microbatch: of its training step. latency_s: one
    image to its answer. step_s: one mini-batch, decoding included. power_w: the most that answering or stepping draws on average. right:
    which of the questions it answered rightly, None with its accuracy.
    """

    split: int
    token_grid: int
    tokens: int
    codec: str
    codec_kind: str
    latent_bytes: int
    features_bytes: int
    slot_bytes: int
    fixed_bytes: int
    slots: int
    holdout: HoldOut
    microbatch: int
    latency_s: float
    step_s: float
    power_w: Optional[float] = None
    image_j: Optional[float] = None
    step_j: Optional[float] = None
    accuracy: Optional[Score] = None
    right: Optional[Tuple[bool, ...]] = None

    @property
    def bits(self) -> int:
        return int(self.codec.lstrip("intfp"))

    @property
    def replay_bytes(self) -> int:
        return max(LEAST_REPLAY_BYTES, self.slots * self.slot_bytes)

    @property
    def learning_bytes(self) -> int:
        return self.bytes_with(self.slots)

    def bytes_with(self, slots: int) -> int:
        """All of learning's memory with so many slots: what is fixed, the replay memory, and the hold-out beside it."""
        return self.fixed_bytes + max(LEAST_REPLAY_BYTES, slots * self.slot_bytes) + self.holdout.latents(slots) * self.holdout.each_bytes

    def __str__(self) -> str:
        what = f"split {self.split}" if not self.tokens else f"split {self.split} with {self.tokens} tokens"
        return f"{what}, {self.codec if self.codec.startswith('fp') else f'{self.codec} {self.codec_kind}'}"


class Fault(NamedTuple):
    """A limit that is not kept: in words, and how many times over it is."""

    reason: str
    times: float


class Recommendation(NamedTuple):
    """choice: None where no candidate is feasible; `nearest` is then the one that is the least over. reason: one sentence."""

    choice: Optional[Candidate]
    reason: str
    nearest: Optional[Candidate] = None


def slots_within(memory_bytes: Optional[int], wanted: int, total_bytes: Callable[[int], int]) -> int:
    """The most slots, up to `wanted`, with which learning's memory keeps the limit. total_bytes: of so many slots; it grows with them."""
    if memory_bytes is None or total_bytes(wanted) <= memory_bytes:
        return wanted
    fits, too_many = 0, wanted
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if total_bytes(middle) <= memory_bytes:
            fits = middle
        else:
            too_many = middle
    return fits


def faults(candidate: Candidate, limits: Limits, least_slots: int) -> List[Fault]:
    """What keeps a candidate from being feasible; empty where nothing does. A power that nobody measured keeps no limit."""
    found: List[Fault] = []
    count = max(candidate.slots, least_slots)
    needed = candidate.bytes_with(count)
    if limits.memory_bytes is not None and needed > limits.memory_bytes:
        detail = f"with {count} latents learning takes {_mb(needed)}, the limit is {_mb(limits.memory_bytes)}"
        found.append(Fault(detail, needed / limits.memory_bytes))
    if limits.latency_s is not None and candidate.latency_s > limits.latency_s:
        detail = f"an answer takes {1e3 * candidate.latency_s:.1f} ms, the limit is {1e3 * limits.latency_s:g} ms"
        found.append(Fault(detail, candidate.latency_s / limits.latency_s))
    if limits.power_w is not None and candidate.power_w is None:
        found.append(Fault(f"its power is unknown, the limit is {limits.power_w:g} W", float("inf")))
    elif limits.power_w is not None and candidate.power_w is not None and candidate.power_w > limits.power_w:
        found.append(Fault(f"it draws {candidate.power_w:.1f} W, the limit is {limits.power_w:g} W", candidate.power_w / limits.power_w))
    return found


def recommend(candidates: Sequence[Candidate], limits: Limits, least_slots: int, in_force: Tuple[int, int]) -> Recommendation:
    """The choice by the rule in the module docstring. in_force: split and token_grid of the present configuration."""
    feasible = [candidate for candidate in candidates if not faults(candidate, limits, least_slots)]
    if not feasible:
        return _none(candidates, limits, least_slots)
    asked = [candidate for candidate in feasible if candidate.accuracy is not None and candidate.accuracy.count]
    return _by_accuracy(asked) if asked else _without_accuracy(feasible, in_force)


def _by_accuracy(asked: Sequence[Candidate]) -> Recommendation:
    best = max(asked, key=_cheapest_first(lambda candidate: _ratio(candidate)))
    equals = [candidate for candidate in asked if _as_good(candidate, best)]
    choice = _least(equals)
    if choice is best and len(equals) == 1:
        return Recommendation(choice, f"it is the most accurate of the feasible ones ({_percent(best)}), beyond chance.")
    reason = f"{len(equals)} feasible candidates are as accurate as the best within chance ({best}: {_percent(best)}); it needs the least."
    return Recommendation(choice, reason)


def _without_accuracy(feasible: Sequence[Candidate], in_force: Tuple[int, int]) -> Recommendation:
    kept = [candidate for candidate in feasible if (candidate.split, candidate.token_grid if candidate.tokens else 0) == in_force]
    deepest = max(candidate.split for candidate in feasible)
    pool = kept or [candidate for candidate in feasible if candidate.split == deepest]
    choice = min(pool, key=lambda candidate: (-candidate.slots, -candidate.bits, *_cost(candidate)))
    place = "at the split in force" if kept else "at the deepest feasible split"
    return Recommendation(choice, f"nothing is known of accuracy, so it is the most latents, then the most bits, {place}.")


def _none(candidates: Sequence[Candidate], limits: Limits, least_slots: int) -> Recommendation:
    if not candidates:
        return Recommendation(None, "no candidate was measured.")
    worst = {id(candidate): max(fault.times for fault in faults(candidate, limits, least_slots)) for candidate in candidates}
    nearest = min(candidates, key=lambda candidate: (worst[id(candidate)], *_cost(candidate)))
    reasons = "; ".join(fault.reason for fault in faults(nearest, limits, least_slots))
    return Recommendation(None, f"no candidate keeps the limits. The nearest is {nearest}: {reasons}.", nearest)


def _as_good(candidate: Candidate, best: Candidate) -> bool:
    low = best.accuracy.low if best.accuracy is not None else None
    if low is None or _ratio(candidate) < low:
        return False
    if candidate.right is None or best.right is None or len(candidate.right) != len(best.right):
        return True
    losses = sum(theirs and not mine for mine, theirs in zip(candidate.right, best.right))
    gains = sum(mine and not theirs for mine, theirs in zip(candidate.right, best.right))
    return losses - gains <= CHANCE_Z * math.sqrt(losses + gains)


def _least(equals: Sequence[Candidate]) -> Candidate:
    """The one that needs the least, where a tenth more is the same: bits are not given up for next to nothing."""
    least_memory = min(candidate.learning_bytes for candidate in equals)
    small = [candidate for candidate in equals if candidate.learning_bytes <= SAME * least_memory]
    least_latency = min(candidate.latency_s for candidate in small)
    quick = [candidate for candidate in small if candidate.latency_s <= SAME * least_latency]
    return min(quick, key=lambda candidate: (-candidate.bits, *_cost(candidate)))


def _cheapest_first(key: Callable[[Candidate], float]) -> Callable[[Candidate], Tuple[float, ...]]:
    """Sorts by the key, and among equals the cheapest is the greatest."""
    return lambda candidate: (key(candidate), *(-cost for cost in _cost(candidate)))


def _cost(candidate: Candidate) -> Tuple[float, float, float]:
    return candidate.learning_bytes, candidate.latency_s, candidate.step_s


def _ratio(candidate: Candidate) -> float:
    return (candidate.accuracy.ratio if candidate.accuracy is not None else None) or 0.0


def _percent(candidate: Candidate) -> str:
    return f"{100 * _ratio(candidate):.1f} %"


def _mb(size_bytes: float) -> str:
    return f"{size_bytes / 1e6:.1f} MB"


def settings_of(candidate: Candidate, depth: int) -> Mapping[str, object]:
    """The configuration's keys that make this candidate, with their values. depth: of the backbone; it is written as 0."""
    alike = {"backbone.split": 0 if candidate.split == depth else candidate.split, "learn.microbatch": candidate.microbatch}
    if not candidate.tokens:
        own = {"learn.codec": candidate.codec, "learn.codec_kind": candidate.codec_kind, "learn.replay_bytes": candidate.replay_bytes}
        return {**alike, "learn.token_grid": 0, **own}
    features = FEATURES_EACH * slot_bytes(candidate.features_bytes)
    return {
        **alike,
        "learn.token_grid": candidate.token_grid,
        "learn.token_codec": candidate.codec,
        "learn.token_codec_kind": candidate.codec_kind,
        "learn.token_bytes": max(LEAST_REPLAY_BYTES, candidate.slots * (candidate.slot_bytes - features)),
        "learn.replay_bytes": max(LEAST_REPLAY_BYTES, candidate.slots * features),
    }


def whole_slot_bytes(code_bytes: int, features_bytes: int) -> int:
    """Of one latent with its tokens, with the part of their budget that is the hold-out's, and of the features of those beside it that lost
    theirs."""
    share = HELD_SHARE / (HELD_SHARE - 1)
    return math.ceil(share * slot_bytes(code_bytes)) + FEATURES_EACH * slot_bytes(features_bytes)
