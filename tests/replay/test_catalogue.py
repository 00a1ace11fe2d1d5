"""The rules of the journal: what is taught once, what is held out, what a change does, what is dropped first."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import numpy as np
import pytest

from latentd.errors import BudgetFull, ClassNotFound, Conflict, LabelInvalid, SampleNotFound
from latentd.replay.catalogue import KEY_LIFETIME_S, PRUNE_AGAIN_S, Catalogue
from latentd.replay.records import ClassRecord, Idempotency, NewSample, SampleRecord
from latentd.replay.store import Store
from lessons import CODE_BYTES, CODEC, FEATURES, TOKENS, WIDTH, features, limits, sample, sha256_of

LEARNED = 10**6  # a learner that has learned everything


class Shelf:
    """A catalogue on a store of its own, with a clock that a test may move."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        self.folder, self.changes, self.now = folder, changes, 1000.0
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


# --- teaching ---


def test_samples_are_numbered_in_order_and_queued_until_the_learner_has_passed_them(shelf: Shelf) -> None:
    records = shelf.teach(("cat", 0), ("dog", 1))
    assert [(record.sample_id, record.seq, record.label, record.state) for record in records] == [
        ("s00000001", 1, "cat", "queued"),
        ("s00000002", 2, "dog", "queued"),
    ]
    assert [shelf.catalogue.sample(f"s0000000{seq}", 1).state for seq in (1, 2)] == ["learned", "queued"]
    assert records[0].sha256 == sha256_of("cat", 0)
    assert shelf.classes() == {"cat": (1, 0, 1), "dog": (1, 0, 1)}


@pytest.mark.parametrize("label", ["", "   ", "x" * 101, "tab\tstop", "null\0", " edge", "edge ", "line\n", "\ud800", "bidi\u202e"])
def test_one_label_that_cannot_be_used_refuses_the_whole_request(shelf: Shelf, label: str) -> None:
    with pytest.raises(LabelInvalid):
        shelf.catalogue.admit([sample("cat", 0), replace(sample("dog", 1), label=label)], None)
    assert (shelf.catalogue.head_seq, shelf.classes(), shelf.latents()) == (0, {}, 0)


def test_a_label_of_many_scripts_is_kept_as_it_is(shelf: Shelf) -> None:
    assert shelf.teach(("Katze 猫 кот 🐈", 0))[0].label == "Katze 猫 кот 🐈"


@pytest.mark.parametrize("sample_id", ["s00000009", "nonsense", "", "s-1", "c00000001", "s\u0661", "s" + "9" * 40])
def test_a_sample_that_does_not_exist_is_not_found(shelf: Shelf, sample_id: str) -> None:
    shelf.teach(("cat", 0))
    shelf.catalogue.put_class("dog", None)
    for act in (lambda: shelf.catalogue.sample(sample_id, 0), lambda: shelf.catalogue.forget(sample_id, 0)):
        with pytest.raises(SampleNotFound):
            act()


def test_a_number_of_the_log_that_is_a_change_is_no_sample(shelf: Shelf) -> None:
    shelf.teach(("cat", 0))
    shelf.catalogue.forget("s00000001", LEARNED)
    with pytest.raises(SampleNotFound):
        shelf.catalogue.sample("s00000002", LEARNED)


# --- duplicates ---


def test_the_same_image_under_the_same_label_is_taught_once(shelf: Shelf) -> None:
    first, again = shelf.teach(("cat", 0))[0], shelf.teach(("cat", 0))[0]
    assert (again.state, again.duplicate_of) == ("duplicate", first.sample_id)
    assert shelf.classes() == {"cat": (1, 0, 1)}
    assert shelf.latents() == 1


def test_a_duplicate_inside_one_request_is_found(shelf: Shelf) -> None:
    assert [record.state for record in shelf.teach(("cat", 0), ("cat", 0), ("cat", 1))] == ["queued", "duplicate", "queued"]


def test_the_same_image_under_another_label_is_no_duplicate(shelf: Shelf) -> None:
    shelf.teach(("cat", 0))
    records = shelf.catalogue.admit([sample("animal", 0, shows="cat"), sample(None, 0, shows="cat")], None)
    assert [record.state for record in records] == ["queued", "held"]


def test_a_duplicate_is_known_after_a_restart(shelf: Shelf) -> None:
    shelf.teach(("cat", 0))
    shelf.reopen()
    assert shelf.teach(("cat", 0))[0].state == "duplicate"


