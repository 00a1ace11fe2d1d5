from __future__ import annotations

from pathlib import Path

import pytest

from cli.conftest import latentd
from cli.doctor.trees import LAPTOP, NX, tree
from latentd.cli.doctor.machine import Machine

__all__ = ["latentd"]


@pytest.fixture
def nx(tmp_path: Path) -> Machine:
    return tree(tmp_path / "nx", NX)


@pytest.fixture
def laptop(tmp_path: Path) -> Machine:
    return tree(tmp_path / "laptop", LAPTOP)
