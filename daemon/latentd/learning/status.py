"""What the learner tells of itself: values that any thread may read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Dict, Optional

from latentd.replay.memory import ReplayMemory


@dataclass(frozen=True)
class LearnerStatus:
    """state: idle, learning, yielding, sleeping, waiting (for memory), failed, stopped. watermark_seq: the log up to here takes part in the
    published answers. device: where it computes, cpu or cuda; device_reason: why not on the one that was wanted.
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
    device: str = "cpu"
    device_reason: Optional[str] = None


@dataclass(frozen=True)
class MemoryStatus:
    """The replay memory, in samples and bytes; holdout_bytes is kept beside it."""

    slots: int
    used: int
    used_bytes: int
    budget_bytes: int
    evictions: int
    codec: str
    holdout_bytes: int
    classes: Dict[int, int]

    @staticmethod
    def of(memory: ReplayMemory, budget_bytes: int, codec: str, holdout_bytes: int) -> MemoryStatus:
        used = memory.used, memory.used_bytes
        return MemoryStatus(memory.slots, *used, budget_bytes, memory.evictions, codec, holdout_bytes, memory.counts())