def test_an_image_whose_latent_was_evicted_is_not_taught_twice(shelf: Shelf) -> None:
    shelf.teach(("cat", 0))
    shelf.catalogue.settle(1, ["s00000001"], 0)
    shelf.reopen()
    again = shelf.teach(("cat", 0))[0]
    assert (again.state, again.duplicate_of) == ("duplicate", "s00000001")


def test_a_forgotten_image_may_be_taught_again(shelf: Shelf) -> None:
    shelf.teach(("cat", 0))
    shelf.catalogue.forget("s00000001", LEARNED)
    assert shelf.teach(("cat", 0))[0].state == "queued"


def test_forgetting_a_duplicate_leaves_the_sample_that_it_repeats(shelf: Shelf) -> None:
    shelf.teach(("cat", 0), ("cat", 0))
    shelf.catalogue.forget("s00000002", LEARNED)
    assert shelf.classes() == {"cat": (1, 0, 1)}
    assert shelf.catalogue.stored == 1
    assert shelf.teach(("cat", 0))[0].duplicate_of == "s00000001"


def test_an_image_follows_its_new_label(shelf: Shelf) -> None:
    shelf.teach(("cat", 0))
    shelf.catalogue.relabel("s00000001", "lynx", LEARNED)
    again = shelf.catalogue.admit([sample("lynx", 0, shows="cat"), sample("cat", 0)], None)
    assert [record.state for record in again] == ["duplicate", "queued"]


def turned(label: str, cosine: float) -> NewSample:
    """A picture whose features are at this cosine from number 0 of the label."""
    base = features(label, 0).astype(np.float64)
    aside = features(label, 77).astype(np.float64)
    aside -= aside @ base / (base @ base) * base
    aside *= np.linalg.norm(base) / np.linalg.norm(aside)
    row = (cosine * base + np.sqrt(1 - cosine**2) * aside).astype(np.float32)
    return NewSample(label, CODEC.encode(row.reshape(1, TOKENS, WIDTH))[0].tobytes(), row, sha256_of("turned", int(cosine * 1e6)))


def test_an_image_that_is_almost_the_same_is_a_duplicate_by_its_latent(new_shelf: Callable[..., Shelf]) -> None:
    shelf = new_shelf(duplicate_cosine=0.995)
    shelf.teach(("cat", 0))
    near, far = shelf.catalogue.admit([turned("cat", 0.999), turned("cat", 0.98)], None)
    assert (near.state, near.duplicate_of, far.state) == ("duplicate", "s00000001", "queued")
    shelf.reopen()
    assert shelf.catalogue.admit([turned("cat", 0.9985)], None)[0].duplicate_of == "s00000001"


def test_near_duplicates_are_taught_when_that_is_switched_off(shelf: Shelf) -> None:
    shelf.teach(("cat", 0))
    assert shelf.catalogue.admit([turned("cat", 0.99999)], None)[0].state == "queued"


def test_a_near_duplicate_of_a_forgotten_image_is_taught(new_shelf: Callable[..., Shelf]) -> None:
    shelf = new_shelf(duplicate_cosine=0.99)
    shelf.teach(("cat", 0))
    shelf.catalogue.forget("s00000001", LEARNED)
    assert shelf.catalogue.admit([turned("cat", 0.999)], None)[0].state == "queued"


# --- hold-out ---


def held_out(records: List[SampleRecord]) -> List[int]:
    return [index for index, record in enumerate(records) if record.holdout]


def test_every_so_many_samples_of_each_class_one_is_held_out(new_shelf: Callable[..., Shelf]) -> None:
    shelf = new_shelf(holdout_every=5)
    assert held_out(shelf.teach(*[("cat", number) for number in range(21)])) == [4, 9, 14, 19]
    assert held_out(shelf.teach(*[("dog", number) for number in range(6)])) == [4]
    assert shelf.classes() == {"cat": (21, 4, 21), "dog": (6, 1, 6)}


def test_no_more_are_held_out_than_a_class_may_have(new_shelf: Callable[..., Shelf]) -> None:
    shelf = new_shelf(holdout_every=2, holdout_per_class=3)
    assert held_out(shelf.teach(*[("cat", number) for number in range(20)])) == [1, 3, 5]


def test_forgetting_and_teaching_again_does_not_hold_out_more_and_more(new_shelf: Callable[..., Shelf]) -> None:
    shelf = new_shelf(holdout_every=5)
    shelf.teach(*[("cat", number) for number in range(5)])
    for number in range(20):
        shelf.catalogue.forget(shelf.teach(("cat", 100 + number))[0].sample_id, LEARNED)
    assert shelf.classes() == {"cat": (5, 1, 5)}


