"""How long the battery lasts: the hours left at this rate of learning, and at the one by which learners on batteries are compared.

Pure functions of what the ledger counted, for any thread; `charge_ratio` reads small files of the kernel, on the meter thread.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from latentd.energy import sysfs
from latentd.energy.report import EnergyReport

LEAST_S = 60.0  # of readings, before a mean power says anything
HOUR_S = 3600.0


@dataclass(frozen=True)
class BatteryEstimate:
    """power_w: the mean over the recent time, where there were readings. samples_per_hour: what was learned in the same time. charge_ratio:
    of the battery, 0 to 1; None where the board does not tell, and then hours_left counts from a full one. hours_at_a_minibatch_a_minute:
    from full, with nothing else to do but to learn one mini-batch of new samples each minute (the figure of Ravaglia et al. 2021, "A TinyML
    platform for on-device continual learning with quantized latent replays": 535 h on their device).
    """

    capacity_wh: float
    charge_ratio: Optional[float]
    power_w: Optional[float]
    samples_per_hour: Optional[float]
    hours_left: Optional[float]
    hours_at_a_minibatch_a_minute: Optional[float]
    reason: Optional[str]


def estimate(
    capacity_wh: float, charge: Optional[float], recent: EnergyReport, life: EnergyReport, new_samples: int
) -> Optional[BatteryEstimate]:
    """None without a battery. recent: the time whose rate counts. life: all that was ever counted, for what one sample costs.

    new_samples: of one mini-batch.
    """
    if capacity_wh <= 0:
        return None
    energy_j, seconds = recent.energy_j, recent.covered_s
    is_known = energy_j is not None and seconds >= LEAST_S
    power_w = energy_j / seconds if energy_j is not None and is_known and energy_j > 0 else None
    learned = recent.activities["learn"].covered_count  # of the same time as the seconds
    sample_j, idle_w = life.activities["learn"].per_item_above_idle_j, life.idle_w
    paced_w = idle_w + max(0.0, sample_j) * new_samples / 60.0 if idle_w is not None and sample_j is not None else None
    return BatteryEstimate(
        capacity_wh=capacity_wh,
        charge_ratio=charge,
        power_w=power_w,
        samples_per_hour=learned * HOUR_S / seconds if is_known else None,
        hours_left=capacity_wh * (1.0 if charge is None else charge) / power_w if power_w else None,
        hours_at_a_minibatch_a_minute=capacity_wh / paced_w if paced_w else None,
        reason=None if power_w else recent.meter.reason or f"readings cover {seconds:.0f} s so far, {LEAST_S:.0f} are needed",
    )


def charge_ratio(root: Path) -> Optional[float]:
    """Of the board's own battery, 0 to 1; None where there is none, or it does not tell. Batteries of mice and pens don't count."""
    for supply in sorted((root / "sys/class/power_supply").glob("*")):
        try:
            if sysfs.read_text(supply / "type") == "Battery" and _feeds_the_board(supply):
                return min(1.0, max(0.0, sysfs.read_number(supply / "capacity") / 100))
        except OSError:
            continue
    return None


def _feeds_the_board(supply: Path) -> bool:
    try:
        return sysfs.read_text(supply / "scope") != "Device"
    except OSError:
        return True
