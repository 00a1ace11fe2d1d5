"""systemd's datagrams, received by a socket of the test's own."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path
from typing import Dict, Iterator, List

import pytest

from latentd.service import notify
from latentd.service.notify import Notifier
from service.fakes import WAIT_S


class Manager:
    """The other end: what arrived, one dictionary a datagram."""

    def __init__(self, address: str) -> None:
        self.environ = {"NOTIFY_SOCKET": address}
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.settimeout(WAIT_S)
        self.socket.bind(f"\0{address[1:]}" if address.startswith("@") else address)

    def hears(self) -> Dict[str, str]:
        return dict(line.split("=", 1) for line in self.socket.recv(4096).decode().split("\n"))

    def hears_nothing(self) -> bool:
        self.socket.setblocking(False)
        try:
            self.socket.recv(4096)
        except BlockingIOError:
            return True
        return False


@pytest.fixture(params=["file", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    made = Manager(str(tmp_path / "notify") if request.param == "file" else f"@latentd-test-{os.getpid()}-{tmp_path.name}")
    yield made
    made.socket.close()


def notifier(manager: Manager, **environ: str) -> Notifier:
    return Notifier.from_environ({**manager.environ, **environ})


def test_a_life_is_told_in_the_managers_words(manager: Manager) -> None:
    told = notifier(manager)
    told.ready("one\nline")
    assert manager.hears() == {"READY": "1", "STATUS": "one line"}
    told.reloading()
    reloading = manager.hears()
    assert reloading["RELOADING"] == "1"
    assert int(reloading["MONOTONIC_USEC"]) > 0
    told.alive()
    assert manager.hears() == {"WATCHDOG": "1"}
    told.stopping()
    assert manager.hears()["STOPPING"] == "1"
    told.close()


def test_a_status_that_did_not_change_is_told_once(manager: Manager) -> None:
    told = notifier(manager)
    for sentence in ("a", "a", "b"):
        told.status(sentence)
    assert [manager.hears(), manager.hears()] == [{"STATUS": "a"}, {"STATUS": "b"}]
    assert manager.hears_nothing()
    told.close()


def test_a_long_start_asks_for_more_time_until_it_is_done(manager: Manager, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notify, "EXTEND_EVERY_S", 0.001)
    told = notifier(manager)
    with told.starting("loading"):
        heard = [manager.hears() for _ in range(3)]
    assert heard == [{"STATUS": "loading"}, {"EXTEND_TIMEOUT_USEC": "60000000"}, {"EXTEND_TIMEOUT_USEC": "60000000"}]
    while not manager.hears_nothing():
        pass
    assert manager.hears_nothing()
    told.close()


def test_a_start_that_hangs_gets_no_more_time(manager: Manager, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(notify, "EXTEND_EVERY_S", 0.0)
    times: List[float] = [0.0, 1.0, notify.LONGEST_START_S + 1]
    told = notifier(manager)
    with told.starting("loading", lambda: times.pop(0)):
        manager.hears()
        assert "EXTEND_TIMEOUT_USEC" in manager.hears()
        while times:
            threading.Event().wait(0.001)
    assert manager.hears_nothing()
    assert "no more time" in caplog.text
    told.close()


def test_a_manager_that_is_gone_is_no_reason_to_fail(manager: Manager) -> None:
    told = notifier(manager)
    manager.socket.close()
    told.ready("still here")
    told.close()


def test_without_a_manager_nothing_is_told_and_no_thread_is_started() -> None:
    told = Notifier.from_environ({"WATCHDOG_USEC": "1000000"})
    with told.starting("loading"):
        told.ready("ready")
    assert told.watchdog_s is None
    told.close()


def test_an_address_of_another_kind_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    assert Notifier.from_environ({"NOTIFY_SOCKET": "vsock:2:1234", "WATCHDOG_USEC": "1000000"}).watchdog_s is None
    assert "vsock:2:1234" in caplog.text


@pytest.mark.parametrize(
    ("pid", "usec", "expected"),
    [("", "30000000", 30.0), (str(os.getpid()), "500000", 0.5), ("1", "30000000", None), ("", "0", None), ("", "soon", None)],
)
def test_the_watchdogs_patience_is_read_when_it_is_meant_for_this_process(manager: Manager, pid: str, usec: str, expected: float) -> None:
    told = notifier(manager, WATCHDOG_USEC=usec, WATCHDOG_PID=pid)
    assert told.watchdog_s == expected
    told.close()
