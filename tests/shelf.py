"""A catalogue without its thread, for tests of the journal's rules."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

from latentd.replay.catalogue import Catalogue
from latentd.replay.records import SampleRecord
from latentd.replay.store import Store
from lessons import CODEC, FEATURES, limits, sample

LEARNED = 10**6  # a learner that has learned everything


class Shelf:
    """A catalogue on a store of its own, with a clock that a test may move."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        self.folder, self.changes, self.now = folder, changes, 1.8e9
        self.open()

    def open(self) -> None:
        self.store = Store(self.folder / "journal.sqlite")
        self.catalogue = Catalogue(self.store, CODEC, FEATURES, limits(**self.changes), lambda: self.now)
        self.catalogue.load()

    def reopen(self) -> None:
        self.store.commit()
        self.store.close()
        self.open()

    def teach(self, *batch: Tuple[Optional[str], int]) -> List[SampleRecord]:
        return list(self.catalogue.admit([sample(label, number) for label, number in batch], None))

    def state(self, sample_id: str) -> str:
        return self.catalogue.sample(sample_id, LEARNED).state

    def classes(self) -> Dict[str, Tuple[int, int, int]]:
        """name -> (samples, holdout, stored)."""
        return {record.name: (record.samples, record.holdout, record.stored) for record in self.catalogue.class_records()}

    def states(self) -> List[str]:
        return [record.state for record in self.catalogue.page(None, 10_000, None, None, LEARNED)[0]]

    def latents(self) -> int:
        return len(list(self.store.scan("l/")))
