"""The running parts of one daemon, as the routes see them. Built by the supervisor; tests build it from fakes."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Callable, Dict, Mapping, Optional, Set, Tuple

from starlette.requests import Request

from latentd import headroom
from latentd.energy.board import Board
from latentd.headroom import Headroom
from latentd.service.batcher import Batcher
from latentd.service.bodies import PendingBytes
from latentd.service.memory_plan import MemoryPlan
from latentd.service.metrics import Metrics
from latentd.service.pipeline import Pipeline
from latentd.service.readiness import Readiness

if TYPE_CHECKING:
    from latentd.config import Config
    from latentd.energy.ledger import EnergyLedger
    from latentd.engines.choose import Choice
    from latentd.learning.learner import Learner
    from latentd.replay.journal import Journal
    from latentd.replay.latents import LatentCodec


@dataclass
class Parts:
    """Everything a request can reach.

    room_at_start_bytes: what this process could have of the memory before it loaded anything. restrain: has the learner keep to the limits
    of this configuration. open_connections: how many the server holds. keys_in_flight: the Idempotency-Key of each request that still
    runs. needs_restart: keys whose values in the configuration files are not those in force.
    """

    config: Config
    choice: Choice
    pipeline: Pipeline
    journal: Journal
    learner: Learner
    ledger: EnergyLedger
    codec: LatentCodec
    metrics: Metrics
    readiness: Readiness
    pending: PendingBytes
    temperatures_c: Callable[[], Mapping[str, Optional[float]]]
    board: Callable[[], Board] = Board
    battery_charge: Callable[[], Optional[float]] = lambda: None
    memory_plan: MemoryPlan = field(default_factory=MemoryPlan)
    room_at_start_bytes: Optional[int] = None
    headroom: Callable[[], Headroom] = lambda: headroom.read()
    restrain: Callable[[Config], None] = lambda config: None
    open_connections: Callable[[], int] = lambda: 0
    needs_restart: Tuple[str, ...] = ()
    started_on: float = field(default_factory=time.monotonic)
    keys_in_flight: Set[str] = field(default_factory=set)

    @property
    def batcher(self) -> Batcher:
        return self.pipeline.batcher

    def queues(self) -> Dict[str, Tuple[int, int]]:
        """Every queue: how many items wait, and how many may."""
        journal = self.journal.status()
        return {
            "inference": (self.batcher.depth, self.batcher.capacity),
            "journal": (journal.queue_depth, journal.queue_capacity),
            "learner": (self.learner.status().lag_samples, self.config.learn.max_lag_samples),
            "body_bytes": (self.pending.held, self.pending.capacity),
        }


def parts_of(request: Request) -> Parts:
    parts: Parts = request.app.state.parts
    return parts
