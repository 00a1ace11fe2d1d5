"""What images cost in a frozen stage: latency of one image alone, and joules where a meter reads. Blocks whoever asks for some seconds."""

from __future__ import annotations

import statistics
import time
from typing import Callable, List, NamedTuple, Optional, Sequence

from latentd.config import EnergyConfig
from latentd.energy.ledger import EnergyLedger
from latentd.energy.meter_thread import MeterThread
from latentd.engines.stage import FrozenStage
from latentd.learning.redundancy import Pixels

WARM_UP = 3
ROUNDS = 30
ENERGY_S = 3.0


class Joules(NamedTuple):
    """Joules an image, or None and the reason. source: the meter."""

    value_j: Optional[float]
    source: Optional[str]
    reason: Optional[str]


def latencies_s(
    stages: Sequence[FrozenStage], pixels: Pixels, rounds: int = ROUNDS, clock: Callable[[], float] = time.perf_counter
) -> List[float]:
    """Median seconds of one image alone in each stage. They take turns, so that whatever else the machine does falls on all of them."""
    taken: List[List[float]] = [[] for _ in stages]
    for turn in range(WARM_UP + rounds):
        image = pixels[turn % len(pixels)][None]
        for stage, seconds in zip(stages, taken):
            started = clock()
            stage.encode(image)
            seconds.append(clock() - started)
    return [statistics.median(seconds[WARM_UP:]) for seconds in taken]


def joules(
    stage: FrozenStage, pixels: Pixels, config: EnergyConfig, seconds: float = ENERGY_S, clock: Callable[[], float] = time.monotonic
) -> Joules:
    """Joules of one image, as a mean over `seconds` of one image after the other, idle power included."""
    ledger = EnergyLedger(period_s=config.period_s, gap_s=config.gap_s)
    meters = MeterThread.from_config(config, ledger)
    meters.tick()  # here, so that what becomes of the meters is known before the first image
    if ledger.report().meter.source is None:
        return Joules(None, None, ledger.report().meter.reason)
    meters.start()
    try:
        until = clock() + seconds
        turn = 0
        while clock() < until:
            with ledger.activity("classify", images=1):
                stage.encode(pixels[turn % len(pixels)][None])
            turn += 1
    finally:
        meters.stop()
    report = ledger.report()
    value_j = report.activities["classify"].per_item_j
    reason = None if value_j is not None else report.meter.reason or "the meter gave too few readings"
    return Joules(value_j, report.source if value_j is not None else None, reason)
