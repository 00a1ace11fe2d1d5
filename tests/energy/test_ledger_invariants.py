"""Whatever the order of marks and readings, the ledger's parts sum to its total, and its total is the plain integral."""

from __future__ import annotations

import math
from typing import Any, List, Optional, Tuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentd.energy.ledger import EnergyLedger
from latentd.energy.meters.reading import Reading
from latentd.errors import ConfigError

Step = Tuple[str, float]
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["begin classify", "begin learn", "end first", "end last", "read", "read", "read", "fail", "wait"]),
        st.floats(0.0, 3.0),
    ),
    max_size=80,
)


class PlainSum:
    """The total by the book: trapezoids between neighbouring readings that are at most two seconds apart, with no failure between."""

    def __init__(self) -> None:
        self.energy_j = 0.0
        self.last: Optional[Tuple[float, float]] = None
        self.newest_s = -1.0

    def read(self, now_s: float, power_w: float) -> None:
        if now_s <= self.newest_s:
            return
        if self.last is not None and now_s - self.last[0] <= 2.0:
            self.energy_j += (self.last[1] + power_w) / 2 * (now_s - self.last[0])
        self.last, self.newest_s = (now_s, power_w), now_s

    def fail(self, now_s: float) -> None:
        self.last = None
        self.newest_s = now_s if self.newest_s >= 0 else self.newest_s


def play(steps: List[Step], powers_w: List[float]) -> Tuple[EnergyLedger, PlainSum]:
    now = [0.0]
    ledger, plain = EnergyLedger(clock=lambda: now[0], gap_s=2.0), PlainSum()
    open_marks: List[Any] = []
    for number, (what, seconds) in enumerate(steps):
        now[0] += seconds
        if what.startswith("begin"):
            open_marks.append(ledger.activity(what.split()[1], images=1))
            open_marks[-1].__enter__()
        elif what.startswith("end") and open_marks:
            open_marks.pop(0 if what == "end first" else -1).__exit__(None, None, None)
        elif what == "fail":
            ledger.unavailable("gone")
            plain.fail(now[0])
        elif what == "read":
            power_w = powers_w[number % len(powers_w)]
            ledger.add(Reading("ina3221", "measured", now[0], power_w))
            plain.read(now[0], power_w)
    return ledger, plain


@given(steps=STEPS, powers_w=st.lists(st.floats(0.0, 1e3), min_size=1, max_size=10))
def test_the_activities_always_sum_to_the_total_whatever_the_order_of_marks(steps: List[Step], powers_w: List[float]) -> None:
    ledger, plain = play(steps, powers_w)
    report = ledger.report()
    if report.energy_j is None or report.unattributed_j is None:
        assert plain.energy_j == 0.0
        return
    parts_j = math.fsum(activity.energy_j or 0.0 for activity in report.activities.values()) + report.unattributed_j
    active_s = math.fsum(activity.active_s for activity in report.activities.values())
    assert math.isclose(parts_j, report.energy_j, rel_tol=1e-9, abs_tol=1e-12)
    assert math.isclose(report.energy_j, plain.energy_j, rel_tol=1e-9, abs_tol=1e-12)
    assert math.isclose(active_s, report.covered_s, rel_tol=1e-9, abs_tol=1e-9)


def test_a_gap_shorter_than_the_period_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="gap_s"):
        EnergyLedger(period_s=5.0, gap_s=2.0)
