"""Features of all samples, tokens of some: who loses its tokens, what still works without them, and what a restart finds."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Sequence

import numpy as np
import pytest

import tiny
from latentd.learning.adapted import Adapted
from latentd.learning.blocks import UpperBlocks
from latentd.learning.floor import HELD_SHARE
from latentd.learning.keeper import VersionKeeper
from latentd.learning.trainer import Trainer, TrainerSettings
from latentd.replay.journal import Journal
from latentd.replay.memory import slot_bytes
from latentd.replay.records import Entry, NewSample, sample_id_of
from lessons import WAIT_S, limits
from sleepers import CODEC, SETTINGS, D, code, latent, run

SLOT = slot_bytes(CODEC.code_bytes)
NAMES = {0: "cat", 1: "dog"}


@pytest.fixture
def base(tmp_path: Path) -> UpperBlocks:
    return UpperBlocks.load(tiny.backbone(tmp_path), 1)


def trainer_of(base: UpperBlocks, whole: int, features: int = 1 << 20, epochs: float = 0.0) -> Trainer:
    """With room for the tokens of `whole` samples, and of one in the hold-out for every seven."""
    settings = TrainerSettings(features, 16, epochs, 1e-3, 0.1, 0, token_bytes=-(-SLOT * whole * HELD_SHARE // (HELD_SHARE - 1)))
    return Trainer(CODEC, 2 * D, settings, Adapted(base, CODEC, SETTINGS))


def lesson(first: int, count: int, holdout: bool = False, packed: Optional[bytes] = None) -> List[Entry]:
    return [
        Entry(seq, "sample", first, sample_id_of(seq), seq % 2, None, holdout, packed or code(seq % 2, seq), 0.0)
        for seq in range(first, first + count)
    ]


def whole_of(trainer: Trainer) -> Sequence[str]:
    assert trainer.whole is not None
    return trainer.whole.ids()


def trimmed(entries: Sequence[Entry], ids: Sequence[str]) -> Iterator[Entry]:
    """The same log after the journal has cut these samples' tokens."""
    for entry in entries:
        assert entry.code is not None
        yield dataclasses.replace(entry, code=entry.code[: CODEC.features_bytes]) if entry.sample_id in ids else entry


def test_features_of_all_are_kept_and_tokens_of_as_many_as_fit(base: UpperBlocks) -> None:
    trainer = trainer_of(base, whole=8)
    run(trainer.take(lesson(1, 30)))
    assert trainer.memory.used == 30
    assert len(whole_of(trainer)) == 8
    assert sorted([*whole_of(trainer), *trainer.trimmed]) == sorted(trainer.memory.ids())
    assert trainer.evicted == []


def test_who_leaves_the_memory_leaves_its_tokens_too(base: UpperBlocks) -> None:
    trainer = trainer_of(base, whole=8, features=12 * slot_bytes(CODEC.features_bytes))
    run(trainer.take(lesson(1, 40)))
    assert trainer.memory.used == 12
    assert set(whole_of(trainer)) <= set(trainer.memory.ids())
    assert len(trainer.evicted) == 28


def test_the_hold_out_keeps_tokens_of_few_and_of_every_class(base: UpperBlocks) -> None:
    trainer = trainer_of(base, whole=28)
    run(trainer.take(lesson(1, 20)))
    run(trainer.sleep())
    run(trainer.take(lesson(21, 20, holdout=True)))
    held = [sample_id for sample_id, (_, code) in trainer._floor.holdout.items() if CODEC.holds_tokens(code)]
    assert held == [sample_id_of(seq) for seq in (37, 38, 39, 40)], "the newest, two of each class"
    assert len(trainer.trimmed) == 16
    assert trainer.adapted is not None
    assert [sample_id for sample_id in trainer._floor.holdout if trainer.adapted.answers(sample_id)] == held


def test_forgetting_is_exact_for_those_without_tokens(base: UpperBlocks) -> None:
    trainer, without = trainer_of(base, whole=8), trainer_of(base, whole=8)
    entries = lesson(1, 30)
    run(trainer.take(entries))
    gone = trainer.trimmed[0]
    seq = int(gone[1:])
    cut = next(trimmed([entries[seq - 1]], [gone]))
    run(trainer.take([Entry(31, "forget", 31, gone, None, seq % 2, False, cut.code, 0.0)]))
    run(without.take([entry for entry in entries if entry.sample_id != gone]))
    np.testing.assert_allclose(trainer.sums.solve().weight, without.sums.solve().weight, atol=1e-6)


