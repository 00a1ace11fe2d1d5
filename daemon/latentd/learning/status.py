"""What the learner tells of itself: values that any thread may read, and who hears of its steps."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field
from typing import Any, Dict, Optional, Protocol, Tuple

from latentd.learning.gate import Verdict
from latentd.replay.memory import DOUBTED, ReplayMemory


class LearnerObserver(Protocol):
    """What the metrics hear of the learner; called on its thread."""

    def step(self, seconds: float) -> None: ...
    def published(self, cause: str) -> None: ...
    def rejected(self, reason: str) -> None: ...
    def evicted(self, count: int) -> None: ...
    def waited(self, cause: str, seconds: float) -> None: ...


@dataclass(frozen=True)
class LearnerStatus:
    """state: idle, learning, yielding, waiting, sleeping, failed, stopped. watermark_seq: the log up to here takes part in the published
    answers. waited_s: seconds that it waited for power, temperature, throttling, memory or building, so far.
    device: where it computes, cpu or cuda; device_reason: why not on the one that was wanted.
    """

    state: str
    reason: Optional[str]
    watermark_seq: int
    lag_samples: int
    lag_s: float
    steps: int
    last_step_s: Optional[float]
    deaths: int
    last_publish_rejected: Optional[str]
    gate: Dict[str, Any]
    waited_s: Dict[str, float] = field(default_factory=dict)
    device: str = "cpu"
    device_reason: Optional[str] = None


@dataclass(frozen=True)
class TokensStatus:
    """Samples that still have their tokens, in samples and bytes."""

    slots: int
    used: int
    used_bytes: int
    budget_bytes: int


@dataclass(frozen=True)
class MemoryStatus:
    """The replay memory, in samples and bytes; holdout_bytes is kept beside it. doubted: ids whose label looks wrong, ascending. tokens:
    None where only the head learns.
    """

    slots: int
    used: int
    used_bytes: int
    budget_bytes: int
    evictions: int
    codec: str
    holdout_bytes: int
    classes: Dict[int, int]
    doubted: Tuple[str, ...] = ()
    tokens: Optional[TokensStatus] = None

    def doubts(self, sample_id: str) -> bool:
        """Whether the label of this sample looks wrong; asked for every sample of a page, so it looks at few."""
        place = bisect_left(self.doubted, sample_id)
        return place < len(self.doubted) and self.doubted[place] == sample_id

    def doubted_after(self, sample_id: str, count: int) -> Tuple[Tuple[str, ...], bool]:
        """Up to `count` ids beyond this one ("": from the first), and whether more follow."""
        start = bisect_right(self.doubted, sample_id)
        return self.doubted[start : start + count], start + count < len(self.doubted)


def gate_facts(verdict: Verdict) -> Dict[str, Any]:
    """What the gate decided about the newest version, for whoever asks why."""
    return {
        "reason": verdict.reason,
        "trained_weight": verdict.weight,
        "temperature": verdict.temperature,
        "holdout": verdict.holdout,
        "floor_correct": verdict.floor_correct,
        "candidate_correct": verdict.candidate_correct,
        "negative_flips": verdict.negative_flips,
        "positive_flips": verdict.positive_flips,
        "negative_flips_allowed": verdict.flips_allowed,
    }


def memory_status(memory: ReplayMemory, whole: Optional[ReplayMemory], holdout_bytes: int, codec: str) -> MemoryStatus:
    """whole: the samples with their tokens."""
    tokens = None if whole is None else TokensStatus(whole.slots, whole.used, whole.used_bytes, whole.budget_bytes)
    return MemoryStatus(
        memory.slots,
        memory.used,
        memory.used_bytes,
        memory.budget_bytes,
        memory.evictions,
        codec,
        holdout_bytes,
        memory.counts(),
        memory.ids_of(DOUBTED),
        tokens,
    )
