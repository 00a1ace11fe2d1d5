"""What the learner tells of itself: values that any thread may read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Dict, Optional


@dataclass(frozen=True)
class LearnerStatus:
    """state: idle, learning, yielding, sleeping, failed, stopped. watermark_seq: the log up to here takes part in the published answers."""

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
