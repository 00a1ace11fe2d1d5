"""Learners for tests: small trainers, and learner threads that tell what they do."""

from __future__ import annotations

import itertools
import threading
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import numpy as np
from numpy.typing import NDArray

from latentd.learning import checkpoint
from latentd.learning.learner import Learner, LearnerSettings
from latentd.learning.trainer import Trainer, TrainerSettings
from latentd.replay.journal import Journal
from latentd.replay.records import Entry
from lessons import CODEC, FEATURES, SLOT_BYTES, WAIT_S, features, teach

PROBE = np.stack([features(label, 5000 + number) for label in ("cat", "dog", "owl", "probe") for number in range(5)])


def make_trainer(slots: int = 1000, epochs: float = 1.0, seed: int = 0, unknown_rate: float = 0.0, doubt_nats: float = 0.0) -> Trainer:
    """Answers everything, unless an unknown_rate says how much it may refuse, and doubts nothing unless told."""
    settings = TrainerSettings(
        slots * SLOT_BYTES,
        minibatch=16,
        epochs=epochs,
        learning_rate=1e-3,
        label_smoothing=0.1,
        seed=seed,
        unknown_rate=unknown_rate,
        doubt_nats=doubt_nats,
    )
    return Trainer(CODEC, FEATURES, settings)


class Witness:
    """The observer of a learner: remembers what it was told, and lets a test wait for a step."""

    def __init__(self) -> None:
        self.steps: List[float] = []
        self.causes: List[str] = []
        self.reasons: List[str] = []
        self.evictions = 0
        self.waits: List[str] = []
        self.stepped = threading.Event()

    def step(self, seconds: float) -> None:
        self.steps.append(seconds)
        self.stepped.set()

    def published(self, cause: str) -> None:
        self.causes.append(cause)

    def rejected(self, reason: str) -> None:
        self.reasons.append(reason)

    def evicted(self, count: int) -> None:
        self.evictions += count

    def waited(self, cause: str, seconds: float) -> None:
        self.waits.append(cause)


def make_learner(
    journal: Journal,
    folder: Path,
    *,
    make: Callable[[], Trainer] = make_trainer,
    busy: Callable[[], bool] = lambda: False,
    checkpoint_s: float = 3600.0,
    keep_versions: int = 3,
    observer: Optional[Witness] = None,
    clock: Callable[[], float] = lambda: 0.0,
    **more: Any,
) -> Learner:
    """A learner over the journal that saves only when it stops or has to, unless told."""
    settings = LearnerSettings(folder / "versions", checkpoint_s, keep_versions, "int8 token", 1 << 20)
    return Learner(
        journal, make, settings, observer=observer or Witness(), busy=busy, activity=lambda _: nullcontext(), clock=clock, **more
    )


@contextmanager
def running_learner(journal: Journal, folder: Path, **more: Any) -> Iterator[Learner]:
    """A started learner, stopped in an orderly way at the end."""
    learner = make_learner(journal, folder, **more)
    learner.start(WAIT_S)
    try:
        yield learner
    finally:
        learner.stop(WAIT_S)


def taught(learner: Learner, journal: Journal, *batches: Sequence[Tuple[str, int]]) -> None:
    """Teaches the requests one after the other, each learned before the next."""
    for batch in batches:
        learner.learned(teach(journal, *batch)[-1].seq).result(WAIT_S)


def answers(learner: Learner, label: str, numbers: Sequence[int]) -> List[str]:
    """What the served snapshot says of pictures of this label."""
    snapshot = learner.snapshot
    rows = np.stack([features(label, number) for number in numbers])
    return snapshot.decide(rows, snapshot.predict(rows))


# --- trainers without a thread ---


def log(journal: Journal, after: int = 0) -> List[Entry]:
    return journal.entries(after, 10**6).result(WAIT_S)


def requests(entries: Sequence[Entry]) -> List[List[Entry]]:
    return [list(group) for _, group in itertools.groupby(entries, key=lambda entry: entry.batch)]


def learn(trainer: Trainer, entries: Sequence[Entry]) -> Trainer:
    for request in requests(entries):
        for _ in trainer.take(request):
            pass
    return trainer


def names(journal: Journal) -> Dict[int, str]:
    return {record.class_id: record.name for record in journal.classes()}


def predictions(trainer: Trainer, journal: Journal) -> Dict[str, NDArray[np.float64]]:
    """label -> probabilities of the probe pictures."""
    snapshot = trainer.candidate(names(journal), 0.0)[0]
    return dict(zip(snapshot.labels, snapshot.predict(PROBE).T))


def assert_same_predictions(one: Dict[str, NDArray[np.float64]], other: Dict[str, NDArray[np.float64]]) -> None:
    assert sorted(one) == sorted(other)
    for label, probabilities in one.items():
        np.testing.assert_allclose(probabilities, other[label], atol=1e-5)


# --- learners that misbehave ---


class Broken(Trainer):
    """Dies in a certain request, as often as `deaths` says."""

    deaths: List[int]
    at_seq = 0

    def take(self, batch: Sequence[Entry]) -> Iterator[int]:
        if batch[0].seq >= self.at_seq and self.deaths[0] > 0:
            self.deaths[0] -= 1
            raise ZeroDivisionError("injected")
        yield from super().take(batch)


class Gated(Trainer):
    """Waits inside every request until a test lets it go on; `steps` of them each."""

    gate: threading.Event
    entered: threading.Event
    steps = 1

    def take(self, batch: Sequence[Entry]) -> Iterator[int]:
        for _ in range(self.steps):
            self.entered.set()
            assert self.gate.wait(WAIT_S)
            yield 0
        yield from super().take(batch)


def made(kind: Callable[..., Any], **attributes: Any) -> Callable[[], Any]:
    """A maker of trainers of this kind."""

    def make() -> Any:
        usual = make_trainer()
        trainer = kind(usual._codec, usual._width, usual._settings)
        for name, value in attributes.items():
            setattr(trainer, name, value)
        return trainer

    return make


def saved_versions(folder: Path) -> List[int]:
    return [checkpoint.seq_of(path) for path in checkpoint.versions(folder / "versions")]
