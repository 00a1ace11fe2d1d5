"""Puts the stand-in in the place of TensorRT for one test."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from standin.module import make

TESTS = Path(__file__).parents[1]


def install(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    """Makes `import tensorrt` give this version, here and in the processes that this one starts, until the test ends."""
    monkeypatch.setitem(sys.modules, "tensorrt", make(version))
    monkeypatch.setenv("STANDIN_TENSORRT", version)
    folders = (TESTS.parent / "daemon", TESTS, TESTS / "standin" / "site")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, folders)))
