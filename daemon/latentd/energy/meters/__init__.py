"""Meters: each reads one kind of sensor and answers with watts or with a counter of joules. All are used by the meter thread alone."""

from __future__ import annotations

from latentd.energy.meters.choose import Choice, check_names, choose_meter
from latentd.energy.meters.reading import Meter, Quality, Reading

__all__ = ["Choice", "Meter", "Quality", "Reading", "check_names", "choose_meter"]
