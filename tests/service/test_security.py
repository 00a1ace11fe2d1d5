from __future__ import annotations

import asyncio
import logging
import threading
from typing import Any, Callable, Dict, List

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentd.service.security import CONTENT_SECURITY_POLICY, is_loopback_name
from service.fakes import World, assert_problem, picture


@pytest.mark.parametrize("host", ["127.0.0.1:8420", "localhost:8420", "LOCALHOST", "[::1]:8420", "127.9.9.9", "page.localhost:80"])
def test_loopback_names_are_served(world: World, host: str) -> None:
    assert world.call("GET", "/livez", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "127.0.0.1.evil.example:8420",
        "localhost.evil.example",
        "192.168.1.7:8420",
        "0.0.0.0:8420",
        "[::2]",
        "",
        "evil.example@127.0.0.1",
        "127.0.0.1 evil",
        "[::1",
        "localhost.",
    ],
)
def test_other_names_are_refused_whatever_the_route(world: World, host: str) -> None:
    for path in ("/livez", "/", "/v1/status", "/nothing"):
        assert_problem(world.call("GET", path, headers={"Host": host}), 403, "forbidden")


@given(st.text(max_size=30))
def test_no_host_text_breaks_the_check(host: str) -> None:
    assert is_loopback_name(host) in (True, False)


def test_two_host_headers_match_nothing(world: World) -> None:
    assert_problem(_bare(world, [(b"host", b"127.0.0.1"), (b"host", b"evil.example")]), 403, "forbidden")
    assert_problem(_bare(world, []), 403, "forbidden")


def test_configured_names_are_served_too(new_world: Callable[..., World]) -> None:
    world = new_world(allowed_hosts=("Device.local",))
    assert world.call("GET", "/livez", headers={"Host": "device.local:8420"}).status_code == 200
    assert_problem(world.call("GET", "/livez", headers={"Host": "other.local"}), 403, "forbidden")


@pytest.mark.parametrize(
    "origin",
    ["https://evil.example", "null", "http://localhost:8421", "http://127.0.0.1:8420.evil.example", "file://", "http://localhost", ""],
)
def test_cross_origin_requests_are_refused(world: World, origin: str) -> None:
    answer = world.classify(picture(), headers={"Host": "localhost:8420", "Origin": origin})
    assert_problem(answer, 403, "forbidden")
    assert world.stage.batches == []


@pytest.mark.parametrize("origin", ["http://localhost:8420", "https://localhost:8420", "HTTP://LOCALHOST:8420"])
def test_the_own_page_may_ask(world: World, origin: str) -> None:
    answer = world.classify(picture(), headers={"Host": "localhost:8420", "Origin": origin, "Sec-Fetch-Site": "same-origin"})
    assert answer.status_code == 200
    assert not any(name.startswith("access-control") for name in answer.headers)


@pytest.mark.parametrize(
    ("method", "fetch", "status"),
    [
        ("GET", {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "image"}, 403),
        ("GET", {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "cors", "Sec-Fetch-Dest": "empty"}, 403),
        ("GET", {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "iframe"}, 403),
        ("POST", {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}, 403),
        ("GET", {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}, 200),
        ("GET", {"Sec-Fetch-Site": "none", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}, 200),
        ("GET", {"Sec-Fetch-Site": "same-origin", "Sec-Fetch-Mode": "cors", "Sec-Fetch-Dest": "empty"}, 200),
    ],
)
def test_what_browsers_say_of_the_asker_counts(world: World, method: str, fetch: Dict[str, str], status: int) -> None:
    assert world.call(method, "/livez", headers=fetch).status_code == status


def test_every_answer_carries_the_security_headers_and_an_id(world: World) -> None:
    for path in ("/livez", "/docs", "/nothing"):
        headers = world.call("GET", path).headers
        assert headers["content-security-policy"] == CONTENT_SECURITY_POLICY
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store"
        assert len(headers["x-request-id"]) == 16
    assert "unsafe" not in CONTENT_SECURITY_POLICY


