"""Fixtures of the command line's tests: `latentd …` in this process, and a daemon without a model behind a real socket."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path
from typing import Any, Callable, Dict, NamedTuple

import pytest

from latentd.cli.app import main
from service.conftest import Served, new_world, serve, world
from service.fakes import World, picture

__all__ = ["new_world", "serve", "world"]


class Ran(NamedTuple):
    """One `latentd …`: its exit code, and what it wrote."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Dict[str, Any]:
        found: Dict[str, Any] = json.loads(self.out)
        return found


Latentd = Callable[..., Ran]


@pytest.fixture
def latentd(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Latentd:
    """latentd("status", "--json", stdin=b"") -> Ran; configured by nothing but a state folder of its own."""
    for name in [name for name in os.environ if name.startswith("LATENTD_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("LATENTD_STATE__DIR", str(tmp_path / "client-state"))

    def run(*arguments: str, stdin: bytes = b"") -> Ran:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main(arguments)
        out, err = capsys.readouterr()
        code = end.value.code
        return Ran(code if isinstance(code, int) else 0, out, err)

    return run


@pytest.fixture
def served(world: World, serve: Callable[[World], Served]) -> Served:
    return serve(world)


@pytest.fixture
def asked(latentd: Latentd, served: Served) -> Latentd:
    """`latentd` with --url of the daemon without a model."""

    def run(*arguments: str, stdin: bytes = b"") -> Ran:
        return latentd(*arguments, "--url", served.url, stdin=stdin)

    return run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of two classes with two pictures each."""
    for index, name in enumerate(("cat/0.png", "cat/old/1.PNG", "dog/0.png", "dog/1.png")):
        path = tmp_path / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(index))
    return tmp_path / "pictures"
