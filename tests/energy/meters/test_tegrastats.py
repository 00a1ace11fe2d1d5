from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Callable, Iterator, List

import pytest

from latentd.energy.meters.reading import Reading
from latentd.energy.meters.tegrastats import TegrastatsMeter, parse
from latentd.errors import MeterUnavailable

if TYPE_CHECKING:
    from energy.conftest import Clock

NX_JETPACK_4 = (
    "RAM 5246/7771MB (lfb 7x4MB) SWAP 983/20269MB (cached 280MB) CPU [47%@1420,23%@1420,32%@1420,22%@1420,31%@1420,96%@1420] "
    "EMC_FREQ 2%@1600 GR3D_FREQ 0%@1109 APE 150 MTS fg 1% bg 9% AO@29C GPU@31.5C PMIC@100C AUX@30C CPU@33.5C thermal@31.35C "
    "VDD_IN 6140/5510 VDD_CPU_GPU_CV 2706/2119 VDD_SOC 1074/1051"
)
NX_JETPACK_5 = (
    "07-09-2024 13:31:31 RAM 3168/6851MB (lfb 2x4MB) SWAP 161/3426MB (cached 0MB) "
    "CPU [23%@1397,17%@1192,16%@1190,13%@1190,23%@1190,10%@1190] EMC_FREQ 2%@204 GR3D_FREQ 0%@[114] VIC_FREQ 115 APE 150 AUX@45C "
    "CPU@46.5C thermal@45.6C AO@45C GPU@45.5C PMIC@50C VDD_IN 2763mW/2846mW VDD_CPU_GPU_CV 650mW/670mW VDD_SOC 650mW/711mW"
)
CORES_OFF = (
    "RAM 2690/6854MB (lfb 6x1MB) SWAP 479/3427MB (cached 3MB) CPU [3%@1904,7%@1906,1%@1905,0%@1907,off,off] EMC_FREQ 0%@1600 "
    "GR3D_FREQ 0%@[510] VIC_FREQ 601 APE 150 AUX@39C CPU@39.5C AO@37.5C GPU@37.5C PMIC@50C VDD_IN 5079mW/5079mW "
    "VDD_CPU_GPU_CV 696mW/696mW VDD_SOC 1104mW/1104mW"
)
AGX_RAILS = "GPU 1155/1155 CPU 385/385 SOC 2504/2503 CV 0/0 VDDRQ 192/192 SYS5V 2692/2692"
NANO_RAILS = "POM_5V_IN 933/933 POM_5V_GPU 0/0 POM_5V_CPU 84/84"
ORIN_RAILS = "VDD_GPU_SOC 5139mW/5139mW/5139mW"
NOT_ROOT = "RAM 2690/6854MB (lfb 6x1MB) SWAP 0/0MB (cached 0MB) CPU [1%@0,off] EMC_FREQ 0% GR3D_FREQ 42% APE 150 AO@37.5C"


@pytest.mark.parametrize(
    ("line", "rails_w"),
    [
        (NX_JETPACK_4, {"VDD_IN": 6.14, "VDD_CPU_GPU_CV": 2.706, "VDD_SOC": 1.074}),
        (NX_JETPACK_5, {"VDD_IN": 2.763, "VDD_CPU_GPU_CV": 0.65, "VDD_SOC": 0.65}),
        (CORES_OFF, {"VDD_IN": 5.079, "VDD_CPU_GPU_CV": 0.696, "VDD_SOC": 1.104}),
        (f"{NOT_ROOT} {AGX_RAILS}", {"GPU": 1.155, "CPU": 0.385, "SOC": 2.504, "CV": 0.0, "VDDRQ": 0.192, "SYS5V": 2.692}),
        (f"{NOT_ROOT} {NANO_RAILS}", {"POM_5V_IN": 0.933, "POM_5V_GPU": 0.0, "POM_5V_CPU": 0.084}),
        (f"{NOT_ROOT} {ORIN_RAILS}", {"VDD_GPU_SOC": 5.139}),
        (NOT_ROOT, {}),
    ],
    ids=["nx-jp4", "nx-jp5", "cores-off", "agx", "nano", "orin", "not-root"],
)
def test_the_rails_of_every_board_are_the_momentary_watts(line: str, rails_w: dict[str, float]) -> None:
    stats = parse(line)
    assert stats is not None
    assert stats.rails_w == rails_w


