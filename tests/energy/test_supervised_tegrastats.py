"""tegrastats under the meter thread: started only where the sensor's own files can't be read, started anew when it dies, left to nobody."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Callable, Iterator, List

import pytest

from latentd.config import EnergyConfig
from latentd.energy.ledger import EnergyLedger
from latentd.energy.meter_thread import BETTER_S, MeterThread

if TYPE_CHECKING:
    from energy.conftest import Break, Clock, Plant

CHIP = "sys/bus/i2c/drivers/ina3221/7-0040/hwmon/hwmon4"
PROGRAM = """#!{python}
import os, time
with open({pids!r}, "a") as file:
    file.write(f"{{os.getpid()}} ")
while True:
    print("RAM 3168/6851MB (lfb 2x4MB) GPU@45.5C VDD_IN 2763mW/2846mW", flush=True)
    time.sleep(0.005)
"""


class Board:
    """A Jetson with both, whose clock a test moves."""

    def __init__(self, root: Path, clock: Clock) -> None:
        self.clock, self._pids = clock, root / "pids"
        program = root / "usr/bin/tegrastats"
        program.parent.mkdir(parents=True)
        program.write_text(PROGRAM.format(python=sys.executable, pids=str(self._pids)))
        program.chmod(0o755)
        self.ledger = EnergyLedger(clock=clock)
        self.thread = MeterThread.from_config(EnergyConfig(meters=("ina3221", "tegrastats")), self.ledger, root=root, clock=clock)

    @property
    def started(self) -> List[int]:
        """Every child so far."""
        return [int(pid) for pid in self._pids.read_text().split()] if self._pids.exists() else []

    def tick_until(self, is_so: Callable[[], bool]) -> None:
        """Lets a twentieth of a second pass at a time, up to ten real seconds."""
        never = threading.Event()
        for _ in range(2000):
            self.thread.tick()
            if is_so():
                return
            self.clock.now_s += 0.05
            never.wait(0.005)
        raise AssertionError(f"it did not come to that: {self.ledger.report().meter}")

    def reads_from(self, source: str) -> bool:
        meter = self.ledger.report().meter
        return (meter.source, meter.reason) == (source, None)


@pytest.fixture
def board(plant: Plant, clock: Clock) -> Iterator[Board]:
    made = Board(plant({f"{CHIP}/in1_label": "VDD_IN", f"{CHIP}/in1_input": 5000, f"{CHIP}/curr1_input": 1000}), clock)
    yield made
    made.thread._close()


def is_there(pid: int) -> bool:
    """Also as a zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_it_is_not_started_while_the_sensors_files_can_be_read(board: Board) -> None:
    board.tick_until(lambda: board.reads_from("ina3221"))
    board.clock.now_s += 2 * BETTER_S
    board.tick_until(lambda: board.reads_from("ina3221"))
    assert board.started == []


@pytest.mark.parametrize("file", ["in1_label", "in1_input"])
def test_it_takes_over_from_files_that_only_root_may_read_and_ends_when_they_can_be_read_again(
    board: Board, tmp_path: Path, break_file: Break, file: str
) -> None:
    break_file(tmp_path / CHIP / file, errno.EACCES)
    board.tick_until(lambda: board.reads_from("tegrastats"))
    assert board.ledger.power_w == 2.763
    assert "permission denied" in board.ledger.report().meter.passed_over["ina3221"]
    break_file(tmp_path / CHIP / file, 0)
    board.clock.now_s += BETTER_S
    board.tick_until(lambda: board.reads_from("ina3221"))
    (child,) = board.started
    assert not is_there(child)


def test_a_child_that_dies_is_started_anew_and_costs_one_gap(board: Board, tmp_path: Path, break_file: Break) -> None:
    break_file(tmp_path / CHIP / "in1_input", errno.EACCES)
    board.tick_until(lambda: board.reads_from("tegrastats"))
    (child,) = board.started
    os.kill(child, signal.SIGKILL)
    board.tick_until(lambda: not board.reads_from("tegrastats"))
    assert board.ledger.report().meter.reason == "tegrastats ended with status -9"
    assert not is_there(child), "nobody waited for it"
    board.tick_until(lambda: board.reads_from("tegrastats"))
    board.clock.now_s += 0.05
    board.tick_until(lambda: board.ledger.report().gap_s > 0)
    report = board.ledger.report()
    assert (len(board.started), report.gaps) == (2, 1)
    assert 1.0 <= report.gap_s < 3.0
