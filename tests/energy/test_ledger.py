from __future__ import annotations

import json
import math
import threading
from typing import TYPE_CHECKING, Any, Optional

import pytest

from latentd.energy.ledger import EnergyLedger
from latentd.energy.marks import MAX_PENDING
from latentd.energy.meters.reading import Quality, Reading

if TYPE_CHECKING:
    from energy.conftest import Clock

WALL_S = 1_700_000_000.0


class Bench:
    """A ledger with a clock that only the test moves, and a meter in its hand."""

    def __init__(self, clock: Clock, source: str = "ina3221", quality: Quality = "measured", carried: Any = None) -> None:
        self.clock, self.source, self.quality = clock, source, quality
        self.boot_s = WALL_S - clock.now_s
        self.ledger = EnergyLedger(clock=clock, wall=lambda: self.boot_s + clock.now_s, carried=carried)
        self.ledger.serving(source, "everything", {})

    def read(self, power_w: Optional[float] = None, counter_j: Optional[float] = None, **rails_w: float) -> None:
        self.ledger.add(Reading(self.source, self.quality, self.clock.now_s, power_w, counter_j, rails_w))

    def run(self, seconds: float, power_w: float = 10.0, **rails_w: float) -> None:
        """So many seconds of constant power, read once a second."""
        for _ in range(int(seconds)):
            self.clock.now_s += 1.0
            self.read(power_w, **rails_w)


@pytest.fixture
def bench(clock: Clock) -> Bench:
    started = Bench(clock)
    started.read(10.0)
    return started


def test_before_any_reading_everything_is_unknown_and_not_zero(clock: Clock) -> None:
    ledger = EnergyLedger(clock=clock)
    ledger.unavailable("no sensor", {"ina3221": "no sensor"})
    clock.now_s += 100
    with ledger.activity("classify", images=3):
        clock.now_s += 1
    ledger.unavailable("no sensor", {"ina3221": "no sensor"})
    report = ledger.report()
    assert (report.energy_j, report.above_idle_j, report.unattributed_j, report.idle_w, report.meter.power_w) == (None,) * 5
    assert (report.quality, report.source, report.meter.reason, report.is_up) == ("unavailable", None, "no sensor", False)
    assert (report.covered_s, report.gap_s, report.gaps) == (0.0, 0.0, 0)
    assert {(activity.energy_j, activity.per_item_j) for activity in report.activities.values()} == {(None, None)}
    assert report.activities["classify"].count == 3
    assert ledger.image_energy() == (None, "unavailable", None)
    assert ledger.power_w is None


def test_one_reading_is_a_power_but_not_yet_an_energy(bench: Bench) -> None:
    report = bench.ledger.report()
    assert (report.energy_j, report.meter.power_w, report.is_up, report.source) == (None, 10.0, True, "ina3221")


def test_idle_time_is_idle_energy(bench: Bench) -> None:
    bench.run(10)
    report = bench.ledger.report()
    assert report.energy_j == pytest.approx(100.0)
    assert report.activities["idle"].energy_j == pytest.approx(100.0)
    assert report.activities["classify"].energy_j == 0.0
    assert (report.covered_s, report.quality, report.source) == (10.0, "measured", "ina3221")


def test_a_mark_inside_an_interval_gets_its_exact_share_of_time(bench: Bench) -> None:
    bench.clock.now_s += 0.25
    with bench.ledger.activity("classify", images=2):
        bench.clock.now_s += 0.5
    bench.clock.now_s += 0.25
    bench.read(10.0)
    report = bench.ledger.report()
    assert report.activities["classify"].energy_j == pytest.approx(5.0)
    assert report.activities["idle"].energy_j == pytest.approx(5.0)
    assert (report.activities["classify"].count, report.activities["classify"].per_item_j) == (2, 2.5)


def test_a_mark_after_the_sensor_was_read_belongs_to_the_next_interval(bench: Bench) -> None:
    bench.clock.now_s += 1.0
    read_at_s = bench.clock.now_s
    bench.clock.now_s += 0.2  # the reading travels; meanwhile work begins
    with bench.ledger.activity("learn", samples=1):
        bench.ledger.add(Reading("ina3221", "measured", read_at_s, 10.0))
        assert bench.ledger.report().activities["learn"].energy_j == 0.0
        bench.clock.now_s += 0.8
    bench.read(10.0)
    assert bench.ledger.report().activities["learn"].energy_j == pytest.approx(8.0)


