"""The rules of the journal: what is taught once, what is held out, what a correction and forgetting do."""

from __future__ import annotations

from dataclasses import replace
from typing import Callable, List

import numpy as np
import pytest

from latentd.errors import ClassNotFound, Conflict, LabelInvalid, SampleNotFound
from latentd.replay.records import NewSample, SampleRecord
from lessons import CODEC, features, sample, sha256_of
from shelf import LEARNED, Shelf

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
    for act in (shelf.catalogue.sample, shelf.catalogue.forget):
        with pytest.raises(SampleNotFound):
            act(sample_id, 0)


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
    return NewSample(label, CODEC.encode(row[None])[0].tobytes(), row, sha256_of("turned", int(cosine * 1e6)))


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


def test_a_label_that_is_said_again_reaches_the_learner_once_until_it_has_learned_it(shelf: Shelf) -> None:
    shelf.teach(("cat", 0))
    for learned_seq, head_seq in ((1, 2), (1, 2), (2, 3), (2, 3)):
        record = shelf.catalogue.relabel("s00000001", "cat", learned_seq, again=True)
        assert (record.label, record.state, shelf.catalogue.head_seq) == ("cat", "queued", head_seq)
    assert shelf.catalogue.relabel("s00000001", "dog", 2, again=True).label == "dog"
    assert (shelf.catalogue.head_seq, shelf.classes()) == (4, {"cat": (0, 0, 0), "dog": (1, 0, 1)})


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
