from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, Dict, List

import httpx
import pytest

from latentd import config
from latentd.cli.client import Client, Refused, address
from latentd.errors import NoAnswer, NotLatentd, Unreachable

FULL = {"title": "A queue is full", "status": 503, "code": "overloaded", "detail": "256 images wait.", "hint": "Wait."}


def problem(status: int, body: Dict[str, Any], **headers: str) -> httpx.Response:
    return httpx.Response(status, json=body, headers={"Content-Type": "application/problem+json", **headers})


class Clock:
    """Time that passes only in sleep()."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: List[float] = []

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def client(answer: Callable[[httpx.Request], httpx.Response], clock: Clock) -> Client:
    return Client("http://127.0.0.1:1", transport=httpx.MockTransport(answer), sleep=clock.sleep, clock=lambda: clock.now)


def test_a_daemon_that_says_later_is_asked_again_after_that_time() -> None:
    answers = [problem(503, FULL, **{"Retry-After": "2"}), problem(503, FULL, **{"Retry-After": "3"}), httpx.Response(200, json={"ok": 1})]
    clock = Clock()
    with client(lambda request: answers.pop(0), clock) as daemon:
        assert daemon.send("POST", "/v1/learn", patience_s=60).body == {"ok": 1}
    assert clock.slept == [2, 3]


def test_patience_ends() -> None:
    clock = Clock()
    with client(lambda request: problem(503, FULL, **{"Retry-After": "4"}), clock) as daemon, pytest.raises(
        Refused, match="256 images wait"
    ):
        daemon.send("POST", "/v1/learn", patience_s=10)
    assert clock.slept == [4, 4]


@pytest.mark.parametrize("answer", [problem(503, FULL), problem(409, {**FULL, "status": 409}, **{"Retry-After": "1"})])
def test_only_a_503_that_names_a_time_is_waited_for(answer: httpx.Response) -> None:
    clock = Clock()
    with client(lambda request: answer, clock) as daemon, pytest.raises(Refused) as refused:
        daemon.send("GET", "/v1/status", patience_s=60)
    assert refused.value.problem == answer.json()
    assert clock.slept == []


@pytest.mark.parametrize(
    "answer",
    [
        httpx.Response(200, text="<html>a router</html>"),
        httpx.Response(200, json=["a list"]),
        httpx.Response(404, json={"detail": "somebody else's JSON"}),
        httpx.Response(502, text=""),
    ],
)
def test_another_server_at_the_address_is_told_from_latentd(answer: httpx.Response) -> None:
    with client(lambda request: answer, Clock()) as daemon, pytest.raises(NotLatentd, match=r"127\.0\.0\.1:1"):
        daemon.get("/v1/status")


@pytest.mark.parametrize(
    "error", [httpx.ReadTimeout("slow"), httpx.RemoteProtocolError("Server disconnected."), httpx.WriteError("broken pipe")]
)
def test_a_connection_that_breaks_is_no_answer(error: httpx.TransportError) -> None:
    def broken(request: httpx.Request) -> httpx.Response:
        raise error

    with client(broken, Clock()) as daemon, pytest.raises(NoAnswer):
        daemon.get("/v1/status")


def test_a_proxy_of_the_environment_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    with Client("http://127.0.0.1:1") as daemon, pytest.raises(Unreachable, match=r"127\.0\.0\.1:1"):
        daemon.get("/v1/status")


@pytest.mark.parametrize(
    ("bind", "noted", "expected"),
    [
        (None, None, "http://127.0.0.1:8420"),
        (None, "http://127.0.0.1:4000", "http://127.0.0.1:4000"),
        ("127.0.0.1:9000", "http://127.0.0.1:4000", "http://127.0.0.1:9000"),
        ("127.0.0.1:0", "http://127.0.0.1:4000", "http://127.0.0.1:4000"),
        ("[::1]:9000", None, "http://[::1]:9000"),
    ],
)
def test_the_address_is_the_configured_one_or_the_one_that_the_daemon_noted(bind: Any, noted: Any, expected: str, tmp_path: Path) -> None:
    if noted:
        (tmp_path / "address").write_text(f"{noted}\n")
    assert address(config.load({}, {"http.bind": bind, "state.dir": str(tmp_path)}, system=tmp_path)) == expected


def test_port_0_without_a_note_means_that_no_daemon_runs(tmp_path: Path) -> None:
    with pytest.raises(Unreachable, match="noted its address"):
        address(config.load({}, {"http.bind": "127.0.0.1:0", "state.dir": str(tmp_path)}, system=tmp_path))