def test_duplicates_and_unlabelled_images_are_never_held_out(new_shelf: Callable[..., Shelf]) -> None:
    shelf = new_shelf(holdout_every=2)
    shelf.teach(("cat", 0))
    assert held_out(shelf.teach(("cat", 0), (None, 1), (None, 2))) == []


# --- corrections ---


def test_a_correction_moves_a_sample_and_is_queued_until_it_is_learned(shelf: Shelf) -> None:
    shelf.teach(("cat", 0), ("cat", 1))
    record = shelf.catalogue.relabel("s00000001", "dog", 2)
    assert (record.label, record.state) == ("dog", "queued")
    assert shelf.catalogue.sample("s00000001", 3).state == "learned"
    assert shelf.classes() == {"cat": (1, 0, 1), "dog": (1, 0, 1)}


def test_the_label_it_has_already_changes_nothing(shelf: Shelf) -> None:
    shelf.teach(("cat", 0))
    assert shelf.catalogue.relabel("s00000001", "cat", LEARNED).state == "learned"
    assert shelf.catalogue.head_seq == 1


def test_a_held_image_is_taught_by_labelling_it(shelf: Shelf) -> None:
    assert shelf.teach((None, 0))[0].state == "held"
    assert (shelf.catalogue.stored, shelf.latents()) == (0, 1)
    assert shelf.catalogue.relabel("s00000001", "cat", 1).state == "queued"
    assert shelf.classes() == {"cat": (1, 0, 1)}


@pytest.mark.parametrize("state", ["duplicate", "evicted", "forgotten"])
def test_a_sample_without_a_latent_cannot_be_corrected(shelf: Shelf, state: str) -> None:
    shelf.teach(("cat", 0), ("cat", 0))
    shelf.catalogue.settle(2, ["s00000001"], 0) if state == "evicted" else None
    shelf.catalogue.forget("s00000001", LEARNED) if state == "forgotten" else None
    sample_id = "s00000002" if state == "duplicate" else "s00000001"
    assert shelf.state(sample_id) == state
    head = shelf.catalogue.head_seq
    with pytest.raises(Conflict, match=f"is {state}"):
        shelf.catalogue.relabel(sample_id, "unheard of", LEARNED)
    assert (shelf.catalogue.head_seq, list(shelf.classes())) == (head, ["cat"])


# --- forgetting ---


def test_forgetting_twice_is_forgetting_once(shelf: Shelf) -> None:
    shelf.teach(("cat", 0), ("cat", 1))
    assert [shelf.catalogue.forget("s00000001", LEARNED).state for _ in range(2)] == ["forgotten", "forgotten"]
    assert shelf.catalogue.head_seq == 3
    assert shelf.classes() == {"cat": (1, 0, 1)}
    assert shelf.catalogue.sample("s00000001", LEARNED).label is None


def test_a_forgotten_latent_stays_until_a_version_without_it_is_durable(shelf: Shelf) -> None:
    shelf.teach(("cat", 0), ("cat", 1))
    shelf.catalogue.forget("s00000001", LEARNED)
    shelf.catalogue.settle(2, (), 0)
    assert shelf.catalogue.entries(2, 10)[0].code == sample("cat", 0).code
    shelf.reopen()
    shelf.catalogue.settle(3, (), 0)
    (change,) = shelf.catalogue.entries(2, 10)
    assert (change.kind, change.sample_id, change.was, change.code) == ("forget", "s00000001", 0, None)
    assert shelf.latents() == 1
    assert shelf.catalogue.sample("s00000001", LEARNED).sha256 == ""
    assert sha256_of("cat", 0) not in str(list(shelf.store.scan("e/")))
    assert sha256_of("cat", 0)[:32] not in str(list(shelf.store.scan("h/")))


def test_settling_asks_for_a_purge_and_plain_learning_does_not(shelf: Shelf) -> None:
    shelf.catalogue.purge_due = False
    shelf.teach(("cat", 0), ("cat", 1))
    shelf.catalogue.settle(2, ["s00000002"], 2)
    assert not shelf.catalogue.purge_due
    shelf.catalogue.forget("s00000001", LEARNED)
    shelf.catalogue.settle(3, (), 3)
    assert shelf.catalogue.purge_due


