"""A clock that only tests move, and a way to plant sysfs files."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Callable, Dict, Union

import pytest

from latentd.energy import sysfs

Plant = Callable[[Dict[str, Union[str, int]]], Path]
Break = Callable[[Path, int], None]


class Clock:
    """Seconds that pass when told to; `wait` passes them like a thread's wait that nobody interrupts."""

    def __init__(self, now_s: float = 1000.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s

    def wait(self, seconds: float) -> bool:
        self.now_s += seconds
        return False


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def plant(tmp_path: Path) -> Plant:
    """plant({path: content}) writes kernel attribute files under a root of its own and gives that root."""

    def write(files: Dict[str, Union[str, int]]) -> Path:
        for path, content in files.items():
            file = tmp_path / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{content}\n")
        return tmp_path

    return write


@pytest.fixture
def break_file(monkeypatch: pytest.MonkeyPatch) -> Break:
    """break_file(path, errno.EACCES) makes reads of that file fail so (tests may run as root, whom file modes don't stop); 0 mends it."""
    broken: Dict[Path, int] = {}
    read_text = sysfs.read_text

    def read(path: Path) -> str:
        code = broken.get(path, 0)
        if code:
            raise OSError(code, os.strerror(code), str(path))
        return read_text(path)

    def set_broken(path: Path, code: int = errno.EACCES) -> None:
        broken[path] = code

    monkeypatch.setattr(sysfs, "read_text", read)
    return set_broken
