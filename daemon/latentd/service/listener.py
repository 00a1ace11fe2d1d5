"""Where the daemon listens: one socket, bound before anything slow starts, or taken over from systemd, which bound it before us.

A TCP socket must have a loopback address; systemd may hand over a unix socket as well. Called once by the supervisor; blocks for no longer
than a bind.
"""

from __future__ import annotations

import errno
import os
import socket
from contextlib import ExitStack
from typing import Mapping, NamedTuple, Optional, Tuple

from latentd.errors import ConfigError
from latentd.service.security import is_loopback_name

ONE_SOCKET = "Give latentd.socket one ListenStream=, a loopback address or a path."
FIRST_FD = 3  # of the sockets that systemd hands over: sd_listen_fds(3)


class Listener(NamedTuple):
    """The bound socket, and the URL that reaches it; "unix:" and the path for a unix socket."""

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


def adopt(environ: Mapping[str, str], first_fd: int = FIRST_FD) -> Optional[Listener]:
    """The socket that systemd opened for this process (LISTEN_PID, LISTEN_FDS); None: it opened none.

    Raises ConfigError for more than one socket, one that takes no connections, and a TCP socket that other machines can reach.
    """
    if environ.get("LISTEN_PID") != str(os.getpid()) or environ.get("LISTEN_FDS", "0") == "0":
        return None
    if environ["LISTEN_FDS"] != "1":
        raise ConfigError(f"systemd handed over {environ['LISTEN_FDS']} sockets; latentd listens on one", hint=ONE_SOCKET)
    os.set_inheritable(first_fd, False)  # a compiler that we start must not hold the port
    with ExitStack() as on_refusal:
        handed = on_refusal.enter_context(socket.socket(fileno=first_fd))
        listener = Listener(handed, _url(handed))
        on_refusal.pop_all()
    return listener


def _url(handed: socket.socket) -> str:
    """What reaches a socket that was handed over; ConfigError where it is none that latentd may listen on."""
    if handed.type != socket.SOCK_STREAM or not handed.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        raise ConfigError("the socket that systemd handed over takes no connections", hint=ONE_SOCKET)
    name = handed.getsockname()
    if handed.family == socket.AF_UNIX:
        return f"unix:{name}"
    host = f"[{name[0]}]" if handed.family == socket.AF_INET6 else name[0]
    if not is_loopback_name(host):
        raise ConfigError(f"systemd handed over {host}:{name[1]}, which can be reached from other machines", hint=ONE_SOCKET)
    return f"http://{host}:{name[1]}"


def _parsed(address: str) -> Tuple[str, int]:
    host, _, port = address.rpartition(":")
    host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not host or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"http.bind = {address!r} is not an address and a port", hint="Write it like 127.0.0.1:8420, or [::1]:8420.")
    return host.lower(), int(port)


def _cannot_bind(address: str, cause: OSError) -> ConfigError:
    hint = "Choose a free port with --bind; port 0 takes any." if cause.errno == errno.EADDRINUSE else "Choose another address with --bind."
    return ConfigError(f"{address} can't be bound: {cause.strerror}", hint=hint)
