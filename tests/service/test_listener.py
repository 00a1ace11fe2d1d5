from __future__ import annotations

import socket

import pytest

from latentd.errors import ConfigError
from latentd.service.listener import bind


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