def test_forgetting_a_class_forgets_all_of_its_samples_and_no_other(shelf: Shelf) -> None:
    shelf.teach(("cat", 0), ("dog", 0), ("cat", 1), ("cat", 1))
    shelf.catalogue.relabel("s00000002", "cat", LEARNED)
    shelf.teach(("dog", 1), ("cat", 2))
    shelf.catalogue.settle(5, ["s00000001"], 0)
    gone = shelf.catalogue.forget_class("cat")
    assert (gone.name, gone.samples) == ("cat", 4)
    assert shelf.states() == ["forgotten"] * 4 + ["learned", "forgotten"]
    assert shelf.classes() == {"dog": (1, 0, 1)}
    assert shelf.catalogue.stored == 1
    head = shelf.catalogue.head_seq
    shelf.reopen()
    shelf.catalogue.settle(head, (), 0)
    assert shelf.latents() == 1
    left = str(list(shelf.store.scan("e/")))
    assert [sha256_of("cat", number) in left for number in range(3)] == [False] * 3
    assert sha256_of("dog", 1) in left
    with pytest.raises(ClassNotFound):
        shelf.catalogue.forget_class("cat")


def test_a_class_taught_again_after_it_was_forgotten_is_a_new_one(shelf: Shelf) -> None:
    shelf.teach(("cat", 0))
    shelf.catalogue.forget_class("cat")
    shelf.reopen()
    assert shelf.teach(("cat", 0))[0].state == "queued"
    assert [record.class_id for record in shelf.catalogue.class_records()] == [1]


# --- classes ---


def test_a_class_is_created_once_and_renamed_with_all_it_has(shelf: Shelf) -> None:
    shelf.teach(("cat", 0))
    assert [shelf.catalogue.put_class("dog", None)[1] for _ in range(2)] == [True, False]
    renamed, created = shelf.catalogue.put_class("cat", "lynx")
    assert (renamed.class_id, renamed.name, created) == (0, "lynx", False)
    shelf.reopen()
    assert shelf.classes() == {"lynx": (1, 0, 1), "dog": (0, 0, 0)}
    assert shelf.catalogue.sample("s00000001", LEARNED).label == "lynx"
    assert shelf.catalogue.admit([sample("lynx", 0, shows="cat")], None)[0].state == "duplicate"
    assert shelf.teach(("cat", 0))[0].state == "queued"


def test_a_name_that_is_taken_or_impossible_is_refused(shelf: Shelf) -> None:
    shelf.teach(("cat", 0), ("dog", 0))
    for error, arguments in ((Conflict, ("cat", "dog")), (ClassNotFound, ("owl", "eagle")), (LabelInvalid, ("cat", " "))):
        with pytest.raises(error):
            shelf.catalogue.put_class(*arguments)
    assert shelf.catalogue.put_class("cat", "cat")[0].name == "cat"
    assert shelf.catalogue.head_seq == 2


# --- the log as the learner reads it ---


def test_the_log_gives_whole_requests_with_their_latents(shelf: Shelf) -> None:
    shelf.teach(("cat", 0))
    shelf.teach(*[("cat", number) for number in range(1, 8)])
    shelf.teach(("cat", 8), ("cat", 8))
    entries = shelf.catalogue.entries(0, 3)
    assert [(entry.seq, entry.batch) for entry in entries] == [(1, 1)] + [(seq, 2) for seq in range(2, 9)]
    assert [entry.code for entry in entries] == [sample("cat", number).code for number in range(8)]
    assert [(entry.seq, entry.code is None) for entry in shelf.catalogue.entries(8, 3)] == [(9, False), (10, True)]
    assert shelf.catalogue.entries(10, 3) == []


def test_the_log_tells_the_class_at_its_time_and_the_class_before(shelf: Shelf) -> None:
    shelf.teach(("cat", 0), (None, 1), ("cat", 0))
    shelf.catalogue.relabel("s00000001", "dog", LEARNED)
    shelf.catalogue.relabel("s00000002", "cat", LEARNED)
    for sample_id in ("s00000001", "s00000002", "s00000003"):
        shelf.catalogue.forget(sample_id, LEARNED)
    shelf.catalogue.put_class("dog", "wolf")
    found = [(entry.kind, entry.class_id, entry.was) for entry in shelf.catalogue.entries(0, 100)]
    assert found == [
        ("sample", 0, None),
        ("sample", None, None),
        ("sample", 0, None),
        ("relabel", 1, 0),
        ("relabel", 0, None),
        ("forget", None, 1),
        ("forget", None, 0),
        ("forget", None, None),  # a duplicate was never learned
        ("rename", 1, None),
    ]


