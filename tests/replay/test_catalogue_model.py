"""The catalogue against a model of a few lines: any order of teaching, correcting, forgetting, evicting, renaming and restarting."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Optional, Tuple

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from latentd.errors import ClassNotFound, Conflict
from latentd.replay.catalogue import Catalogue
from latentd.replay.store import Store
from lessons import CODEC, FEATURES, limits, sample

LABELS = st.sampled_from(["cat", "dog", "owl"])
IMAGES = st.integers(0, 4)
PICK = st.integers(0, 10**6)
LEARNED = 10**6
EVERY = 3


@dataclass
class Taught:
    image: int
    class_id: Optional[int]
    state: str
    holdout: bool = False
    wiped: bool = False


class CatalogueAgainstModel(RuleBasedStateMachine):
    @initialize()
    def start(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.samples: Dict[int, Taught] = {}
        self.names: Dict[str, int] = {}
        self.owner: Dict[Tuple[int, int], int] = {}
        self.made = 0
        self.head = 0
        self.open()

    def open(self) -> None:
        self.store = Store(Path(self.folder.name) / "journal.sqlite")
        self.catalogue = Catalogue(self.store, CODEC, FEATURES, limits(holdout_every=EVERY), lambda: 5.0)
        self.catalogue.load()

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
            self.folder.cleanup()

    # --- the model ---

    def class_of(self, name: str) -> int:
        if name not in self.names:
            self.names[name] = self.made
            self.made += 1
        return self.names[name]

    def of_class(self, class_id: int) -> List[Taught]:
        return [one for one in self.samples.values() if one.class_id == class_id and one.state in ("learned", "evicted")]

    def teach_model(self, label: Optional[str], image: int) -> None:
        self.head += 1
        if label is None:
            self.samples[self.head] = Taught(image, None, "held")
            return
        class_id = self.class_of(label)
        others = self.of_class(class_id)
        if (class_id, image) in self.owner:
            self.samples[self.head] = Taught(image, class_id, "duplicate")
        else:
            self.owner[class_id, image] = self.head
            holdout = (sum(one.holdout for one in others) + 1) * EVERY <= len(others) + 1
            self.samples[self.head] = Taught(image, class_id, "learned", holdout)

    def drop_owner(self, seq: int) -> None:
        self.owner = {key: owner for key, owner in self.owner.items() if owner != seq}

    def picked(self, number: int) -> int:
        return list(self.samples)[number % len(self.samples)] if self.samples else 0

    # --- what may happen ---

    @rule(batch=st.lists(st.tuples(st.none() | LABELS, IMAGES), min_size=1, max_size=4))
    def teach(self, batch: List[Tuple[Optional[str], int]]) -> None:
        self.catalogue.admit([sample(label, image, shows="thing") for label, image in batch], None)
        for label, image in batch:
            self.teach_model(label, image)

    @rule(number=PICK, label=LABELS)
    def relabel(self, number: int, label: str) -> None:
        seq = self.picked(number)
        one = self.samples.get(seq)
        if one is None:
            return
        if one.state not in ("learned", "held"):
            with pytest.raises(Conflict):
                self.catalogue.relabel(f"s{seq:08d}", label, LEARNED)
            return
        self.catalogue.relabel(f"s{seq:08d}", label, LEARNED)
        if one.class_id is None or self.names.get(label) != one.class_id:
            self.head += 1
            self.drop_owner(seq)
            one.class_id, one.state = self.class_of(label), "learned"
            self.owner.setdefault((one.class_id, one.image), seq)

    @rule(number=PICK)
    def forget(self, number: int) -> None:
        seq = self.picked(number)
        if seq:
            self.catalogue.forget(f"s{seq:08d}", LEARNED)
            self.head += self.samples[seq].state != "forgotten"
            self.samples[seq].state = "forgotten"
            self.drop_owner(seq)

    @rule(label=LABELS)
    def forget_class(self, label: str) -> None:
        if label not in self.names:
            with pytest.raises(ClassNotFound):
                self.catalogue.forget_class(label)
            return
        self.catalogue.forget_class(label)
        self.head += 1
        class_id = self.names.pop(label)
        for seq, one in self.samples.items():
            if one.class_id == class_id:
                one.state = "forgotten"
                self.drop_owner(seq)

    @rule(label=LABELS, new=LABELS)
    def rename(self, label: str, new: str) -> None:
        if label not in self.names or new in self.names:
            return
        self.catalogue.put_class(label, new)
        self.names[new] = self.names.pop(label)
        self.head += 1

    @rule(numbers=st.lists(PICK, max_size=3))
    def settle(self, numbers: List[int]) -> None:
        evicted = {self.picked(number) for number in numbers} - {0}
        self.catalogue.settle(self.head, [f"s{seq:08d}" for seq in evicted], 0)
        for seq, one in self.samples.items():
            if seq in evicted and one.state == "learned":
                one.state = "evicted"
            one.wiped = one.wiped or one.state == "forgotten"

    @rule()
    def restart(self) -> None:
        self.store.commit()
        self.store.close()
        self.open()

    @rule()
    def fail_a_commit(self) -> None:
        """What was asked for since the last commit is gone, as the catalogue is when it has been read again."""
        self.store.commit()
        self.catalogue.admit([sample("lost", 0), sample("cat", 99)], None)
        self.store.roll_back()
        self.catalogue = Catalogue(self.store, CODEC, FEATURES, limits(holdout_every=EVERY), lambda: 5.0)
        self.catalogue.load()

    # --- what must hold ---

    @invariant()
    def every_sample_is_as_the_model_has_it(self) -> None:
        if not hasattr(self, "store"):
            return
        name: Dict[Optional[int], str] = {class_id: label for label, class_id in self.names.items()}
        records = self.catalogue.page(None, 10_000, None, None, LEARNED)[0]
        found = [(record.seq, record.state, record.label, record.holdout, record.sha256 == "") for record in records]
        assert found == [
            (seq, one.state, None if one.state == "forgotten" else name.get(one.class_id), one.holdout, one.wiped)
            for seq, one in self.samples.items()
        ]
        assert self.catalogue.head_seq == self.head

    @invariant()
    def the_counts_are_those_of_the_samples(self) -> None:
        if not hasattr(self, "store"):
            return
        found = {record.name: (record.class_id, record.samples, record.holdout, record.stored) for record in self.catalogue.class_records()}
        assert found == {
            label: (
                class_id,
                len(self.of_class(class_id)),
                sum(one.holdout for one in self.of_class(class_id)),
                sum(one.state == "learned" for one in self.of_class(class_id)),
            )
            for label, class_id in self.names.items()
        }
        assert self.catalogue.stored == sum(one.state == "learned" for one in self.samples.values())

    @invariant()
    def the_latents_on_the_disk_are_those_that_somebody_needs(self) -> None:
        if not hasattr(self, "store"):
            return
        kept = {int(key[2:]) for key, _ in self.store.scan("l/")}
        needed = {seq for seq, one in self.samples.items() if one.state in ("learned", "held")}
        waiting = {seq for seq, one in self.samples.items() if one.state == "forgotten" and not one.wiped}
        assert needed <= kept <= needed | waiting


CatalogueAgainstModel.TestCase.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
TestCatalogueAgainstModel = CatalogueAgainstModel.TestCase
