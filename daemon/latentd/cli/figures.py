"""Figures in words: shares, sizes, joules, times. Unknown is said, never 0."""

from __future__ import annotations

from typing import Any, Mapping, Optional


def percent(ratio: Optional[float]) -> str:
    return "-" if ratio is None else f"{100 * ratio:.1f} %"


def score(found: Optional[Mapping[str, Any]]) -> str:
    """A Score of the API: the share, its 95 % interval, and of how many."""
    if not found or found["value"] is None:
        return "not known yet"
    return f"{percent(found['value'])} ({100 * found['low']:.0f} to {100 * found['high']:.0f}, of {found['count']})"


def size(count: Optional[float]) -> str:
    """Bytes in binary units."""
    if count is None:
        return "-"
    if count < 1024:
        return f"{count:.0f} B"
    for unit in ("KiB", "MiB"):
        count /= 1024
        if count < 1024:
            return f"{count:.1f} {unit}"
    return f"{count / 1024:.1f} GiB"


def joules(energy_j: Optional[float]) -> str:
    if energy_j is None:
        return "-"
    if abs(energy_j) >= 10_000:
        return f"{energy_j / 1000:.1f} kJ"
    return f"{energy_j * 1000:.1f} mJ" if 0 < abs(energy_j) < 0.1 else f"{energy_j:.2f} J"


def duration(seconds: Optional[float]) -> str:
    if seconds is None:
        return "-"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = int(seconds // 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
