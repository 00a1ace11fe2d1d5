"""The classes: their names, ids and counts, in memory and written through to the store. Owned by the journal thread."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Callable, Dict, Optional, Set, Tuple

from latentd.errors import ClassNotFound
from latentd.replay.aside import DAMAGE, Aside
from latentd.replay.records import ClassRecord, SampleRow
from latentd.replay.store import Store

_NEXT = "m/next_class"


class ClassTable:
    """Classes by id and by name. A name is there once; an id is never used again, also after its class was forgotten."""

    def __init__(self, store: Store, clock: Callable[[], float], aside: Aside) -> None:
        self._store = store
        self._clock = clock
        self._aside = aside
        self._records: Dict[int, ClassRecord] = {}
        self._names: Dict[str, int] = {}
        self._next_id = 0
        self._damaged: Set[int] = set()  # classes whose row could not be read, to be counted from the log

    def load(self) -> None:
        for key, value in list(self._store.scan("c/")):
            try:
                body = json.loads(value)
                self._remember(ClassRecord(int(key[2:]), body["name"], body["created_at"], body["samples"], body["holdout"], 0))
            except DAMAGE as cause:
                self._replace(key, value, cause)
        next_id = self._aside.number(_NEXT)
        self._next_id = max([next_id or 0, *(class_id + 1 for class_id in self._records)])

    def _replace(self, key: str, value: bytes, cause: Exception) -> None:
        """A class whose row is damaged keeps its samples, under a name that says so."""
        number = key[2:]
        self._aside.take(key, value, cause, f"the class is named {_lost(number)} until it is renamed")
        if number.isascii() and number.isdigit():
            self._damaged.add(int(number))
            self._write(ClassRecord(int(number), _lost(number), self._clock()))

    def recount(self, row: SampleRow) -> None:
        """Counts a sample of the log, where the count of its class was lost."""
        if row.class_id in self._damaged and row.state in ("stored", "evicted"):
            self.count(row.class_id, samples=1, holdout=int(row.holdout))

    def records(self) -> Tuple[ClassRecord, ...]:
        """All classes, oldest first."""
        return tuple(self._records[class_id] for class_id in sorted(self._records))

    def get(self, class_id: Optional[int]) -> Optional[ClassRecord]:
        return None if class_id is None else self._records.get(class_id)

    def find(self, name: str) -> Optional[ClassRecord]:
        return self.get(self._names.get(name))

    def named(self, name: str) -> ClassRecord:
        """Raises ClassNotFound."""
        record = self.find(name)
        if record is None:
            raise ClassNotFound(f"there is no class named {name[:100]}")
        return record

    def made(self, name: str) -> ClassRecord:
        """The class of this name, created when there is none."""
        record = self.find(name)
        if record is None:
            record = ClassRecord(self._next_id, name, self._clock())
            self._next_id += 1
            self._store.put({_NEXT: str(self._next_id).encode()})
            self._write(record)
        return record

    def rename(self, record: ClassRecord, name: str) -> ClassRecord:
        """The caller has checked that the name is free."""
        del self._names[record.name]
        renamed = replace(record, name=name)
        self._write(renamed)
        return renamed

    def remove(self, record: ClassRecord) -> None:
        del self._records[record.class_id], self._names[record.name]
        self._store.delete([_key(record.class_id)])

    def count(self, class_id: Optional[int], *, samples: int = 0, holdout: int = 0, stored: int = 0) -> None:
        """Changes the counts of a class; nothing for one that is gone. stored is not written: it is counted again at every start."""
        record = self.get(class_id)
        if record is None:
            return
        changed = replace(record, samples=record.samples + samples, holdout=record.holdout + holdout, stored=record.stored + stored)
        if samples or holdout:
            self._write(changed)
        else:
            self._remember(changed)

    def _remember(self, record: ClassRecord) -> None:
        self._records[record.class_id] = record
        self._names[record.name] = record.class_id

    def _write(self, record: ClassRecord) -> None:
        self._remember(record)
        body = {"name": record.name, "created_at": record.created_at, "samples": record.samples, "holdout": record.holdout}
        self._store.put({_key(record.class_id): json.dumps(body).encode()})


def _lost(number: str) -> str:
    return f"class {number} (its name is lost)"


def _key(class_id: int) -> str:
    return f"c/{class_id}"
