"""Fixtures of the learner's tests: journals, as many as a test wants."""

from __future__ import annotations

import itertools
from contextlib import ExitStack
from pathlib import Path
from typing import Callable, Iterator

import pytest

from latentd.replay.journal import Journal
from lessons import running_journal


@pytest.fixture
def new_journal(tmp_path: Path) -> Iterator[Callable[..., Journal]]:
    """new_journal(**limits): another one, in a folder of its own, at every call."""
    numbers = itertools.count()
    with ExitStack() as stack:
        yield lambda **changes: stack.enter_context(running_journal(tmp_path / str(next(numbers)), **changes))