def test_a_relabel_that_the_learner_has_not_seen_keeps_the_latent_it_needs(shelf: Shelf) -> None:
    shelf.teach(("cat", 0), ("cat", 1))
    shelf.catalogue.relabel("s00000001", "dog", 2)
    shelf.catalogue.settle(2, ["s00000001", "s00000002"], 2)
    assert [shelf.state("s00000001"), shelf.state("s00000002")] == ["learned", "evicted"]
    shelf.catalogue.settle(3, ["s00000001"], 3)
    assert shelf.state("s00000001") == "evicted"


def test_evicting_what_is_gone_or_no_sample_changes_nothing(shelf: Shelf) -> None:
    shelf.teach(("cat", 0), ("cat", 1))
    shelf.catalogue.forget("s00000001", LEARNED)
    shelf.catalogue.settle(2, ["s00000001", "s00000003", "s00000099", "s00000002", "s00000002"], 0)
    assert shelf.states() == ["forgotten", "evicted"]
    assert shelf.classes() == {"cat": (1, 0, 0)}
    assert shelf.catalogue.stored == 0


# --- pages and keys ---


def test_pages_go_through_everything_once(shelf: Shelf) -> None:
    shelf.teach(*[("cat" if number % 3 else "dog", number) for number in range(10)])
    shelf.catalogue.forget("s00000004", LEARNED)
    seen, cursor = [], None
    while True:
        page, cursor = shelf.catalogue.page(cursor, 3, None, None, LEARNED)
        seen += [record.seq for record in page]
        if cursor is None:
            break
    assert seen == list(range(1, 11))
    assert [record.seq for record in shelf.catalogue.page(None, 9, "dog", None, LEARNED)[0]] == [1, 7, 10]
    assert [record.seq for record in shelf.catalogue.page(None, 9, None, "forgotten", LEARNED)[0]] == [4]
    assert shelf.catalogue.page("s00000010", 3, None, None, LEARNED) == ((), None)
    with pytest.raises(SampleNotFound):
        shelf.catalogue.page("no cursor", 3, None, None, LEARNED)


def keyed(shelf: Shelf, key: str, *batch: Tuple[str, int]) -> None:
    slots = (None, {"code": "image-undecodable"})
    shelf.catalogue.admit([sample(*item) for item in batch], Idempotency(key, "body", "request", slots))


def test_a_keyed_request_is_remembered_over_a_restart_for_a_day(shelf: Shelf) -> None:
    keyed(shelf, "key", ("cat", 0))
    shelf.reopen()
    recalled = shelf.catalogue.recall("key", LEARNED)
    assert recalled is not None
    assert (recalled.body_sha256, recalled.request_id, recalled.slots[1]) == ("body", "request", {"code": "image-undecodable"})
    assert [record.state for record in recalled.records] == ["learned"]
    assert shelf.catalogue.recall("other", LEARNED) is None
    shelf.now += KEY_LIFETIME_S + 1
    assert shelf.catalogue.recall("key", LEARNED) is None
    shelf.catalogue.expire_keys()
    assert list(shelf.store.scan("k/")) == []


def test_counters_are_kept(shelf: Shelf) -> None:
    shelf.catalogue.put_counters("energy", b'{"joules": 2.5}')
    shelf.reopen()
    assert shelf.catalogue.counters("energy") == {"joules": 2.5}
    assert shelf.catalogue.counters("unheard of") == {}


# --- room ---


def full_shelf(new_shelf: Callable[..., Shelf], label: Optional[str] = "cat") -> Tuple[Shelf, int]:
    """A shelf of 120 kB with nothing more to get in, and how many samples it took."""
    shelf = new_shelf(budget_bytes=120_000)
    number = 0
    while not shelf.catalogue._lacks(CODE_BYTES + 800):
        shelf.teach((label, number))
        number += 1
    return shelf, number


def test_a_full_journal_refuses_and_forgets_nothing(new_shelf: Callable[..., Shelf]) -> None:
    shelf, count = full_shelf(new_shelf)
    with pytest.raises(BudgetFull):
        shelf.teach(("cat", 9999))
    shelf.catalogue.settle(count, (), count)
    with pytest.raises(BudgetFull):
        shelf.teach(("cat", 9999))
    for act in (lambda: shelf.catalogue.put_class("new", None), lambda: shelf.catalogue.relabel("s00000001", "new", LEARNED)):
        with pytest.raises(BudgetFull):
            act()
    assert shelf.states() == ["learned"] * count
    assert shelf.catalogue.forget("s00000001", LEARNED).state == "forgotten"


