"""What an image costs in a stage: medians in turn, and joules only where they are known."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import List

import numpy as np
import pytest
from numpy.typing import NDArray

import tiny
from latentd.config import EnergyConfig
from latentd.energy.ledger import EnergyLedger, seconds_since_boot
from latentd.energy.meter_thread import MeterThread
from latentd.energy.meters import Choice, Reading
from latentd.engines.stage import Encoded, StageSpec
from latentd.learning import price


class Clock:
    """Seconds that pass only when a stage works."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Stage:
    """Takes a fixed time an image."""

    lanes = 1
    name = "fixed"
    spec = StageSpec("tiny", "0" * 64, tiny.SIZE, 3, 2, 128, 37)

    def __init__(self, clock: Clock, seconds: float, order: List[float]) -> None:
        self._clock, self._seconds, self._order = clock, seconds, order

    def encode(self, pixels: NDArray[np.uint8], tokens: bool = False, shared: bool = False) -> Encoded:
        assert len(pixels) == 1
        self._clock.now += self._seconds
        self._order.append(self._seconds)
        return Encoded(np.zeros((1, 256), np.float32), None)

    def close(self) -> None:
        """Nothing to give back."""


def test_stages_take_turns_and_the_median_of_each_counts() -> None:
    clock = Clock()
    order: List[float] = []
    stages = [Stage(clock, 0.5, order), Stage(clock, 0.25, order)]
    assert price.latencies_s(stages, tiny.pixels(2), rounds=5, clock=clock) == [0.5, 0.25]
    assert order == [0.5, 0.25] * (price.WARM_UP + 5)


def test_without_a_meter_the_joules_are_unknown_with_the_reason() -> None:
    clock = Clock()
    found = price.joules(Stage(clock, 0.5, []), tiny.pixels(2), EnergyConfig(meters=()), seconds=2.0, clock=clock)
    assert found == price.Joules(None, None, "no meter is configured (energy.meters is empty)")
    assert clock.now == 0, "nothing was computed for nothing"


@pytest.mark.parametrize("count", [1, 3])
def test_images_are_taken_in_turn_however_few(count: int) -> None:
    clock = Clock()
    assert price.latencies_s([Stage(clock, 0.125, [])], tiny.pixels(count), rounds=4, clock=clock) == [0.125]


class Sensor:
    """Ten watts, at any time; a stage can wait until it was read once more."""

    source, scope = "sensor", "everything"

    def __init__(self) -> None:
        self.was_read = threading.Event()

    def read(self) -> Reading:
        self.was_read.set()
        return Reading("sensor", "measured", seconds_since_boot(), power_w=10.0)

    def close(self) -> None:
        """Nothing to give back."""


def test_joules_are_those_of_the_meter_an_image(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sensor, clock = Sensor(), Clock()

    class Patient(Stage):
        def encode(self, pixels: NDArray[np.uint8], tokens: bool = False, shared: bool = False) -> Encoded:
            sensor.was_read.clear()
            assert sensor.was_read.wait(10)
            return super().encode(pixels, tokens, shared)

    def from_config(config: EnergyConfig, ledger: EnergyLedger) -> MeterThread:
        return MeterThread(ledger, lambda wait: Choice(sensor, {}), root=tmp_path, period_s=0.01)

    monkeypatch.setattr("latentd.learning.price.MeterThread.from_config", from_config)
    found = price.joules(Patient(clock, 1.0, []), tiny.pixels(2), EnergyConfig(), seconds=4.0, clock=clock)
    assert (found.source, found.reason) == ("sensor", None)
    assert found.value_j is not None and found.value_j > 0
