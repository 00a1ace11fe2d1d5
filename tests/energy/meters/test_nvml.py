from __future__ import annotations

from typing import TYPE_CHECKING, Any, Dict, List

import pytest

from latentd.energy.meters.nvml import NvmlMeter
from latentd.errors import MeterUnavailable

if TYPE_CHECKING:
    from energy.conftest import Clock


class NVMLError(Exception):
    def __init__(self, value: int) -> None:
        super().__init__(f"error {value}")
        self.value = value


class FakeNvml:
    """The few functions of pynvml that are used. A card is (millijoules, milliwatts), None: not supported; fails: function -> code."""

    NVMLError = NVMLError

    def __init__(self, *cards: Any, fails: Dict[str, int] | None = None) -> None:
        self.cards, self.fails = list(cards), fails or {}
        self.calls: List[str] = []

    def _enter(self, function: str) -> None:
        self.calls.append(function)
        if function in self.fails:
            raise NVMLError(self.fails[function])

    def nvmlInit(self) -> None:  # noqa: N802
        self._enter("nvmlInit")

    def nvmlShutdown(self) -> None:  # noqa: N802
        self._enter("nvmlShutdown")

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        self._enter("nvmlDeviceGetCount")
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        self._enter("nvmlDeviceGetHandleByIndex")
        if index >= len(self.cards):
            raise NVMLError(2)
        return index

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:  # noqa: N802
        self._enter("nvmlDeviceGetTotalEnergyConsumption")
        return self._value(handle, 0)

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:  # noqa: N802
        self._enter("nvmlDeviceGetPowerUsage")
        return self._value(handle, 1)

    def _value(self, handle: int, which: int) -> int:
        value = self.cards[handle][which]
        if value is None:
            raise NVMLError(3)
        return int(value)


def meter(clock: Clock, nvml: FakeNvml, gpus: List[int] | None = None) -> NvmlMeter:
    return NvmlMeter(clock, gpus, load=lambda: nvml)


def test_the_energy_counters_of_all_cards_are_summed_in_joules(clock: Clock) -> None:
    reading = meter(clock, FakeNvml((5_000, 1), (2_500, 1))).read()
    assert (reading.source, reading.quality, reading.at_s) == ("nvml", "measured", clock.now_s)
    assert (reading.energy_j, reading.power_w) == (7.5, None)
    assert reading.rails_j == {"gpu0": 5.0, "gpu1": 2.5}


def test_only_the_chosen_cards_count(clock: Clock) -> None:
    chosen = meter(clock, FakeNvml((5_000, 1), (2_500, 1)), gpus=[1])
    assert chosen.read().rails_j == {"gpu1": 2.5}
    assert "gpu1" in chosen.scope
    assert "gpu0" not in chosen.scope


def test_where_one_card_has_no_counter_the_power_of_all_is_an_estimate(clock: Clock) -> None:
    reading = meter(clock, FakeNvml((5_000, 60_000), (None, 40_500))).read()
    assert (reading.quality, reading.power_w, reading.energy_j) == ("estimated", 100.5, None)
    assert reading.rails_w == {"gpu0": 60.0, "gpu1": 40.5}


def test_without_the_binding_the_reason_says_what_to_install(clock: Clock) -> None:
    def load() -> Any:
        raise ImportError("No module named 'pynvml'")

    with pytest.raises(MeterUnavailable, match="pip install nvidia-ml-py"):
        NvmlMeter(clock, load=load)


@pytest.mark.parametrize(
    ("code", "words"),
    [(12, "NVML library not found"), (9, "driver is not loaded"), (1, "NVML: error 1"), (4, "permission"), (999, "NVML: error 999")],
)
def test_every_failure_to_start_is_a_reason(clock: Clock, code: int, words: str) -> None:
    with pytest.raises(MeterUnavailable, match=words):
        meter(clock, FakeNvml((1, 1), fails={"nvmlInit": code}))


def test_a_card_that_reports_nothing_is_refused_and_the_library_is_given_back(clock: Clock) -> None:
    nvml = FakeNvml((None, None))
    with pytest.raises(MeterUnavailable, match="neither its energy nor its power"):
        meter(clock, nvml)
    assert nvml.calls[-1] == "nvmlShutdown"


def test_a_machine_without_cards_is_refused(clock: Clock) -> None:
    with pytest.raises(MeterUnavailable, match="NVML sees no graphics card"):
        meter(clock, FakeNvml())


def test_a_card_number_that_does_not_exist_is_refused(clock: Clock) -> None:
    with pytest.raises(MeterUnavailable, match="no graphics card of that number"):
        meter(clock, FakeNvml((1, 1)), gpus=[3])


def test_a_card_that_is_lost_later_makes_the_meter_unavailable(clock: Clock) -> None:
    nvml = FakeNvml((1, 1))
    served = meter(clock, nvml)
    nvml.fails["nvmlDeviceGetTotalEnergyConsumption"] = 15
    with pytest.raises(MeterUnavailable, match="fell off the bus"):
        served.read()


def test_closing_survives_a_library_that_is_gone(clock: Clock) -> None:
    nvml = FakeNvml((1, 1), fails={"nvmlShutdown": 1})
    meter(clock, nvml).close()
    assert nvml.calls[-1] == "nvmlShutdown"


def test_the_real_binding_without_a_driver_gives_a_reason_or_a_reading(clock: Clock) -> None:
    pytest.importorskip("pynvml")
    try:
        real = NvmlMeter(clock)
    except MeterUnavailable as refused:
        outcome = refused.detail
    else:
        outcome = real.read().quality
        real.close()
    assert outcome in ("measured", "estimated") or len(outcome) > 10