@pytest.mark.parametrize(
    ("line", "temperatures_c"),
    [
        (NX_JETPACK_4, {"AO": 29.0, "GPU": 31.5, "AUX": 30.0, "CPU": 33.5, "thermal": 31.35}),
        (NX_JETPACK_5, {"AUX": 45.0, "CPU": 46.5, "thermal": 45.6, "AO": 45.0, "GPU": 45.5}),
        (CORES_OFF, {"AUX": 39.0, "CPU": 39.5, "AO": 37.5, "GPU": 37.5}),
        (f"{NOT_ROOT} CV0@-256C", {"AO": 37.5, "CV0": None}),
    ],
    ids=["nx-jp4", "nx-jp5", "cores-off", "unpowered"],
)
def test_temperatures_are_read_without_the_constant_pmic(line: str, temperatures_c: dict[str, float]) -> None:
    stats = parse(line)
    assert stats is not None
    assert stats.temperatures_c == temperatures_c


@pytest.mark.parametrize(("clock_text", "ratio"), [("0%@1109", 0.0), ("99%@[114]", 0.99), ("42%", 0.42), ("7%@[510,508]", 0.07)])
def test_the_load_of_the_gpu_is_read_with_any_form_of_clock(clock_text: str, ratio: float) -> None:
    stats = parse(NX_JETPACK_4.replace("GR3D_FREQ 0%@1109", f"GR3D_FREQ {clock_text}"))
    assert stats is not None
    assert stats.gpu_load_ratio == ratio


def test_a_line_without_the_gpu_has_no_load() -> None:
    stats = parse(NX_JETPACK_4.replace("GR3D_FREQ 0%@1109 ", ""))
    assert stats is not None
    assert stats.gpu_load_ratio is None


@pytest.mark.parametrize("line", ["", "tegrastats: permission denied", "VDD_IN 6140/5510", "07-09-2024 13:31:31 RAM"])
def test_other_text_is_no_status_line(line: str) -> None:
    assert parse(line) is None


Child = Callable[[str], Path]


@pytest.fixture
def child(tmp_path: Path) -> Child:
    """child(body) makes an executable that runs that Python text; `stay()` in it sleeps until a signal comes."""

    def write(body: str) -> Path:
        script = tmp_path / "tegrastats"
        script.write_text(
            f"#!{sys.executable}\nimport os, signal, sys\n"
            "def say(text, end='\\n'): sys.stdout.write(text + end); sys.stdout.flush()\n"
            "def stay():\n    while True: signal.pause()\n"
            f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n{body}\n"
        )
        script.chmod(0o755)
        return script

    return write


Start = Callable[[Path, float], TegrastatsMeter]


@pytest.fixture
def start(clock: Clock) -> Iterator[Start]:
    """start(executable, period_s) makes the meter and closes it after the test, passed or failed."""
    meters: List[TegrastatsMeter] = []

    def make(executable: Path, period_s: float) -> TegrastatsMeter:
        meters.append(TegrastatsMeter(executable, clock, period_s))
        return meters[-1]

    yield make
    for meter in meters:
        meter.close()


def first_reading(meter: TegrastatsMeter) -> Reading:
    """Waits for the child, up to ten seconds, as the meter thread does: by asking again."""
    never = threading.Event()
    for _ in range(1000):
        reading = meter.read()
        if reading is not None:
            return reading
        never.wait(0.01)
    raise AssertionError("the child said nothing in ten seconds")


def read_until(meter: TegrastatsMeter, is_there: Callable[[], bool]) -> None:
    """Asks the meter again and again, up to ten seconds, until something of the child's doing is there."""
    never = threading.Event()
    for _ in range(1000):
        assert meter.read() is None
        if is_there():
            return
        never.wait(0.01)
    raise AssertionError("the child did not do it in ten seconds")


def is_running(pid_file: Path) -> bool:
    try:
        os.kill(int(pid_file.read_text()), 0)
    except ProcessLookupError:
        return False
    return True


def test_the_newest_line_is_the_reading(child: Child, start: Start, clock: Clock) -> None:
    meter = start(child(f"say({NX_JETPACK_4!r} + '\\n' + {NX_JETPACK_5!r} + '\\n' + 'RAM 1/', end=''); stay()"), 0.2)
    reading = first_reading(meter)
    assert (reading.source, reading.quality, reading.power_w, reading.at_s) == ("tegrastats", "measured", 2.763, clock.now_s)
    assert set(reading.rails_w) == {"VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC"}
    assert (reading.temperatures_c["GPU"], reading.gpu_load_ratio) == (45.5, 0.0)
    assert meter.read() is None


