"""What a meter is and what it yields. Values only; no thread, nothing blocks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Mapping, Optional

from typing_extensions import Literal, Protocol

Quality = Literal["measured", "estimated", "unavailable"]

# Rails that carry everything the board takes in. Other rails are fed from these: adding them up would count the same joule twice.
INPUT_RAILS = ("VDD_IN", "POM_5V_IN")

# Rails other than the input are read once in this time: every read waits for the sensor's next conversion.
RAIL_PERIOD_S = 1.0


@dataclass(frozen=True)
class Reading:
    """One look at the sensors, taken at `at_s` of the meter's clock.

    The total is `power_w` (watts at that moment) or `energy_j` (a counter of joules with any origin); one of them is None.
    `rails_w` and `rails_j` say the same of the parts that were read anew this time; parts may overlap, so they are never added up.
    temperatures_c and gpu_load_ratio are what some sensors say besides.
    """

    source: str
    quality: Quality
    at_s: float
    power_w: Optional[float] = None
    energy_j: Optional[float] = None
    rails_w: Mapping[str, float] = field(default_factory=dict)
    rails_j: Mapping[str, float] = field(default_factory=dict)
    temperatures_c: Mapping[str, Optional[float]] = field(default_factory=dict)
    gpu_load_ratio: Optional[float] = None


class Meter(Protocol):
    """A sensor that was found. Constructing one raises MeterUnavailable, with the reason, where there is none to find."""

    source: str  # the name used in the configuration, in answers and as a metric label
    scope: str  # what the total includes, in plain words

    def read(self) -> Optional[Reading]:
        """The newest reading; None when there is nothing new yet. Raises MeterUnavailable: the meter is then closed and made anew."""
        ...

    def close(self) -> None:
        """Gives back files, processes and libraries; the meter can't be read afterwards."""
        ...
