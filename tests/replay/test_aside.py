"""Rows of the journal that a disk has damaged: each is set aside and told, and everything else goes on."""

from __future__ import annotations

import logging
from typing import List

import pytest

from latentd.errors import JournalError
from latentd.replay.aside import MOST
from latentd.replay.records import Idempotency
from lessons import sample
from shelf import LEARNED, Shelf

HALF = b'S{"batch":2,"first_class":0,"class_'


def damage(shelf: Shelf, key: str, value: bytes = HALF) -> None:
    assert shelf.store.get(key) is not None
    shelf.store.put({key: value})


def told(caplog: pytest.LogCaptureFixture) -> List[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]


@pytest.mark.parametrize("value", [HALF, b"S[]", b"S3", b'S{"batch":2}', b"S", b"S\xff\xfe", b'S{"nonsense":1}'])
def test_a_damaged_sample_is_held_until_it_gets_a_label_and_the_others_are_as_they_were(
    shelf: Shelf, caplog: pytest.LogCaptureFixture, value: bytes
) -> None:
    shelf.teach(("cat", 0), ("cat", 1), ("dog", 2))
    others = [shelf.catalogue.sample(sample_id, LEARNED) for sample_id in ("s00000001", "s00000003")]
    damage(shelf, "e/000000000002", value)
    shelf.reopen()
    (said,) = told(caplog)
    assert "row e/000000000002 of the journal is damaged" in said
    assert "sample s00000002 has no label until it is given one" in said
    assert [shelf.catalogue.sample(sample_id, LEARNED) for sample_id in ("s00000001", "s00000003")] == others
    assert (shelf.state("s00000002"), shelf.latents(), shelf.catalogue.set_aside, shelf.catalogue.stored) == ("held", 3, 1, 2)
    assert shelf.store.get("x/e/000000000002") == value
    assert [(entry.seq, entry.code is None) for entry in shelf.catalogue.entries(0, 9)] == [(1, False), (2, True), (3, False)]
    assert shelf.catalogue.relabel("s00000002", "cat", LEARNED).label == "cat"
    assert shelf.catalogue.entries(3, 9)[0].code == sample("cat", 1).code


def test_what_lies_aside_is_told_at_every_start_and_logged_once(shelf: Shelf, caplog: pytest.LogCaptureFixture) -> None:
    shelf.teach(("cat", 0), ("cat", 1))
    damage(shelf, "e/000000000001")
    shelf.reopen()
    shelf.reopen()
    assert (len(told(caplog)), shelf.catalogue.set_aside, shelf.state("s00000001")) == (1, 1, "held")


def test_the_last_row_may_be_damaged_and_the_log_ends_where_it_did(shelf: Shelf) -> None:
    shelf.teach(("cat", 0), ("cat", 1))
    damage(shelf, "e/000000000002")
    shelf.reopen()
    assert (shelf.catalogue.head_seq, shelf.catalogue.entries(1, 9)[-1].seq) == (2, 2)


def test_a_damaged_sample_without_a_latent_stays_gone_and_its_image_can_be_taught_again(shelf: Shelf) -> None:
    shelf.teach(("cat", 0), ("dog", 1))
    shelf.catalogue.settle(2, ["s00000001"], 2)
    damage(shelf, "e/000000000001")
    shelf.reopen()
    assert shelf.state("s00000001") == "evicted"
    assert shelf.teach(("cat", 0))[0].state == "queued"


def test_a_damaged_sample_that_is_forgotten_leaves_nothing(shelf: Shelf) -> None:
    shelf.teach(("cat", 0), ("cat", 1))
    damage(shelf, "e/000000000001")
    shelf.reopen()
    shelf.catalogue.forget("s00000001", LEARNED)
    shelf.catalogue.settle(3, (), 0)
    assert (shelf.latents(), shelf.catalogue.set_aside, list(shelf.store.scan("x/"))) == (1, 0, [])


