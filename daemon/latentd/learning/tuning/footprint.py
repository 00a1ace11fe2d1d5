"""How much memory a piece of work takes at its peak, by the resident set of this process as Linux counts it.

Whatever else the process does meanwhile counts too: only one thing may be measured at a time.
"""

from __future__ import annotations

import gc
import re
from pathlib import Path
from typing import Callable, Optional

from latentd.trouble import trim

_SELF = Path("/proc/self")
_RESET_PEAK = "5\n"  # Documentation/filesystems/proc.rst: sets the peak of the resident set to its present size


def peak_growth(work: Callable[[], object], proc: Path = _SELF) -> Optional[int]:
    """Bytes by which memory grew at most while `work` ran; None where this system can't tell (the work is done all the same)."""
    _give_back()
    try:
        (proc / "clear_refs").write_text(_RESET_PEAK, encoding="ascii")
        before = _status(proc, "VmRSS")
    except OSError:
        work()
        return None
    work()
    return max(0, _status(proc, "VmHWM") - before)


def _give_back() -> None:
    """Frees what is unused and makes the C library give it back: memory kept for later use would hide the next growth."""
    gc.collect()
    trim()


def _status(proc: Path, key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB$", (proc / "status").read_text(encoding="ascii", errors="replace"), re.MULTILINE)
    if found is None:
        raise OSError(f"{proc / 'status'} has no {key}")
    return int(found.group(1)) << 10
