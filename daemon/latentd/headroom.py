"""How much memory can still be had. Any thread; a handful of small reads under /proc and /sys.

On a Jetson the GPU takes its memory from the same place, cudaMemGetInfo leaves swap and caches out, and memory of the GPU can't be
swapped: what the kernel calls MemAvailable is the figure to go by.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Dict, Iterator, NamedTuple, Optional

_ROW = re.compile(r"^(\S+?):?\s+(\d+)( kB)?$", re.MULTILINE)
_UNLIMITED = 1 << 60  # cgroup v1 writes a huge number where there is no limit
_MACHINE = "the machine"


class Headroom(NamedTuple):
    """Bytes that can still be taken without swapping, and bytes there are in all; None where the system does not tell.

    bounded_by: what is scarcest: "the machine", or the control group (a service's or a container's) whose limit is nearer.
    """

    available_bytes: Optional[int]
    total_bytes: Optional[int]
    bounded_by: str = _MACHINE


def read(root: Path = Path("/")) -> Headroom:
    """The headroom of this process. root: of the filesystem that holds proc and sys."""
    machine = meminfo(root)
    found = Headroom(machine.get("MemAvailable"), machine.get("MemTotal"))
    for group in _groups(root):
        limit = _limit(group)
        if limit is None:
            continue
        left = max(0, limit - _held(group))
        if found.available_bytes is None or left < found.available_bytes:
            found = Headroom(left, limit, f"the control group {group.name}")
    return found


def meminfo(root: Path = Path("/")) -> Dict[str, int]:
    """/proc/meminfo, in bytes; empty where it can't be read."""
    return _rows(root / "proc/meminfo")


def resident_bytes(root: Path = Path("/")) -> Optional[int]:
    """What this process holds in memory now; None where the system does not tell."""
    return _rows(root / "proc/self/status").get("VmRSS")


def _groups(root: Path) -> Iterator[Path]:
    """Folders of the control groups that this process is in, from its own up: version 2, and version 1 where memory is still there.

    Inside a container the path may be the host's, of which only the top is there.
    """
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            top = root / "sys/fs/cgroup"
        elif "memory" in controllers.split(","):
            top = root / "sys/fs/cgroup/memory"
        else:
            continue
        own = top / path.lstrip("/")
        yield from (group for group in (own, *own.parents) if group == top or top in group.parents)


def _limit(group: Path) -> Optional[int]:
    """The lowest of its limits, bytes; None where it has none. memory.high does not kill, but slows what is above it to a crawl."""
    texts = (_text(group / name).strip() for name in ("memory.max", "memory.high", "memory.limit_in_bytes"))
    limits = [int(text) for text in texts if text.isdigit() and int(text) < _UNLIMITED]
    return min(limits) if limits else None


def _held(group: Path) -> int:
    """Bytes the group has taken, without the file cache that it would give back: what MemAvailable would count, for a group.

    Of what is in use now, active files and kernel objects, the kernel takes half for available as well.
    """
    usage = next((text for name in ("memory.current", "memory.usage_in_bytes") for text in [_text(group / name).strip()] if text), "0")
    stat = _rows(group / "memory.stat")
    cold, warm, objects = (stat.get(f"total_{name}", stat.get(name, 0)) for name in ("inactive_file", "active_file", "slab_reclaimable"))
    return max(0, (int(usage) if usage.isdigit() else 0) - cold - (warm + objects) // 2)


def _rows(path: Path) -> Dict[str, int]:
    """Lines of a name and a number, in bytes."""
    return {name: int(value) << (10 if kib else 0) for name, value, kib in _ROW.findall(_text(path))}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
