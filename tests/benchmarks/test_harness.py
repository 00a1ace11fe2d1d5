"""The daemon in a process of its own that benchmarks and tests use."""

from __future__ import annotations

from pathlib import Path

import pytest

import support
from harness import DaemonProcess


def test_a_daemon_that_does_not_come_up_is_told_with_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)did not start.*No such option"):
        DaemonProcess(tmp_path, "--nonsense", environ=support.environment())