def test_simultaneous_marks_share_each_moment_equally(bench: Bench) -> None:
    classify, learn = bench.ledger.activity("classify", images=1), bench.ledger.activity("learn", samples=1)
    with classify:
        bench.clock.now_s += 0.2
        with learn:
            bench.clock.now_s += 0.6
        bench.clock.now_s += 0.2
    bench.read(10.0)
    report = bench.ledger.report()
    assert report.activities["classify"].energy_j == pytest.approx(7.0)
    assert report.activities["learn"].energy_j == pytest.approx(3.0)
    assert report.activities["idle"].energy_j == 0.0


def test_marks_from_other_threads_count(bench: Bench) -> None:
    begun, finish = threading.Event(), threading.Event()

    def work() -> None:
        with bench.ledger.activity("learn", samples=4):
            begun.set()
            finish.wait(10)

    thread = threading.Thread(target=work)
    thread.start()
    assert begun.wait(10)
    bench.run(2)
    finish.set()
    thread.join(10)
    bench.run(1)
    learn = bench.ledger.report().activities["learn"]
    assert (learn.energy_j, learn.count, learn.per_item_j) == (20.0, 4, 5.0)


def test_work_that_fails_costs_joules_but_makes_no_images(bench: Bench) -> None:
    def work() -> None:
        with bench.ledger.activity("classify", images=5):
            bench.clock.now_s += 1.0
            raise RuntimeError("engine failed")

    with pytest.raises(RuntimeError, match="engine failed"):
        work()
    bench.read(10.0)
    classify = bench.ledger.report().activities["classify"]
    assert (classify.energy_j, classify.count, classify.per_item_j) == (10.0, 0, None)
    bench.run(1)
    assert bench.ledger.report().activities["idle"].energy_j == pytest.approx(10.0)


def test_a_gap_is_counted_and_not_bridged(bench: Bench) -> None:
    bench.run(3)
    bench.clock.now_s += 60
    bench.read(10.0)
    bench.run(3)
    report = bench.ledger.report()
    assert (report.energy_j, report.covered_s) == (60.0, 6.0)
    assert (report.gap_s, report.gaps) == (60.0, 1)


def test_a_failed_meter_is_one_gap_however_often_it_is_tried(bench: Bench) -> None:
    bench.run(3)
    for _ in range(4):
        bench.clock.now_s += 5
        bench.ledger.unavailable("the sensor is gone")
    bench.clock.now_s += 5
    bench.ledger.serving("ina3221", "everything", {})
    bench.read(10.0)
    bench.run(2)
    report = bench.ledger.report()
    assert (report.gap_s, report.gaps, report.covered_s, report.energy_j) == (25.0, 1, 5.0, 50.0)
    assert report.is_up


def test_while_the_meter_is_down_old_joules_stay_and_new_ones_are_unknown(bench: Bench) -> None:
    with bench.ledger.activity("classify", images=1):
        bench.run(1)
    bench.run(1)
    bench.ledger.unavailable("the sensor is gone", {"ina3221": "the sensor is gone"})
    report = bench.ledger.report()
    assert (report.energy_j, report.quality, report.source) == (20.0, "measured", "ina3221")
    assert (report.meter.reason, report.meter.power_w, bench.ledger.power_w) == ("the sensor is gone", None, None)
    assert bench.ledger.image_energy() == (None, "unavailable", None)


def test_a_meter_thread_that_hangs_shows_as_no_reading(bench: Bench) -> None:
    bench.run(1)
    bench.clock.now_s += 30
    assert bench.ledger.report().meter.reason == "no reading for 30 s"
    assert bench.ledger.power_w is None
    assert bench.ledger.image_energy().value_j is None


def test_images_classified_in_a_gap_are_counted_but_do_not_make_the_others_cheaper(bench: Bench) -> None:
    with bench.ledger.activity("classify", images=10):
        bench.clock.now_s += 1
    bench.read(10.0)
    bench.ledger.unavailable("the sensor is gone")
    with bench.ledger.activity("classify", images=90):
        bench.clock.now_s += 9
    bench.ledger.unavailable("the sensor is gone")
    classify = bench.ledger.report().activities["classify"]
    assert (classify.count, classify.covered_count, classify.per_item_j) == (100, 10.0, 1.0)


def test_work_that_reaches_into_a_gap_counts_with_the_part_that_was_measured(bench: Bench) -> None:
    with bench.ledger.activity("learn", samples=8):
        bench.run(1)
        bench.clock.now_s += 3
        bench.read(10.0)
    bench.run(1)
    learn = bench.ledger.report().activities["learn"]
    assert (learn.count, learn.covered_count, learn.energy_j) == (8, 2.0, 10.0)


