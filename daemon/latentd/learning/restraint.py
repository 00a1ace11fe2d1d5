"""When the learner must not compute: too much power, too warm, throttled, too little memory, or an engine that is being built.

The learner thread asks between its steps, so an answer costs a few attribute reads and, a few times a second, small files; any thread may
read what it last said.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Callable, Dict, Mapping, Optional, Tuple

from latentd.headroom import Headroom

LOOK_S = 0.25  # between two looks: a meter reads five times a second
STEADY = 0.95  # of the power budget: what was stopped for power goes on below this share of it
COOLER_C = 3.0  # what was stopped for heat goes on when it is cooler by this
CALM_S = 300.0  # or, for both, after so long below the limit itself: a board may draw steadily just less than its budget
APART_S = 60.0  # work asks before each of its steps; after a longer silence it is another piece of work
MOST_RESERVED = 8  # an eighth of a small machine at most is left to everything else: it would never learn otherwise

LEARN, SLEEP = "learn", "sleep"
CAUSES = ("power", "temperature", "throttling", "memory", "building")


@dataclass(frozen=True)
class Limits:
    """From the configuration; 0 W: no limit; 0 degrees: what each zone allows by itself. reserve_bytes: memory that is left to everything
    else. needs_bytes: what a kind of work takes beyond that while it runs; it begins only when there is as much, and stops when less than
    the reserve is left.
    """

    budget_w: float
    max_temperature_c: float
    reserve_bytes: int
    needs_bytes: Mapping[str, int]


@dataclass(frozen=True)
class Senses:
    """What is asked; each answers at once, with None where nobody knows. limits_c: by zone, of those that have one."""

    power_w: Callable[[], Optional[float]]
    temperatures_c: Callable[[], Mapping[str, Optional[float]]]
    limits_c: Callable[[], Mapping[str, float]]
    throttled: Callable[[], Mapping[str, Tuple[str, ...]]]
    headroom: Callable[[], Headroom]
    building: Callable[[], Optional[str]]


@dataclass(frozen=True)
class Reason:
    """cause: one of CAUSES. text: what is the matter, with figures."""

    cause: str
    text: str


class Restraint:
    """Asked with a kind of work ("learn" or "sleep"), gives the reason to wait, or None.

    Awake learning, which people wait for, is held back by power, heat and memory. A sleep also gives way to an engine that is being built
    (TensorRT takes slower kernels where memory is short) and to throttling: what it would cost in time and joules is then worth least.
    A limit that was passed holds until it is kept with some distance, so that the learner does not flutter around it; one of power or heat
    at most for CALM_S after it was last passed. What nobody can measure holds nothing back.
    """

    def __init__(self, limits: Limits, senses: Senses, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits, self._senses, self._clock = limits, senses, clock
        self._held: Dict[Tuple[str, str], bool] = {}  # by work and cause: the last look found the limit passed
        self._over_s: Dict[Tuple[str, str], float] = {}  # by work and cause: when the limit was last found passed
        self._looked_s: Dict[str, float] = {}
        self._found: Dict[str, Optional[Reason]] = {}

    def obey(self, limits: Limits) -> None:
        """Other limits from now on; any thread."""
        self._limits = limits

    def __call__(self, work: str) -> Optional[Reason]:
        now_s = self._clock()
        looked_s = self._looked_s.get(work)
        if looked_s is not None and now_s - looked_s > APART_S:
            self._held.pop((work, "memory"), None)  # the work of then is done: the next of its kind has to find room to begin again
        if looked_s is None or now_s - looked_s >= LOOK_S:
            self._found[work] = self._look(work)
            self._looked_s[work] = now_s
        return self._found[work]

    def _look(self, work: str) -> Optional[Reason]:
        checks = (self._memory, self._power, self._heat, self._throttling, self._building)
        return next((reason for reason in (check(work) for check in checks) if reason is not None), None)

    def _memory(self, work: str) -> Optional[Reason]:
        available, total, bounded_by = self._senses.headroom()
        reserve, needed = self._limits.reserve_bytes, self._limits.needs_bytes.get(work, 0)
        reserve = min(reserve, total // MOST_RESERVED) if total else reserve
        if available is None or not self._passed(work, "memory", available < reserve, available < reserve + needed, begins=True):
            return None
        wanted = f"{_mib(reserve + needed)} are needed (memory.reserve_bytes and {_mib(needed)} for the work)"
        return Reason("memory", f"{bounded_by} has {_mib(available)} of memory available, {wanted}")

    def _power(self, work: str) -> Optional[Reason]:
        power_w, budget_w = self._senses.power_w(), self._limits.budget_w
        if power_w is None or not budget_w or not self._exceeded(work, "power", power_w > budget_w, power_w > STEADY * budget_w):
            return None
        allowed = f"energy.budget_w is {budget_w:g} W"
        return Reason("power", f"{power_w:.1f} W are drawn, {allowed}; {_goes_on(f'{STEADY * budget_w:.3g} W', f'{budget_w:g} W')}")

    def _heat(self, work: str) -> Optional[Reason]:
        most_c, own_c = self._limits.max_temperature_c, self._senses.limits_c()
        zones = ((name, value, most_c or own_c.get(name)) for name, value in self._senses.temperatures_c().items())
        known = [(value - limit, name, value, limit) for name, value, limit in zones if value is not None and limit is not None]
        if not known:
            return None
        over_c, name, value, limit = max(known)
        if not self._exceeded(work, "temperature", over_c > 0, over_c > -COOLER_C):
            return None
        allowed = f"energy.max_temperature_c is {limit:g} °C" if most_c else f"{limit:g} °C are allowed there"
        goes_on = _goes_on(f"{limit - COOLER_C:g} °C", f"{limit:g} °C")
        return Reason("temperature", f"{name} is at {value:.0f} °C, {allowed}; {goes_on}")

    def _throttling(self, work: str) -> Optional[Reason]:
        found = self._senses.throttled() if work == SLEEP else {}
        text = "; ".join(f"{cause} ({', '.join(what)})" for cause, what in found.items())
        return Reason("throttling", f"the board slows itself down: {text}") if text else None

    def _building(self, work: str) -> Optional[Reason]:
        engine = self._senses.building() if work == SLEEP else None
        return Reason("building", f"the engine {engine} is being built") if engine else None

    def _exceeded(self, work: str, cause: str, is_over: bool, is_near: bool) -> bool:
        """Whether the limit holds the work back, as long as it was last passed less than CALM_S ago."""
        now_s = self._clock()
        if is_over:
            self._over_s[(work, cause)] = now_s
        return self._passed(work, cause, is_over, is_near and now_s - self._over_s.get((work, cause), now_s) < CALM_S)

    def _passed(self, work: str, cause: str, is_over: bool, is_near: bool, begins: bool = False) -> bool:
        """Whether the limit holds the work back. is_near: within the distance that ends a wait. begins: the first look asks for it too."""
        held = is_near if self._held.get((work, cause), begins) else is_over
        self._held[(work, cause)] = held
        return held


def _goes_on(soon: str, late: str) -> str:
    return f"learning goes on below {soon}, or after {CALM_S / 60:.0f} minutes below {late}"


def _mib(count: int) -> str:
    return f"{count / (1 << 20):.0f} MiB"


def unrestrained(work: str) -> Optional[Reason]:
    """Nothing holds the work back: the restraint of whoever learns without a board to look after."""
    return None
