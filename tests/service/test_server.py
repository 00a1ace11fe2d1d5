"""Through a real socket: what clients that stream, stall, pipeline or crowd get."""

from __future__ import annotations

import json
import logging
import socket
import threading
from typing import Any, Callable, Dict, List, Tuple

import httpx
import pytest

from service.conftest import Served
from service.fakes import WAIT_S, World, picture

Serve = Callable[[World], Served]


def answer_of(connection: socket.socket) -> Tuple[int, Dict[str, str], bytes]:
    """Status, headers and body of the next answer."""
    received = b""
    while b"\r\n\r\n" not in received:
        received += _more(connection)
    head, _, body = received.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    while len(body) < int(headers["content-length"]):
        body += _more(connection)
    return int(lines[0].split(" ")[1]), headers, body


def _more(connection: socket.socket) -> bytes:
    data = connection.recv(65536)
    assert data, "the server closed the connection"
    return data


def head(served: Served, *lines: str, method: str = "POST", path: str = "/v1/classify") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", f"Host: {served.url[7:]}", *lines, "", ""]).encode()


def test_a_daemon_serves_many_requests_on_one_connection(world: World, serve: Serve) -> None:
    served = serve(world)
    with httpx.Client(base_url=served.url, trust_env=False, timeout=WAIT_S) as client:
        for seed in range(5):
            assert client.post("/v1/classify", content=picture(seed), headers={"Content-Type": "image/png"}).status_code == 200
        assert client.head("/livez").headers["content-length"] == "15"


def test_concurrent_clients_share_batches(world: World, serve: Serve) -> None:
    served = serve(world)
    world.stage.gate.clear()
    statuses: List[int] = []

    def ask(seed: int) -> None:
        with httpx.Client(base_url=served.url, trust_env=False, timeout=WAIT_S) as client:
            statuses.append(client.post("/v1/classify", content=picture(seed), headers={"Content-Type": "image/png"}).status_code)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(9)]
    for thread in threads:
        thread.start()
    assert world.stage.entered.wait(WAIT_S)
    while sum(len(queue) for queue in world.parts.batcher._queues.values()) + world.stage.batches[0] < 9:
        threading.Event().wait(0.001)
    world.stage.gate.set()
    for thread in threads:
        thread.join(WAIT_S)
    assert statuses == [200] * 9
    assert max(world.stage.batches) > 1
    assert sum(world.stage.batches) == 9


def test_a_chunked_body_over_the_limit_is_refused_while_it_still_comes(new_world: Callable[..., World], serve: Serve) -> None:
    world = new_world(max_body_bytes=100_000, max_image_bytes=100_000)
    served = serve(world)
    with served.connect() as connection:
        connection.sendall(head(served, "Content-Type: image/png", "Transfer-Encoding: chunked"))
        for _ in range(11):
            connection.sendall(b"2710\r\n" + b"x" * 10_000 + b"\r\n")
        status, headers, body = answer_of(connection)  # the last chunk was never sent
        assert (status, headers["content-type"]) == (413, "application/problem+json")
        assert json.loads(body)["code"] == "too-large"
        connection.sendall(b"0\r\n\r\n")
        connection.sendall(head(served, method="GET", path="/livez"))
        assert answer_of(connection)[0] == 200
    assert world.parts.pending.held == 0


def test_an_announced_body_over_the_limit_is_refused_before_it_comes(world: World, serve: Serve) -> None:
    served = serve(world)
    with served.connect() as connection:
        connection.sendall(head(served, "Content-Type: image/png", "Content-Length: 999999999999", "Expect: 100-continue"))
        assert answer_of(connection)[0] == 413


def test_a_body_that_trickles_is_given_up_after_its_time(new_world: Callable[..., World], serve: Serve) -> None:
    world = new_world(body_timeout_s=0.1)
    served = serve(world)
    with served.connect() as connection:
        connection.sendall(head(served, "Content-Type: image/png", "Content-Length: 1000") + b"x")
        status, _, body = answer_of(connection)
    assert (status, json.loads(body)["code"]) == (408, "request-timeout")
    assert world.parts.pending.held == 0


def test_a_client_that_hangs_up_in_its_body_leaves_nothing_behind(world: World, serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    served = serve(world)
    with caplog.at_level(logging.WARNING):
        with served.connect() as connection:
            connection.sendall(head(served, "Content-Type: image/png", "Content-Length: 1000") + b"x" * 500)
        while 'code="499"' not in httpx.get(f"{served.url}/metrics", trust_env=False).text:
            threading.Event().wait(0.001)
    assert world.parts.pending.held == 0
    assert caplog.records == []


def test_the_connection_too_many_gets_a_problem_and_the_others_go_on(new_world: Callable[..., World], serve: Serve) -> None:
    world = new_world(max_connections=2)
    served = serve(world)
    with served.connect() as one, served.connect() as two, served.connect() as three:
        for connection in (one, two, three):  # a connection counts once the server has accepted it
            connection.sendall(head(served, method="GET", path="/livez"))
            status, headers, body = answer_of(connection)
        while len(served.server.server_state.connections) < 3:
            threading.Event().wait(0.001)
        three.sendall(head(served, method="GET", path="/livez"))
        status, headers, body = answer_of(three)
        assert (status, headers["retry-after"], json.loads(body)["code"]) == (503, "1", "overloaded")
        three.close()
        while len(served.server.server_state.connections) > 2:
            threading.Event().wait(0.001)
        one.sendall(head(served, method="GET", path="/livez"))
        assert answer_of(one)[0] == 200


def test_answers_leave_at_once(world: World, serve: Serve) -> None:
    """The socket the server accepts has Nagle's delay off."""
    served = serve(world)
    with served.connect() as connection:
        connection.sendall(head(served, method="GET", path="/livez"))
        answer_of(connection)
        (protocol,) = served.server.server_state.connections
        transport: Any = protocol.transport
        assert transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def is_accepting(served: Served) -> bool:
    try:
        served.connect().close()
    except ConnectionError:
        return False
    return True


def test_requests_in_flight_are_finished_when_the_server_stops(world: World, serve: Serve) -> None:
    served = serve(world)
    world.stage.gate.clear()
    with served.connect() as connection:
        image = picture()
        connection.sendall(head(served, "Content-Type: image/png", f"Content-Length: {len(image)}") + image)
        assert world.stage.entered.wait(WAIT_S)
        served.server.should_exit = True
        while is_accepting(served):
            threading.Event().wait(0.005)
        world.stage.gate.set()
        assert answer_of(connection)[0] == 200
    served.stop()


def test_garbage_instead_of_http_does_no_harm(world: World, serve: Serve) -> None:
    served = serve(world)
    for garbage in (b"\x16\x03\x01\x02\x00\x01\x00", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\r\n" * 100, b"A" * 100_000):
        with served.connect() as connection:
            connection.sendall(garbage)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(65536):
                pass
    assert httpx.get(f"{served.url}/livez", trust_env=False).status_code == 200