def test_a_damaged_change_changes_nothing_and_is_told(shelf: Shelf, caplog: pytest.LogCaptureFixture) -> None:
    shelf.teach(("cat", 0))
    shelf.catalogue.put_class("cat", "lynx")
    damage(shelf, "e/000000000002", b"C{")
    shelf.reopen()
    assert "a correction, a new name or a wish to forget is lost" in told(caplog)[0]
    assert [(entry.seq, entry.kind) for entry in shelf.catalogue.entries(0, 9)] == [(1, "sample"), (2, "damaged")]
    assert shelf.classes() == {"lynx": (1, 0, 1)}


def test_what_was_to_be_forgotten_is_wiped_though_the_wish_is_damaged(shelf: Shelf) -> None:
    shelf.teach(("cat", 0), ("dog", 1))
    shelf.catalogue.forget("s00000001", LEARNED)
    damage(shelf, "e/000000000003", b"C{")
    shelf.reopen()
    shelf.catalogue.settle(3, (), 0)
    assert (shelf.state("s00000001"), shelf.latents()) == ("forgotten", 1)


def test_a_class_whose_row_is_damaged_keeps_its_samples_and_can_be_renamed(shelf: Shelf, caplog: pytest.LogCaptureFixture) -> None:
    shelf.teach(("cat", 0), ("cat", 1), ("dog", 2))
    damage(shelf, "c/0", b'{"name": "ca')
    shelf.reopen()
    assert shelf.classes() == {"class 0 (its name is lost)": (2, 0, 2), "dog": (1, 0, 1)}
    assert "named class 0 (its name is lost) until it is renamed" in told(caplog)[0]
    shelf.catalogue.put_class("class 0 (its name is lost)", "cat")
    shelf.reopen()
    assert shelf.classes() == {"cat": (2, 0, 2), "dog": (1, 0, 1)}


@pytest.mark.parametrize("key", ["m/seq", "m/next_class", "m/counters/energy"])
def test_a_damaged_number_is_counted_anew(shelf: Shelf, key: str) -> None:
    shelf.teach(("cat", 0), ("dog", 1))
    shelf.catalogue.put_counters("energy", b'{"joules": 2.5}')
    damage(shelf, key, b"{2")
    shelf.reopen()
    lost = key == "m/counters/energy"
    assert shelf.catalogue.counters("energy") == ({} if lost else {"joules": 2.5})
    assert shelf.teach(("owl", 2))[0].seq == 3
    assert [record.class_id for record in shelf.catalogue.class_records()] == [0, 1, 2]
    assert shelf.catalogue.set_aside == 1


@pytest.mark.parametrize("value", [b"{", b'{"at": "noon"}', b"[]"])
def test_a_damaged_key_is_recalled_no_more(shelf: Shelf, value: bytes) -> None:
    shelf.catalogue.admit([sample("cat", 0)], Idempotency("key", "body", "request", (None,)))
    ((key, _),) = shelf.store.scan("k/")
    damage(shelf, key, value)
    shelf.reopen()
    shelf.catalogue.expire_keys()
    assert (shelf.catalogue.recall("key", LEARNED), shelf.catalogue.set_aside) == (None, 1)


def test_a_row_of_a_newer_version_is_not_taken_for_damaged(shelf: Shelf) -> None:
    shelf.teach(("cat", 0))
    whole = shelf.store.get("e/000000000001")
    assert whole is not None
    damage(shelf, "e/000000000001", whole[:-1] + b',"certainty":1}')
    with pytest.raises(JournalError, match=r"newer latentd.*certainty"):
        shelf.reopen()


def test_a_file_that_is_no_journal_of_ours_is_refused_and_not_changed(shelf: Shelf) -> None:
    shelf.teach(*[("cat", number) for number in range(MOST + 1)])
    for seq in range(1, MOST + 2):
        damage(shelf, f"e/{seq:012d}", b'S{"of":"another version"}')
    with pytest.raises(JournalError, match=f"more than {MOST} rows"):
        shelf.reopen()
    shelf.store.roll_back()
    assert (list(shelf.store.scan("x/")), shelf.store.get("e/000000000001")) == ([], b'S{"of":"another version"}')