def test_a_counter_gives_energy_and_mean_power(clock: Clock) -> None:
    bench = Bench(clock, "nvml")
    bench.read(counter_j=5000.0)
    clock.now_s += 0.5
    bench.read(counter_j=5030.0)
    assert bench.ledger.report().energy_j == pytest.approx(30.0)
    assert bench.ledger.power_w == pytest.approx(60.0)


def test_a_reading_that_is_not_newer_is_ignored(bench: Bench) -> None:
    bench.run(1)
    bench.read(1000.0)
    bench.run(1)
    assert bench.ledger.report().energy_j == pytest.approx(20.0)


def test_the_worst_quality_names_the_sum_and_every_source_is_named(bench: Bench) -> None:
    bench.run(2)
    bench.ledger.unavailable("gone")
    bench.ledger.serving("rapl", "processor", {"ina3221": "gone"})
    bench.source, bench.quality = "rapl", "estimated"
    bench.run(3)
    report = bench.ledger.report()
    assert (report.quality, report.source, report.meter.source) == ("estimated", "ina3221+rapl", "rapl")
    assert report.meter.passed_over == {"ina3221": "gone"}


def test_the_time_between_two_different_meters_is_not_bridged(bench: Bench) -> None:
    bench.ledger.serving("tegrastats", "everything", {})
    bench.source = "tegrastats"
    bench.run(3)
    assert bench.ledger.report().energy_j == pytest.approx(20.0)


def test_rails_are_integrated_at_their_own_pace(bench: Bench) -> None:
    for number in range(1, 21):
        bench.clock.now_s += 0.25
        bench.read(10.0, VDD_IN=10.0, **({"VDD_SOC": 2.0} if number % 4 == 0 else {}))
    rails = bench.ledger.report().rails
    assert (rails["VDD_IN"].energy_j, rails["VDD_IN"].covered_s) == (47.5, 4.75)
    assert (rails["VDD_SOC"].energy_j, rails["VDD_SOC"].covered_s, rails["VDD_SOC"].power_w) == (8.0, 4.0, 2.0)


def test_a_rail_that_was_read_once_has_a_power_and_no_energy(bench: Bench) -> None:
    bench.clock.now_s += 1
    bench.read(10.0, VDD_SOC=2.0)
    rail = bench.ledger.report().rails["VDD_SOC"]
    assert (rail.energy_j, rail.power_w) == (None, 2.0)


def test_a_rail_is_not_bridged_over_a_gap(bench: Bench) -> None:
    bench.run(2, VDD_SOC=2.0)
    bench.clock.now_s += 60
    bench.run(2, VDD_SOC=2.0)
    assert bench.ledger.report().rails["VDD_SOC"].covered_s == 2.0


def test_above_idle_is_unknown_until_the_idle_power_is_known(bench: Bench) -> None:
    with bench.ledger.activity("classify", images=4):
        bench.run(4, power_w=10.0)
    report = bench.ledger.report()
    assert (report.idle_w, report.above_idle_j, report.activities["classify"].above_idle_j) == (None, None, None)
    bench.clock.now_s += 0.001
    bench.read(3.0)
    bench.run(60, power_w=3.0)
    report = bench.ledger.report()
    classify = report.activities["classify"]
    assert report.idle_w == pytest.approx(3.0, rel=1e-3)
    assert classify.above_idle_j == pytest.approx(4 * (10.0 - 3.0), rel=1e-2)
    assert classify.per_item_above_idle_j == pytest.approx(7.0, rel=1e-2)


def test_the_idle_power_of_another_meter_is_learnt_anew(bench: Bench) -> None:
    bench.run(60)
    assert bench.ledger.report().idle_w == pytest.approx(10.0)
    bench.ledger.serving("ina3221", "everything", {})
    assert bench.ledger.report().idle_w == pytest.approx(10.0)
    bench.ledger.serving("rapl", "processor", {})
    assert bench.ledger.report().idle_w is None


def test_the_energy_of_an_image_is_the_mean_of_the_recent_ones(bench: Bench) -> None:
    with bench.ledger.activity("classify", images=10):
        bench.run(5)
    bench.run(1)
    assert bench.ledger.image_energy() == (5.0, "measured", "ina3221")
    bench.run(1200, power_w=2.0)
    with bench.ledger.activity("classify", images=10):
        bench.run(5, power_w=2.0)
    bench.run(1, power_w=2.0)
    assert bench.ledger.image_energy().value_j == pytest.approx(1.0)


