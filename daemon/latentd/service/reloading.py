"""Taking on a changed configuration while the daemon serves: a few keys at once, the others by name for whoever restarts it.

Runs on the event loop, for the time of reading a few small files.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any, Dict, List, NamedTuple, Tuple

from latentd.config import SECTIONS, Config, as_table

log = logging.getLogger(__name__)

# Read anew by each request or log line. Every other key shaped something at the start: a thread, a buffer, a file, the model itself.
LIVE = ("http.body_timeout_s", "learn.max_lag_samples", "energy.budget_w", "energy.max_temperature_c", "energy.battery_wh", "log.level")


class Reload(NamedTuple):
    """What is in force now, which keys changed, and which wait for a restart."""

    config: Config
    taken: Tuple[str, ...]
    needs_restart: Tuple[str, ...]


def merge(running: Config, wanted: Config) -> Reload:
    """The running configuration with the live keys of the wanted one; `running` keeps all others, so that it stays true."""
    before, after = as_table(running), as_table(wanted)
    changed = [key for key in after if after[key] != before[key]]
    taken = tuple(key for key in changed if key in LIVE)
    sections: Dict[str, Any] = {
        name: dataclasses.replace(getattr(running, name), **{key.split(".")[1]: after[key] for key in taken if key.startswith(f"{name}.")})
        for name in SECTIONS
    }
    origins = {**running.origins, **{key: wanted.origins.get(key, "default") for key in LIVE}}
    merged = dataclasses.replace(running, **sections, origins=origins)
    return Reload(merged, taken, tuple(key for key in changed if key not in LIVE))


def tell(reload: Reload) -> None:
    """The log's account of a reload."""
    lines: List[str] = []
    if reload.taken:
        lines.append(f"{', '.join(reload.taken)} changed")
    if reload.needs_restart:
        lines.append(f"restart needed for {', '.join(reload.needs_restart)}")
    log.info("configuration read again: %s", "; ".join(lines) or "nothing changed")
