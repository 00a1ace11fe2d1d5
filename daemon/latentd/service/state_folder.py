"""The state folder of one daemon: made, locked against a second daemon, and marked with the address that the command line looks for.

Used by the supervisor at start and stop; blocks on the disk only. The lock is the kernel's, so it ends with the process however that ends.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import IO, Optional

from latentd.errors import ConfigError, StateInUse

LOCK_FILE = "lock"
ADDRESS_FILE = "address"


class StateFolder:
    """Holds the lock from construction to close()."""

    def __init__(self, path: Path) -> None:
        """Raises StateInUse naming the process that has it, or ConfigError when the folder can't be used."""
        self.path = path
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock: Optional[IO[str]] = (path / LOCK_FILE).open("a+", encoding="ascii")
        except OSError as cause:
            detail = f"the state folder {path} can't be used by user {os.geteuid()}: {cause.strerror}"
            raise ConfigError(detail, hint="Name another with --state-dir, or mend its permissions.") from cause
        self._take(self._lock)

    def _take(self, lock: IO[str]) -> None:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as cause:
            lock.seek(0)
            holder = lock.read().strip() or "unknown"
            lock.close()
            raise StateInUse(f"process {holder} uses the state folder {self.path}") from cause
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()

    def note_address(self, url: str) -> None:
        """Writes where this daemon listens, whole or not at all."""
        unfinished = self.path / f"{ADDRESS_FILE}.new"
        unfinished.write_text(f"{url}\n", encoding="ascii")
        unfinished.replace(self.path / ADDRESS_FILE)

    def close(self) -> None:
        """Removes the address and gives the lock back."""
        if self._lock is not None:
            try:
                (self.path / ADDRESS_FILE).unlink()
            except FileNotFoundError:
                pass  # it never got as far as listening
            self._lock.close()
            self._lock = None


def holder(path: Path) -> Optional[str]:
    """The process whose daemon has this state folder now, "unknown" where it does not say; None where there is none. Changes nothing."""
    try:
        with (path / LOCK_FILE).open(encoding="ascii") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                return lock.read().strip() or "unknown"
    except OSError:
        pass  # no folder, no lock, or none that this user may open: then what is in it can't be read either
    return None