def test_a_relabelled_sample_moves_in_both_memories_and_one_without_tokens_in_the_floor_alone(base: UpperBlocks) -> None:
    trainer = trainer_of(base, whole=8)
    entries = lesson(1, 30)
    run(trainer.take(entries))
    run(trainer.sleep())
    assert trainer.whole is not None and trainer.adapted is not None
    before = [trainer.adapted._sums.count_of(class_id) for class_id in (0, 1)]
    bare, kept = (next(found for found in ids if int(found[1:]) % 2 == 0) for ids in (trainer.trimmed, whole_of(trainer)))
    for seq, sample_id in ((31, bare), (32, kept)):
        row = entries[int(sample_id[1:]) - 1]
        found = next(trimmed([row], trainer.trimmed))
        run(trainer.take([Entry(seq, "relabel", seq, sample_id, 1, 0, False, found.code, 0.0)]))
    assert trainer.memory.class_of(bare) == trainer.memory.class_of(kept) == trainer.whole.class_of(kept) == 1
    assert [trainer.sums.count_of(class_id) for class_id in (0, 1)] == [13, 17]
    assert [trainer.adapted._sums.count_of(class_id) for class_id in (0, 1)] == [before[0] - 1, before[1] + 1]


def test_a_forgotten_class_leaves_both_memories_and_the_hold_out(base: UpperBlocks) -> None:
    trainer = trainer_of(base, whole=8)
    run(trainer.take(lesson(1, 30)))
    run(trainer.take([Entry(31, "forget_class", 31, "", 0, None, False, None, 0.0)]))
    assert trainer.whole is not None
    assert set(trainer.memory.counts()) == set(trainer.whole.counts()) == {1}


def test_a_forgotten_hold_out_sample_leaves_nothing_with_the_blocks(base: UpperBlocks) -> None:
    trainer = trainer_of(base, whole=28)
    run(trainer.take(lesson(1, 20)))
    run(trainer.sleep())
    run(trainer.take(lesson(21, 2, holdout=True)))
    assert trainer.adapted is not None and trainer.adapted.answers(sample_id_of(22))
    run(trainer.take([Entry(23, "forget", 23, sample_id_of(22), None, 0, True, code(0, 22), 0.0)]))
    assert not trainer.adapted.answers(sample_id_of(22))
    assert trainer.adapted.answers(sample_id_of(21))


@pytest.mark.parametrize("cut", [False, True], ids=["before the journal has cut them", "after"])
def test_a_restart_finds_the_same_tokens_and_gives_the_same_answers(base: UpperBlocks, cut: bool) -> None:
    trainer = trainer_of(base, whole=14, epochs=1.0)
    entries = [*lesson(1, 40), *lesson(41, 10, holdout=True)]
    run(trainer.take(entries[:40]))
    run(trainer.sleep())
    run(trainer.take(entries[40:]))
    lost = list(trainer.trimmed)
    again = trainer_of(base, whole=14, epochs=1.0)
    again.restore(*trainer.state(), list(trimmed(entries, lost if cut else ())))
    assert whole_of(again) == whole_of(trainer)
    assert sorted(again.trimmed) == ([] if cut else sorted(lost)), "to be cut once more, for nobody knows whether they were"
    more = lesson(51, 12)
    pictures = [latent(number % 2, 900 + number) for number in range(8)]
    features, tokens = (np.stack(each) for each in zip(*pictures))
    probabilities = []
    for each in (trainer, again):
        run(each.take(more))
        run(each.sleep())
        snapshot, accuracy = each.candidate(NAMES, 0.0)
        probabilities.append(snapshot.predict(features, tokens))
        assert accuracy.holdout.count > 0
    np.testing.assert_array_equal(probabilities[0], probabilities[1])
    assert whole_of(again) == whole_of(trainer)


def test_a_smaller_budget_keeps_fewer_tokens_and_everything_else(base: UpperBlocks) -> None:
    trainer = trainer_of(base, whole=28)
    entries = [*lesson(1, 40), *lesson(41, 10, holdout=True)]
    run(trainer.take(entries))
    small = trainer_of(base, whole=7)
    small.restore(*trainer.state(), list(trimmed(entries, trainer.trimmed)))
    assert len(whole_of(small)) == 7
    assert sum(CODEC.holds_tokens(code) for _, code in small._floor.holdout.values()) == 1
    assert len(small.trimmed) == 21 + 3
    assert small.memory.used == 40


def test_a_version_from_when_there_was_one_memory_gives_its_tokens_to_the_second(base: UpperBlocks) -> None:
    trainer = trainer_of(base, whole=28)
    entries = lesson(1, 30)
    run(trainer.take(entries))
    arrays, facts = trainer.state()
    again = trainer_of(base, whole=14)
    again.restore({name: array for name, array in arrays.items() if name != "whole.seqs"}, {**facts, "whole": None}, entries)
    assert len(whole_of(again)) == 14
    assert sorted([*whole_of(again), *again.trimmed]) == sorted(trainer.memory.ids())


