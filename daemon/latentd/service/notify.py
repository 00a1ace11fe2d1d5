"""What the daemon tells the service manager that started it: ready, reloading, stopping, still alive, in systemd's datagrams.

Owns the notification socket. `send` may be called from any thread and never blocks; where nobody listens, or the manager is gone, it does
nothing, for no word to a manager is worth a request. The protocol is that of sd_notify(3), without libsystemd.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from contextlib import contextmanager
from typing import Callable, Iterator, Mapping, Optional

log = logging.getLogger(__name__)

EXTEND_S = 60.0  # a start that takes long asks for so much more time, again and again
EXTEND_EVERY_S = 15.0
LONGEST_START_S = 1800.0  # a start that takes longer hangs: the manager may end it


class Notifier:
    """One way to the service manager. watchdog_s: how long it waits for WATCHDOG=1 before it kills us; None: it does not wait."""

    def __init__(self, address: str = "", watchdog_s: Optional[float] = None) -> None:
        """address: NOTIFY_SOCKET, a path or "@" and the name of an abstract socket; empty: nobody wants to know."""
        self.watchdog_s = watchdog_s
        self._address = f"\0{address[1:]}" if address.startswith("@") else address
        self._status = ""
        self._socket: Optional[socket.socket] = None
        if self._address:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._socket.setblocking(False)

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Notifier:
        """The manager that the environment names. An address of another kind than a socket file is logged and left alone."""
        address = environ.get("NOTIFY_SOCKET", "")
        if address and not address.startswith(("/", "@")):
            log.warning("NOTIFY_SOCKET=%s is of no kind that latentd knows; the service manager hears nothing", address)
            address = ""
        return cls(address, _watchdog_s(environ) if address else None)

    def send(self, *assignments: str) -> None:
        """One datagram of assignments, "READY=1" for example."""
        if self._socket is None:
            return
        try:
            self._socket.sendto("\n".join(assignments).encode("utf-8"), self._address)
        except OSError as cause:
            log.debug("the service manager did not hear %s: %s", assignments[0], cause)

    def status(self, sentence: str) -> None:
        """The line that `systemctl status` shows; a repeated one is not sent again."""
        if sentence != self._status:
            self._status = sentence
            self.send(status_line(sentence))

    def reloading(self) -> None:
        """A reload begins; `ready` ends it."""
        self.send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def ready(self, sentence: str) -> None:
        self._status = sentence
        self.send("READY=1", status_line(sentence))

    def stopping(self) -> None:
        self.send("STOPPING=1", status_line("stopping: finishing what was begun"))

    def alive(self) -> None:
        self.send("WATCHDOG=1")

    @contextmanager
    def starting(self, sentence: str, clock: Callable[[], float] = time.monotonic) -> Iterator[None]:
        """While the block runs, asks for more time to start, up to LONGEST_START_S: a first start exports a graph, which takes minutes on
        a small board.
        """
        if self._socket is None:
            yield
            return
        self.status(sentence)
        done = threading.Event()
        thread = threading.Thread(target=self._extend, args=(done, clock), name="notify", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _extend(self, done: threading.Event, clock: Callable[[], float]) -> None:
        until = clock() + LONGEST_START_S
        while clock() < until:
            self.send(f"EXTEND_TIMEOUT_USEC={int(EXTEND_S * 1e6)}")
            if done.wait(EXTEND_EVERY_S):
                return
        log.error("starting has taken %.0f minutes: the service manager is asked for no more time", LONGEST_START_S / 60)

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def status_line(sentence: str) -> str:
    """The assignment of a sentence: one line, whatever it holds."""
    return f"STATUS={' '.join(sentence.split())}"


def _watchdog_s(environ: Mapping[str, str]) -> Optional[float]:
    """WATCHDOG_USEC in seconds, when it is meant for this process."""
    wanted, pid = environ.get("WATCHDOG_USEC", ""), environ.get("WATCHDOG_PID", "")
    if not wanted.isdigit() or int(wanted) == 0 or (pid and pid != str(os.getpid())):
        return None
    return int(wanted) / 1e6
