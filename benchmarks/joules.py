"""Joules of learning in a benchmark: latentd's own ledger and meter thread around the work; null with the reason where no meter reads.

A meter measures the whole machine: figures mean something only while one run is at work at a time.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Dict, Optional, Type

from latentd.config import EnergyConfig
from latentd.energy.ledger import Activity, EnergyLedger
from latentd.energy.meter_thread import MeterThread
from latentd.energy.meters import choose_meter

logging.getLogger("latentd").addHandler(logging.NullHandler())  # that there is no meter is told once, by the result


def reads(energy: EnergyConfig) -> bool:
    """Whether any configured meter gives a reading on this machine."""
    deadline = time.monotonic() + 5.0
    choice = choose_meter(energy.meters, Path("/"), clock=time.monotonic, wait=lambda seconds: _waited(seconds, deadline))
    if choice.meter is not None:
        choice.meter.close()
    return choice.meter is not None


class LearningEnergy:
    """Joules between entering and leaving, split into learning and the rest."""

    def __init__(self, energy: EnergyConfig) -> None:
        self._ledger = EnergyLedger(period_s=energy.period_s, gap_s=energy.gap_s)
        self._thread = MeterThread.from_config(energy, self._ledger)

    def __enter__(self) -> LearningEnergy:
        self._thread.start()
        return self

    def __exit__(self, kind: Optional[Type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]) -> None:
        self._thread.stop()

    def learning(self, samples: int) -> Activity:
        """Marks the body of a `with` as the learning of so many samples."""
        return self._ledger.activity("learn", samples=samples)

    def figures(self) -> Dict[str, Any]:
        """JSON values: joules of learning, of one sample, above idle; all None, with the reason, where nothing was read."""
        report = self._ledger.report()
        learned = report.activities["learn"]
        return {
            "learn_j": learned.energy_j,
            "learn_above_idle_j": learned.above_idle_j,
            "per_sample_j": learned.per_item_j,
            "source": report.source,
            "quality": report.quality,
            "reason": report.meter.reason if learned.energy_j is None else None,
        }


def _waited(seconds: float, deadline: float) -> bool:
    """Waits; True when it was long enough."""
    time.sleep(seconds)
    return time.monotonic() >= deadline
