"""The GPU's own energy counter against its power, integrated as the ledger integrates it."""

from __future__ import annotations

import time
from typing import List

import pytest
import torch

from latentd.energy.integral import Integral, Point
from latentd.energy.meters.nvml import NvmlMeter
from latentd.energy.meters.reading import Reading
from latentd.errors import MeterUnavailable

pytestmark = pytest.mark.device
SECONDS = 15.0  # the driver's power is a moving average: the edges of the load must not weigh much
TOLERANCE = 0.1


def opened() -> NvmlMeter:
    try:
        return NvmlMeter(time.monotonic)
    except MeterUnavailable as absent:
        pytest.skip(f"NVML: {absent.detail}")


def joules(readings: List[Reading]) -> float:
    integral, total = Integral(), 0.0
    for reading in readings:
        total += integral.step(Point(reading.at_s, reading.power_w, reading.energy_j), 2.0) or 0.0
    return total


def test_the_energy_counter_agrees_with_the_integral_of_power() -> None:
    counter, power = opened(), opened()
    if counter.read().quality != "measured":
        pytest.skip("this GPU counts no joules (before Volta), so there is nothing to compare")
    power._has_counter = False
    counted: List[Reading] = []
    integrated: List[Reading] = []
    matrix = torch.randn(4096, 4096, device="cuda")
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        for _ in range(4):
            matrix = (matrix @ matrix).clamp_(-1, 1)
        torch.cuda.synchronize()
        counted.append(counter.read())
        integrated.append(power.read())
    counter.close()
    power.close()
    assert joules(counted) > 0
    assert joules(integrated) == pytest.approx(joules(counted), rel=TOLERANCE)
