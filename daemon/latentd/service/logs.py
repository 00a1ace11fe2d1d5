"""How the log looks: plain lines on stderr, and for systemd's journal each with its severity.

`set_up` runs once, on the main thread; `set_level` may run at any time.
"""

from __future__ import annotations

import logging
import os
from typing import Mapping, TextIO

FORMAT = "%(levelname)s %(name)s: %(message)s"
_SEVERITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))  # of syslog(3); below: 7, debug


class JournalFormatter(logging.Formatter):
    """Every line begins with its severity in the notation of sd-daemon(3): journald stores a traceback as a record a line."""

    def format(self, record: logging.LogRecord) -> str:
        prefix = f"<{severity(record.levelno)}>"
        return "\n".join(prefix + line for line in super().format(record).split("\n"))


def severity(level: int) -> int:
    """syslog's severity, 2 (critical) to 7 (debug), of a logging level."""
    return next((number for least, number in _SEVERITIES if level >= least), 7)


def set_up(level: str, environ: Mapping[str, str], stream: TextIO) -> None:
    """Sends the log to `stream` unless somebody has set logging up before; for the journal where that is what the stream goes to."""
    if not logging.getLogger().handlers:
        handler = logging.StreamHandler(stream)
        in_journal = goes_to_journal(environ, stream)
        handler.setFormatter(JournalFormatter("%(name)s: %(message)s") if in_journal else logging.Formatter(FORMAT))
        logging.getLogger().addHandler(handler)
    set_level(level)


def set_level(level: str) -> None:
    logging.getLogger().setLevel(level.upper())


def goes_to_journal(environ: Mapping[str, str], stream: TextIO) -> bool:
    """Whether JOURNAL_STREAM names the very file that the stream writes to: it is inherited, so a redirected stream has it too."""
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):  # a stream without a file
        return False
    return environ.get("JOURNAL_STREAM", "") == f"{status.st_dev}:{status.st_ino}"
