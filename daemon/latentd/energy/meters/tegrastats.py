"""tegrastats, NVIDIA's own status printer, as a supervised child process: for Jetsons whose sensor files can't be read.

Used by the meter thread alone. The pipe is read without blocking; only `close` may wait, half a second, for the child to end.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Optional

from latentd.energy import sysfs
from latentd.energy.meters.reading import INPUT_RAILS, Reading
from latentd.errors import MeterUnavailable

_RAIL = re.compile(r"(?<!\S)([A-Z][A-Z0-9_]*) (\d+)(?:mW)?/\d+(?:mW)?(?:/\d+(?:mW)?)?(?!\S)")
_TEMPERATURE = re.compile(r"(?<!\S)([A-Za-z]\w*)@(-?\d+(?:\.\d+)?)C(?!\S)")
_GPU_LOAD = re.compile(r"(?<!\S)GR3D_FREQ (\d+)%")
_STATUS_LINE = re.compile(r"(?<!\S)RAM \d+/\d+[kMG]?B(?!\S)")

_LINE_BYTES = 1 << 16  # a child that prints no line ends is not tegrastats; memory stays bounded
_END_S = 0.5


class Stats(NamedTuple):
    """What one line says: momentary watts of each rail, degrees Celsius (None: no power there), share of time the GPU was busy (0..1)."""

    rails_w: Dict[str, float]
    temperatures_c: Dict[str, Optional[float]]
    gpu_load_ratio: Optional[float]


def parse(line: str) -> Optional[Stats]:
    """The line's figures, from any JetPack and board; None where it is not a status line.

    A rail is `NAME now/mean` in mW, from JetPack 5 on with the unit written out and on some boards with a third number.
    """
    if not _STATUS_LINE.search(line):
        return None
    rails_w = {name: int(now_mw) / 1e3 for name, now_mw in _RAIL.findall(line)}
    readings_c = ((name, float(value)) for name, value in _TEMPERATURE.findall(line))
    temperatures_c = {name: value if value >= 0 else None for name, value in readings_c if name.upper() != "PMIC"}
    load = _GPU_LOAD.search(line)
    return Stats(rails_w, temperatures_c, int(load.group(1)) / 100 if load else None)


class TegrastatsMeter:
    """Watts of the input rail from the newest line.

    A child that ends, stays silent for `silence_s`, or shows no input rail makes the meter unavailable, with the reason. The child is
    ended with the meter; the meter thread makes a new one, later and later if that keeps happening.
    """

    source = "tegrastats"

    def __init__(self, executable: Path, clock: Callable[[], float], period_s: float, silence_s: Optional[float] = None) -> None:
        self._clock = clock
        self._silence_s = silence_s if silence_s is not None else max(3.0, 5 * period_s)
        self._buffer = b""
        self._last_words = ""
        self._stats: Optional[Stats] = None
        self._heard_s = clock()
        self._process = _spawn(executable, period_s)
        assert self._process.stdout is not None, "the child was started with a pipe"
        self._pipe = self._process.stdout.fileno()
        os.set_blocking(self._pipe, False)
        self.scope = "all that the module takes in, as tegrastats prints it; not the carrier board, camera and fan"

    def read(self) -> Optional[Reading]:
        fresh = self._newest_line()
        now_s = self._clock()
        if fresh is not None:
            self._heard_s = now_s
            return self._reading(fresh, now_s)
        if now_s - self._heard_s > self._silence_s:
            raise MeterUnavailable(f"tegrastats is silent for {now_s - self._heard_s:.0f} s{self._last_words}")
        return None

    def close(self) -> None:
        _end(self._process)

    def _reading(self, stats: Stats, now_s: float) -> Reading:
        total = next((name for name in INPUT_RAILS if name in stats.rails_w), None)
        if total is None:
            shown = ", ".join(stats.rails_w) or "no power at all, as it does on some boards without root"
            raise MeterUnavailable(f"tegrastats shows no input rail ({' or '.join(INPUT_RAILS)}), but {shown}")
        return Reading(
            self.source,
            "measured",
            now_s,
            power_w=stats.rails_w[total],
            rails_w=stats.rails_w,
            temperatures_c=stats.temperatures_c,
            gpu_load_ratio=stats.gpu_load_ratio,
        )

    def _newest_line(self) -> Optional[Stats]:
        """The last whole status line in the pipe; None when there is none. Raises MeterUnavailable once the child ended and all is read."""
        newest: Optional[Stats] = None
        while True:
            chunk = self._chunk()
            if not chunk:
                break
            *lines, self._buffer = (self._buffer + chunk).split(b"\n")
            self._buffer = self._buffer[-_LINE_BYTES:]
            newest = self._last_stats(lines) or newest
        if chunk == b"" and newest is None:
            raise MeterUnavailable(f"tegrastats ended with status {_end(self._process)}{self._last_words}")
        return newest

    def _chunk(self) -> Optional[bytes]:
        """Bytes from the pipe; b"" at its end, None when there are none yet."""
        try:
            return os.read(self._pipe, _LINE_BYTES)
        except BlockingIOError:
            return None

    def _last_stats(self, lines: List[bytes]) -> Optional[Stats]:
        newest: Optional[Stats] = None
        for line in (raw.decode("ascii", "replace").strip() for raw in lines):
            stats = parse(line)
            newest = stats or newest
            if line and stats is None:
                self._last_words = f"; it said: {line[:120]}"
        return newest


def _spawn(executable: Path, period_s: float) -> subprocess.Popen[bytes]:
    """A child in its own session, so that Ctrl-C in a terminal reaches the daemon alone."""
    command = [str(executable), "--interval", str(max(100, round(period_s * 1000)))]
    try:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0, start_new_session=True
        )
    except FileNotFoundError as cause:
        raise MeterUnavailable(f"tegrastats not found ({executable})") from cause
    except OSError as cause:
        raise MeterUnavailable(f"tegrastats can't be started: {sysfs.why(cause)}") from cause


def _end(process: subprocess.Popen[bytes]) -> int:
    """Ends the child, by force if it does not listen, and gives its exit status; harmless when it has ended already."""
    process.terminate()
    try:
        status = process.wait(_END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        status = process.wait()
    if process.stdout is not None:
        process.stdout.close()
    return status
