"""The log of the journal: what the learner reads, what pages and keys show, and what makes room first."""

from __future__ import annotations

from typing import Any, Callable, Iterator, List, Optional, Tuple

import pytest

from latentd.errors import BudgetFull, Conflict, SampleNotFound
from latentd.replay import catalogue as catalogue_module
from latentd.replay.catalogue import PRUNE_AGAIN_S, Catalogue
from latentd.replay.key_table import KEY_LIFETIME_S
from latentd.replay.records import ClassRecord, Idempotency
from latentd.replay.store import Store
from lessons import CODEC, limits, sample
from shelf import LEARNED, Shelf

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


def test_a_page_of_the_log_reads_no_more_latents_than_it_gives(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(40):
        shelf.teach(("cat", number))
    read: List[str] = []
    select = Store._select

    def noted(self: Store, query: str, arguments: Tuple[Any, ...] = ()) -> Iterator[Tuple[Any, ...]]:
        for row in select(self, query, arguments):
            read.append(str(row[0]))
            yield row

    monkeypatch.setattr(Store, "_select", noted)
    assert len(shelf.catalogue.entries(10, 5)) == 5
    assert [key for key in read if key.startswith("l/")] == [f"l/{seq:012d}" for seq in range(11, 16)]


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


def test_chosen_samples_come_in_their_order_without_those_that_are_gone(shelf: Shelf) -> None:
    shelf.teach(("cat", 0), ("dog", 1), ("cat", 2))
    shelf.catalogue.forget("s00000001", LEARNED)
    found = shelf.catalogue.samples_of(["s00000003", "s00000004", "s00000009", "nonsense", "s00000001"], 3)
    assert [(record.sample_id, record.label, record.state) for record in found] == [
        ("s00000003", "cat", "learned"),
        ("s00000001", None, "forgotten"),
    ]


def test_a_page_looks_at_so_many_others_at_most_and_the_next_goes_on_there(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue_module, "_PASSED_OVER", 3)
    shelf.teach(("dog", 0), *[("cat", number) for number in range(10)], ("dog", 1))
    page, cursor = shelf.catalogue.page(None, 9, "dog", None, LEARNED)
    assert ([record.seq for record in page], cursor) == ([1], "s00000004")
    page, cursor = shelf.catalogue.page(cursor, 9, "dog", None, LEARNED)
    assert (page, cursor) == ((), "s00000007")
    seen: List[int] = []
    while cursor is not None:
        page, cursor = shelf.catalogue.page(cursor, 9, "dog", None, LEARNED)
        seen += [record.seq for record in page]
    assert seen == [12]
    assert len(shelf.catalogue.page(None, 99, "cat", None, LEARNED)[0]) == 10


def test_a_class_that_nobody_taught_is_not_looked_for_in_the_log(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf.teach(("cat", 0))
    monkeypatch.setattr(shelf.catalogue._log, "rows", lambda after_seq: pytest.fail("the log was read"))
    assert shelf.catalogue.page(None, 9, "owl", None, LEARNED) == ((), None)


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


def test_a_clock_that_is_set_by_decades_forgets_no_key_that_was_used_before(shelf: Shelf) -> None:
    shelf.now = 60.0  # a board without a battery, a minute after its boot
    keyed(shelf, "key", ("cat", 0))
    shelf.now = 1.8e9
    assert shelf.catalogue.recall("key", LEARNED) is not None


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
    while not shelf.catalogue._lacks(CODEC.code_bytes + 800):
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


def test_a_search_for_room_that_found_nothing_is_not_repeated_at_once(
    new_shelf: Callable[..., Shelf], monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf, _ = full_shelf(new_shelf)
    searches: List[float] = []
    prune = Catalogue._prune

    def noted(self: Catalogue, more_bytes: int) -> None:
        searches.append(shelf.now)
        prune(self, more_bytes)

    monkeypatch.setattr(Catalogue, "_prune", noted)
    for seconds in (0.0, 1.0, PRUNE_AGAIN_S, 1.0):
        shelf.now += seconds
        with pytest.raises(BudgetFull):
            shelf.teach(("cat", 9999))
    assert len(searches) == 2
    shelf.now -= 1e6  # a clock that is set back puts nothing off
    with pytest.raises(BudgetFull):
        shelf.teach(("cat", 9999))
    assert len(searches) == 3


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