@pytest.mark.parametrize(
    ("given_id", "kept"), [("trace-1.2_3", True), ("x" * 64, True), ("x" * 65, False), ("a b", False), ("\u00e9", False), ("", False)]
)
def test_a_sane_request_id_is_kept(world: World, given_id: str, kept: bool) -> None:
    answer = world.call("GET", "/nothing", headers={"X-Request-Id": given_id.encode("latin-1")})
    assert (answer.headers["x-request-id"] == given_id) == kept
    assert answer.json()["request_id"] == answer.headers["x-request-id"]


def test_one_connection_too_many_is_overloaded(new_world: Callable[..., World]) -> None:
    world = new_world(max_connections=3)
    world.parts.open_connections = lambda: 3
    assert world.call("GET", "/livez").status_code == 200
    world.parts.open_connections = lambda: 4
    answer = world.call("GET", "/livez")
    assert_problem(answer, 503, "overloaded")
    assert answer.headers["retry-after"] == "1"


def test_a_bug_is_a_500_that_hides_its_cause_and_logs_it(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> None:
        raise ZeroDivisionError("the secret cause")

    monkeypatch.setattr(world.learner, "accuracy", broken)
    with caplog.at_level(logging.ERROR):
        answer = world.call("GET", "/v1/accuracy")
    problem = assert_problem(answer, 500, "internal-error")
    assert "secret" not in answer.text
    assert problem["request_id"] in caplog.text
    assert "the secret cause" in caplog.text and "Traceback" in caplog.text
    assert world.call("GET", "/livez").status_code == 200


def test_head_gives_the_headers_of_get_without_a_body(world: World) -> None:
    got, head = world.call("GET", "/livez"), world.call("HEAD", "/livez")
    assert (head.status_code, head.content, head.headers["content-length"]) == (200, b"", got.headers["content-length"])
    refused = world.call("HEAD", "/v1/classify")
    assert (refused.status_code, refused.content, refused.headers["allow"]) == (405, b"", "POST")


def test_a_client_that_leaves_has_its_waiting_images_dropped(world: World) -> None:
    async def leave() -> int:
        world.stage.gate.clear()
        running = asyncio.ensure_future(world.acall("POST", "/v1/classify", files=[("image", picture())]))
        await asyncio.get_running_loop().run_in_executor(None, world.stage.entered.wait, 10)
        sent: List[Any] = []
        left = asyncio.Event()
        body = iter([{"type": "http.request", "body": picture(1), "more_body": False}])

        async def receive() -> Any:
            message = next(body, None)
            if message is None:
                await left.wait()
                return {"type": "http.disconnect"}
            return message

        async def send(message: Any) -> None:
            sent.append(message)

        queued = threading.Event()
        enqueue = world.parts.batcher.enqueue

        def noted(ticket: Any, pixels: Any) -> None:
            enqueue(ticket, pixels)
            queued.set()

        world.parts.batcher.enqueue = noted  # type: ignore[method-assign]
        gone = asyncio.ensure_future(world.app(_scope("POST", "/v1/classify", [(b"content-type", b"image/png")]), receive, send))
        assert await asyncio.get_running_loop().run_in_executor(None, queued.wait, 10)
        left.set()
        await gone
        world.stage.gate.set()
        await running
        await world.acall("POST", "/v1/classify", files=[("image", picture())])
        return len(sent)

    assert asyncio.run(leave()) == 0
    assert world.stage.batches == [1, 1]
    assert 'code="499"' in world.call("GET", "/metrics").text


def _scope(method: str, path: str, headers: List[Any]) -> Dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "scheme": "http",
        "server": ("127.0.0.1", 8420),
        "client": ("127.0.0.1", 1),
        "headers": [(b"host", b"127.0.0.1:8420"), *headers],
    }


def _bare(world: World, headers: List[Any]) -> Any:
    """An answer to a request with exactly these headers, as an httpx response."""

    sent: List[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(world.app({**_scope("GET", "/livez", []), "headers": headers}, receive, send))
    return httpx.Response(sent[0]["status"], headers=sent[0]["headers"], content=sent[1]["body"])