def test_the_energy_of_an_image_falls_back_on_older_ones(bench: Bench) -> None:
    with bench.ledger.activity("classify", images=10):
        bench.run(5)
    bench.run(3600, power_w=2.0)
    assert bench.ledger.image_energy().value_j == pytest.approx(5.0)


def test_totals_survive_a_restart_as_json_and_the_time_between_costs_nothing(bench: Bench, clock: Clock) -> None:
    with bench.ledger.activity("classify", images=10):
        bench.run(5, VDD_SOC=2.0)
    bench.run(5, VDD_SOC=2.0)
    kept = json.loads(json.dumps(bench.ledger.totals()))
    clock.now_s += 1e6
    again = Bench(clock, carried=kept)
    before, after = bench.ledger.report(), again.ledger.report()
    assert (after.energy_j, after.covered_s, after.gap_s, after.quality) == (before.energy_j, before.covered_s, before.gap_s, "measured")
    assert after.activities["classify"] == before.activities["classify"]
    again.read(10.0)
    again.run(5)
    assert again.ledger.report().energy_j == pytest.approx(150.0)
    assert again.ledger.report().rails["VDD_SOC"].energy_j == pytest.approx(18.0)


@pytest.mark.parametrize("change", [{"energy_j": -1.0}, {"energy_j": "many"}, {"activities": {}}, {"rails": None}, {"gaps": math.nan}])
def test_totals_that_can_not_be_read_are_left_behind_with_a_warning(
    bench: Bench, clock: Clock, caplog: pytest.LogCaptureFixture, change: Any
) -> None:
    bench.run(5)
    again = EnergyLedger(clock=clock, carried={**bench.ledger.totals(), **change})
    assert again.report().energy_j is None
    assert "can't be read" in caplog.text


def test_since_gives_the_minutes_from_then_on(bench: Bench) -> None:
    for power_w in (10.0, 20.0, 30.0):
        bench.run(60, power_w=power_w)
    now_s = bench.boot_s + bench.clock.now_s
    window = bench.ledger.report(since=now_s - 59)
    assert window.covered_s < 130
    assert window.energy_j == pytest.approx(sum(bucket.energy_j or 0.0 for bucket in window.history))
    assert window.since_s == window.history[0].start_s
    assert window.since_s is not None
    assert window.since_s <= now_s - 59 < window.since_s + 60


def test_since_the_beginning_is_the_whole_with_its_history(bench: Bench) -> None:
    with bench.ledger.activity("classify", images=7):
        bench.run(150)
    bench.run(1)
    whole, window = bench.ledger.report(), bench.ledger.report(since=0)
    assert window.energy_j == pytest.approx(whole.energy_j)
    assert window.activities["classify"].count == 7
    assert sum(bucket.images for bucket in window.history) == 7
    assert whole.history == ()


def test_since_the_future_is_unknown_and_not_zero(bench: Bench) -> None:
    bench.run(5)
    window = bench.ledger.report(since=WALL_S + 1e6)
    assert (window.energy_j, window.history, window.since_s, window.quality) == (None, (), None, "unavailable")


def test_setting_the_clock_of_the_device_dates_the_history_anew(bench: Bench) -> None:
    bench.boot_s = 0.0  # a device without a clock battery starts in 1970
    bench.run(120)
    bench.boot_s = 2 * WALL_S
    history = bench.ledger.report(since=2 * WALL_S).history
    assert sum(bucket.covered_s for bucket in history) == 120.0
    assert history[-1].start_s <= 2 * WALL_S + bench.clock.now_s < history[-1].start_s + 60


def test_the_history_is_bounded_to_a_day(bench: Bench) -> None:
    for _ in range(1500):
        bench.clock.now_s += 60
        bench.read(10.0)
    assert len(bench.ledger.report(since=0).history) == 1440


def test_marks_are_bounded_when_the_meter_thread_hangs_and_their_joules_are_unattributed(bench: Bench) -> None:
    for _ in range(MAX_PENDING):
        with bench.ledger.activity("classify", images=1):
            bench.clock.now_s += 0.0001
    assert len(bench.ledger._marks._pending) <= MAX_PENDING
    bench.read(10.0)
    bench.run(1)
    report = bench.ledger.report()
    assert report.unattributed_j == pytest.approx(10.0 * 0.0001 * MAX_PENDING)
    classify = report.activities["classify"]
    assert (classify.count, classify.covered_count, classify.per_item_j) == (MAX_PENDING, 0.0, None)
    assert report.activities["idle"].energy_j == pytest.approx(10.0)