def test_what_was_stored_without_tokens_teaches_the_floor_and_no_block(base: UpperBlocks) -> None:
    """As after an upgrade from a daemon whose head alone learned."""
    trainer = trainer_of(base, whole=28)
    entries = list(trimmed(lesson(1, 20), [sample_id_of(seq) for seq in range(1, 21)]))
    run(trainer.take(entries))
    assert trainer.memory.used == 20
    assert whole_of(trainer) == ()
    assert not trainer.wants_sleep()
    assert trainer.tokens([entry.code for entry in entries if entry.code]) is None
    assert sorted(trainer.candidate(NAMES, 0.0)[0].class_ids) == [0, 1]


def test_where_the_blocks_stay_out_the_trained_head_is_asked_and_the_reason_tells_of_both(base: UpperBlocks) -> None:
    """Blocks of random weights know nothing that the floor does not."""
    trainer = trainer_of(base, whole=512, epochs=1.0)
    run(trainer.take(lesson(1, 64)))
    run(trainer.take(lesson(65, 64, holdout=True)))
    run(trainer.sleep())
    assert trainer.candidate(NAMES, 0.0)[0].adapted is None
    verdict = trainer.last_verdict
    assert verdict is not None
    assert verdict.reason.startswith("blocks kept out: before learning")
    assert "; head " in verdict.reason
    assert verdict.holdout == 64


def test_without_a_trained_head_the_reason_is_the_blocks_own(base: UpperBlocks) -> None:
    trainer = trainer_of(base, whole=512)
    run(trainer.take(lesson(1, 64)))
    run(trainer.sleep())
    snapshot, accuracy = trainer.candidate(NAMES, 0.0)
    assert (snapshot.adapted, snapshot.trained, accuracy.holdout.count) == (None, None, 0)
    assert trainer.last_verdict is not None
    assert trainer.last_verdict.reason.startswith("kept out: before learning")


def journal_in(folder: Path) -> Journal:
    journal = Journal(folder / "journal.sqlite", codec=CODEC, feature_width=2 * D, limits=limits())
    journal.start(WAIT_S)
    return journal


def teach(journal: Journal, count: int) -> None:
    for seq in range(1, count + 1):
        features = latent(seq % 2, seq)[0]
        journal.admit([NewSample(NAMES[seq % 2], code(seq % 2, seq), features, f"{seq:032x}{seq:032x}")]).result(WAIT_S)


def lengths(journal: Journal) -> Dict[str, int]:
    return {entry.sample_id: len(entry.code or b"") for entry in journal.entries(0, 1000).result(WAIT_S)}


def test_the_journal_cuts_tokens_only_once_a_version_without_them_is_on_the_disk(base: UpperBlocks, tmp_path: Path) -> None:
    journal = journal_in(tmp_path)
    try:
        teach(journal, 30)
        trainer = trainer_of(base, whole=8)
        keeper = VersionKeeper(journal, tmp_path / "versions", 3600.0, 3)
        run(trainer.take(journal.entries(0, 1000).result(WAIT_S)))
        assert set(lengths(journal).values()) == {CODEC.code_bytes}
        lost = set(trainer.trimmed)
        keeper.save(trainer)
        found = lengths(journal)
        assert {sample_id for sample_id, length in found.items() if length == CODEC.features_bytes} == lost
        assert {length for sample_id, length in found.items() if sample_id not in lost} == {CODEC.code_bytes}
        assert journal.status().samples == 30
    finally:
        journal.close(WAIT_S)


def test_all_tokens_can_be_dropped_at_once_and_that_is_durable(tmp_path: Path) -> None:
    journal = journal_in(tmp_path)
    teach(journal, 5)
    size = journal.status().size_bytes
    journal.drop_tokens().result(WAIT_S)
    journal.close(WAIT_S)
    again = journal_in(tmp_path)
    try:
        assert set(lengths(again).values()) == {CODEC.features_bytes}
        assert again.status().size_bytes <= size
        teach(again, 5)
        assert again.status().samples == 5, "the same images are still known as taught"
    finally:
        again.close(WAIT_S)


def test_a_code_is_read_with_its_tokens_or_without_and_in_no_other_length() -> None:
    codes = [code(0, 1), code(1, 2)[: CODEC.features_bytes]]
    features = CODEC.features_of(codes)
    np.testing.assert_array_equal(features[0], CODEC.decode_features(np.frombuffer(codes[0], np.uint8)[None])[0])
    np.testing.assert_array_equal(features[1], CODEC.decode_features(np.frombuffer(codes[1], np.uint8)[None])[0])
    assert [CODEC.holds_tokens(each) for each in codes] == [True, False]
    assert CODEC.features_of([]).shape == (0, 2 * D)
    with pytest.raises(ValueError, match="bytes, not"):
        CODEC.features_of([codes[0][:-1]])