def test_records_without_a_latent_make_room_once_every_version_has_learned_them(new_shelf: Callable[..., Shelf]) -> None:
    shelf, count = full_shelf(new_shelf)
    ids = [f"s{seq:08d}" for seq in range(1, count + 1)]
    shelf.catalogue.settle(count, ids[:5], prunable_seq=0)
    while True:  # the latents were small: fill up what they left
        try:
            shelf.teach(("cat", shelf.catalogue.head_seq))
        except BudgetFull:
            break
    assert shelf.state(ids[0]) == "evicted"
    shelf.catalogue.settle(count, ids[5:60], prunable_seq=count)
    for number in range(20):
        shelf.teach(("dog", number))
    with pytest.raises(SampleNotFound):
        shelf.state(ids[0])
    assert shelf.state(ids[-1]) == "learned"
    shelf.reopen()
    assert shelf.catalogue.head_seq >= count + 20
    assert shelf.teach(("cat", 0))[0].state == "queued"  # the record is gone, and with it what it was taught from


def test_a_search_for_room_that_found_nothing_is_not_repeated_at_once(new_shelf: Callable[..., Shelf]) -> None:
    shelf, _ = full_shelf(new_shelf)
    searches: List[float] = []
    prune = shelf.catalogue._prune
    shelf.catalogue._prune = lambda more: (searches.append(shelf.now), prune(more))  # type: ignore[method-assign,assignment,func-returns-value]
    for seconds in (0, 1, PRUNE_AGAIN_S, 1):
        shelf.now += seconds
        with pytest.raises(BudgetFull):
            shelf.teach(("cat", 9999))
    assert len(searches) == 2


def test_images_that_nobody_labelled_make_room_for_what_is_taught_oldest_first(new_shelf: Callable[..., Shelf]) -> None:
    shelf, count = full_shelf(new_shelf, label=None)
    shelf.catalogue.relabel(f"s{count:08d}", "cat", LEARNED) if not shelf.catalogue._lacks(800) else None
    assert shelf.teach(("cat", 9999))[0].state == "queued"
    states = shelf.states()
    assert states[0] == "evicted"
    assert states.count("held") > count / 2
    with pytest.raises(Conflict):
        shelf.catalogue.relabel("s00000001", "cat", LEARNED)


def test_a_relabel_outlives_pruning_for_as_long_as_its_latent(new_shelf: Callable[..., Shelf]) -> None:
    shelf, count = full_shelf(new_shelf)
    shelf.catalogue._limits = limits(budget_bytes=130_000)
    shelf.catalogue.relabel("s00000001", "dog", LEARNED)
    shelf.catalogue.relabel("s00000002", "dog", LEARNED)
    shelf.catalogue.settle(count + 2, ["s00000002"], count + 2)
    shelf.catalogue._prune(130_000)
    kinds = [(entry.seq, entry.kind) for entry in shelf.catalogue.entries(count, 10)]
    assert kinds == [(count + 1, "relabel")]


def test_a_keyed_request_whose_sample_had_to_make_room_is_still_answered(new_shelf: Callable[..., Shelf]) -> None:
    shelf = new_shelf(budget_bytes=120_000)
    keyed(shelf, "key", ("cat", 0))
    shelf.catalogue.settle(1, ["s00000001"], 1)
    shelf.catalogue._prune(120_000)
    recalled = shelf.catalogue.recall("key", LEARNED)
    assert recalled is not None
    assert [(record.sample_id, record.state) for record in recalled.records] == [("s00000001", "evicted")]


def test_what_is_in_memory_is_what_a_restart_reads(new_shelf: Callable[..., Shelf]) -> None:
    shelf = new_shelf(holdout_every=3, duplicate_cosine=0.999)
    shelf.teach(*[("cat", number) for number in range(7)], ("cat", 3), (None, 1), ("dog", 0))
    shelf.catalogue.relabel("s00000002", "owl", LEARNED)
    shelf.catalogue.forget("s00000008", LEARNED)
    shelf.catalogue.forget("s00000003", LEARNED)
    shelf.catalogue.settle(shelf.catalogue.head_seq - 1, ["s00000001", "s00000010"], 0)
    shelf.catalogue.forget("s00000001", LEARNED)

    def view() -> Tuple[int, int, Tuple[ClassRecord, ...], Any]:
        catalogue = shelf.catalogue
        return catalogue.head_seq, catalogue.stored, catalogue.class_records(), catalogue._unsettled

    before = view()
    shelf.reopen()
    assert view() == before
