"""Fixtures of the journal's tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, Iterator, List

import pytest

from shelf import Shelf


@pytest.fixture
def new_shelf(tmp_path: Path) -> Iterator[Callable[..., Shelf]]:
    made: List[Shelf] = []

    def make(**changes: Any) -> Shelf:
        made.append(Shelf(tmp_path, **changes))
        return made[-1]

    yield make
    for shelf in made:
        shelf.store.close()


@pytest.fixture
def shelf(new_shelf: Callable[..., Shelf]) -> Shelf:
    return new_shelf()
