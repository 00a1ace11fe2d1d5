"""Where the daemon listens: one TCP socket on a loopback address, bound before anything slow starts.

Called once by the supervisor; blocks for no longer than a bind.
"""

from __future__ import annotations

import errno
import socket
from typing import NamedTuple, Tuple

from latentd.errors import ConfigError
from latentd.service.security import is_loopback_name


class Listener(NamedTuple):
    """The bound socket, and the URL that reaches it."""

    socket: socket.socket
    url: str


def bind(address: str) -> Listener:
    """Binds http.bind ("127.0.0.1:8420", "[::1]:0"). Raises ConfigError: malformed, not loopback, taken, not permitted."""
    host, port = _parsed(address)
    if not is_loopback_name(f"[{host}]" if ":" in host else host):
        raise ConfigError(
            f"http.bind = {address}: {host} can be reached from other machines, and nothing would ask them for a password.",
            hint="Listen on 127.0.0.1, and let an SSH tunnel or a proxy that authenticates bring others in.",
        )
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)[0]
        listener = socket.socket(family, kind, protocol)  # asyncio turns Nagle's delay off only where the protocol is named
    except OSError as cause:
        raise ConfigError(f"http.bind = {address} is no address of this machine: {cause}", hint="Try 127.0.0.1:8420.") from cause
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(target)
    except OSError as cause:
        listener.close()
        raise _cannot_bind(address, cause) from cause
    return Listener(listener, f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}")


def _parsed(address: str) -> Tuple[str, int]:
    host, _, port = address.rpartition(":")
    host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not host or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"http.bind = {address!r} is not an address and a port", hint="Write it like 127.0.0.1:8420, or [::1]:8420.")
    return host.lower(), int(port)


def _cannot_bind(address: str, cause: OSError) -> ConfigError:
    hint = "Choose a free port with --bind; port 0 takes any." if cause.errno == errno.EADDRINUSE else "Choose another address with --bind."
    return ConfigError(f"{address} can't be bound: {cause.strerror}", hint=hint)
