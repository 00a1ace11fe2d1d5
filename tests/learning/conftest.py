"""Fixtures of the learner's tests: journals, as many as a test wants; the blocks above a split; a GPU that is imitated."""

from __future__ import annotations

import itertools
from contextlib import ExitStack
from pathlib import Path
from typing import Callable, Iterator

import pytest

import tiny
from fake_cuda import FakeCuda
from latentd.learning import learner as learner_module
from latentd.learning import log_reader
from latentd.learning.blocks import UpperBlocks
from latentd.learning.place import Place
from latentd.replay.journal import Journal
from lessons import running_journal


@pytest.fixture
def new_journal(tmp_path: Path) -> Iterator[Callable[..., Journal]]:
    """new_journal(**limits): another one, in a folder of its own, at every call."""
    numbers = itertools.count()
    with ExitStack() as stack:
        yield lambda **changes: stack.enter_context(running_journal(tmp_path / str(next(numbers)), **changes))


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    """One in the test's own folder."""
    with running_journal(tmp_path) as running:
        yield running


@pytest.fixture
def base(tmp_path: Path) -> UpperBlocks:
    return UpperBlocks.load(tiny.backbone(tmp_path), 1)


@pytest.fixture
def on_gpu(fake_cuda: FakeCuda) -> Place:
    return Place(fake_cuda.queue())


@pytest.fixture
def quick_restarts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A learner that died, or could not read, tries again at once."""
    monkeypatch.setattr(learner_module, "RESTART_S", 0.01)
    monkeypatch.setattr(log_reader, "AGAIN_S", 0.01)
