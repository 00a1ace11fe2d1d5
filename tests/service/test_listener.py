from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Dict

import pytest

from latentd.errors import ConfigError
from latentd.service.listener import adopt, bind


@pytest.mark.parametrize(
    ("address", "url"), [("127.0.0.1:0", "http://127.0.0.1:"), ("localhost:0", "http://localhost:"), ("LOCALHOST:0", "http://localhost:")]
)
def test_port_0_takes_a_free_port_and_the_url_names_it(address: str, url: str) -> None:
    listener = bind(address)
    with listener.socket:
        assert listener.url == f"{url}{listener.socket.getsockname()[1]}"


@pytest.mark.skipif(not socket.has_ipv6, reason="this Python has no IPv6")
def test_ipv6_loopback_is_written_in_brackets() -> None:
    try:
        listener = bind("[::1]:0")
    except ConfigError as absent:
        pytest.skip(f"no IPv6 loopback here: {absent}")
    with listener.socket:
        assert listener.url.startswith("http://[::1]:")


@pytest.mark.parametrize("address", ["0.0.0.0:0", "192.168.1.7:8420", "[::]:0", "example.org:80", "[2001:db8::1]:80"])
def test_addresses_that_others_can_reach_are_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="other machines"):
        bind(address)


@pytest.mark.parametrize("address", ["", "8420", ":8420", "127.0.0.1", "127.0.0.1:", "127.0.0.1:port", "127.0.0.1:99999", "::1"])
def test_malformed_addresses_are_refused(address: str) -> None:
    with pytest.raises(ConfigError):
        bind(address)


def test_a_taken_port_says_so_and_what_to_do() -> None:
    first = bind("127.0.0.1:0")
    with first.socket:
        first.socket.listen(1)
        with pytest.raises(ConfigError) as refused:
            bind(first.url[len("http://") :])
    assert "--bind" in refused.value.hint


def test_small_answers_are_not_held_back_by_nagles_algorithm() -> None:
    """asyncio sets TCP_NODELAY only on sockets whose protocol is given; without it every answer waits 40 ms for an ACK."""
    listener = bind("127.0.0.1:0")
    with listener.socket:
        assert listener.socket.proto == socket.IPPROTO_TCP


def handed_over(count: int = 1) -> Dict[str, str]:
    return {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(count)}


def test_a_socket_that_systemd_bound_is_taken_over(tmp_path: Path) -> None:
    with socket.socket() as tcp:
        tcp.bind(("127.0.0.1", 0))
        tcp.listen()
        fd = os.dup(tcp.fileno())
        os.set_inheritable(fd, True)
        adopted = adopt(handed_over(), fd)
        assert adopted is not None
        with adopted.socket:
            assert adopted.url == f"http://127.0.0.1:{tcp.getsockname()[1]}"
            assert (adopted.socket.family, adopted.socket.proto) == (socket.AF_INET, socket.IPPROTO_TCP)
            assert not os.get_inheritable(fd), "a compiler that we start must not hold the port"


def test_a_unix_socket_is_taken_over_under_its_path(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(tmp_path / "s"))
        unix.listen()
        adopted = adopt(handed_over(), os.dup(unix.fileno()))
        assert adopted is not None
        with adopted.socket:
            assert adopted.url == f"unix:{tmp_path / 's'}"


@pytest.mark.parametrize("environ", [{}, {"LISTEN_FDS": "1"}, {"LISTEN_PID": "1", "LISTEN_FDS": "1"}, handed_over(0)])
def test_sockets_of_somebody_else_are_left_alone(environ: Dict[str, str]) -> None:
    assert adopt(environ, -1) is None


def test_a_socket_that_others_can_reach_is_refused() -> None:
    with socket.socket() as tcp:
        tcp.bind(("0.0.0.0", 0))
        tcp.listen()
        with pytest.raises(ConfigError, match="other machines"):
            adopt(handed_over(), os.dup(tcp.fileno()))


def test_two_sockets_and_one_that_takes_no_connections_are_refused() -> None:
    with pytest.raises(ConfigError, match="2 sockets"):
        adopt(handed_over(2), -1)
    with socket.socket(type=socket.SOCK_DGRAM) as datagrams:
        datagrams.bind(("127.0.0.1", 0))
        with pytest.raises(ConfigError, match="takes no connections"):
            adopt(handed_over(), os.dup(datagrams.fileno()))
