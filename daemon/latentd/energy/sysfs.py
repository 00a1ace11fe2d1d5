"""Reading kernel attribute files, and saying in plain words why one can't be read.

Stateless; any thread. A read may block: an INA3221 attribute waits for a conversion of the chip (7 to 13 ms).
"""

from __future__ import annotations

import errno
from pathlib import Path

_REASONS = {
    errno.EACCES: "permission denied (readable by root only)",
    errno.EPERM: "permission denied (readable by root only)",
    errno.ENODATA: "no data (the channel is disabled)",
    errno.ENOENT: "it is not there",
    errno.ENODEV: "the device is gone",
    errno.ENXIO: "the device is gone",
}


def read_text(path: Path) -> str:
    """The attribute without surrounding blanks and NULs; raises OSError."""
    return path.read_bytes().decode("utf-8", "replace").strip("\0 \t\n")


def read_number(path: Path) -> float:
    """The attribute as a number in the file's own unit; raises OSError, also where the file holds no number."""
    text = read_text(path)
    try:
        return float(int(text))
    except ValueError:
        raise OSError(errno.EINVAL, f"holds {text[:40]!r}, not a whole number", str(path)) from None


def why(error: OSError) -> str:
    """One phrase for a user: what the file is and why it can't be read."""
    reason = _REASONS.get(error.errno or 0) or error.strerror or type(error).__name__
    return f"{error.filename}: {reason}" if error.filename else reason