def test_a_line_that_comes_in_two_pieces_is_one_line(child: Child, start: Start, tmp_path: Path) -> None:
    first, second = NX_JETPACK_5[:250], NX_JETPACK_5[250:]
    meter = start(child(f"signal.signal(signal.SIGUSR1, lambda *_: say({second!r})); say({first!r}, end=''); stay()"), 0.2)
    read_until(meter, lambda: bool(meter._buffer))
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGUSR1)
    reading = first_reading(meter)
    assert set(reading.rails_w) == {"VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC"}


def test_a_child_that_never_ends_its_line_takes_no_memory(child: Child, start: Start, tmp_path: Path) -> None:
    done = tmp_path / "done"
    meter = start(child(f"say('x' * 300_000, end=''); open({str(done)!r}, 'w'); stay()"), 0.2)
    read_until(meter, done.exists)
    assert meter.read() is None
    assert 0 < len(meter._buffer) <= 1 << 16


def test_the_child_has_a_session_of_its_own_so_that_ctrl_c_spares_it(child: Child, start: Start, tmp_path: Path) -> None:
    meter = start(child(f"say({NX_JETPACK_5!r}); stay()"), 0.2)
    first_reading(meter)
    pid = int((tmp_path / "pid").read_text())
    assert os.getsid(pid) == pid


def test_closing_ends_the_child(child: Child, start: Start, tmp_path: Path) -> None:
    meter = start(child(f"say({NX_JETPACK_5!r}); stay()"), 0.2)
    first_reading(meter)
    assert is_running(tmp_path / "pid")
    meter.close()
    assert not is_running(tmp_path / "pid")


def test_a_child_that_ignores_the_polite_signal_is_killed(child: Child, start: Start, tmp_path: Path) -> None:
    body = f"signal.signal(signal.SIGTERM, signal.SIG_IGN); say({NX_JETPACK_5!r}); stay()"
    meter = start(child(body), 0.2)
    first_reading(meter)
    meter.close()
    assert not is_running(tmp_path / "pid")


def test_the_interval_is_asked_for_in_milliseconds(child: Child, start: Start, tmp_path: Path) -> None:
    meter = start(child(f"open({str(tmp_path / 'args')!r}, 'w').write(' '.join(sys.argv[1:])); say({NX_JETPACK_5!r}); stay()"), 0.25)
    first_reading(meter)
    assert (tmp_path / "args").read_text() == "--interval 250"


def test_a_silent_child_makes_the_meter_unavailable_and_its_words_are_kept(child: Child, start: Start, clock: Clock) -> None:
    meter = start(child("say('cannot open the sensors'); stay()"), 0.2)
    never = threading.Event()
    with pytest.raises(MeterUnavailable, match="silent for 4 s; it said: cannot open the sensors"):  # noqa: PT012
        for _ in range(1000):  # the words arrive in their own time; only then may the clock move on
            meter.read()
            if meter._last_words:
                clock.now_s += 4
            never.wait(0.01)


def test_a_child_that_ends_makes_the_meter_unavailable_with_its_status(child: Child, start: Start) -> None:
    meter = start(child("say('not supported on this board'); sys.exit(3)"), 0.2)
    with pytest.raises(MeterUnavailable, match="ended with status 3; it said: not supported on this board"):
        first_reading(meter)


def test_the_last_line_of_a_child_that_ends_is_still_read(child: Child, start: Start) -> None:
    meter = start(child(f"say({NX_JETPACK_5!r})"), 0.2)
    assert first_reading(meter).power_w == 2.763


@pytest.mark.parametrize(("rails", "words"), [("", "no power at all"), (AGX_RAILS, "GPU, CPU, SOC")])
def test_a_board_whose_lines_show_no_input_rail_is_refused(child: Child, start: Start, rails: str, words: str) -> None:
    meter = start(child(f"say({(NOT_ROOT + ' ' + rails).strip()!r}); stay()"), 0.2)
    with pytest.raises(MeterUnavailable, match=words):
        first_reading(meter)


def test_a_missing_executable_is_refused_by_name(tmp_path: Path, clock: Clock) -> None:
    with pytest.raises(MeterUnavailable, match=r"tegrastats not found .*/nowhere"):
        TegrastatsMeter(tmp_path / "nowhere", clock, 0.2)


def test_a_file_that_can_not_be_run_is_refused_with_the_reason(tmp_path: Path, clock: Clock) -> None:
    (tmp_path / "tegrastats").write_text("not a program")
    with pytest.raises(MeterUnavailable, match=r"can't be started: .*permission denied"):
        TegrastatsMeter(tmp_path / "tegrastats", clock, 0.2)
