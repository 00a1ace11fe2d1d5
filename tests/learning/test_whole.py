"""Features of all samples, tokens of some: who loses its tokens, what still works without them, and what a restart finds."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import numpy as np
import pytest
from numpy.typing import NDArray

import tiny
from latentd.learning import rehearsal
from latentd.learning.adapted import Adapted
from latentd.learning.blocks import UpperBlocks
from latentd.learning.floor import HELD_SHARE
from latentd.learning.keeper import VersionKeeper
from latentd.learning.trainer import Trainer, TrainerSettings
from latentd.replay.latents import LatentCodec
from latentd.replay.memory import DOUBTED, slot_bytes
from latentd.replay.records import Entry, sample_id_of
from lessons import WAIT_S
from sleepers import CODEC, SETTINGS, D, code, latent, run
from tokened import journal_in, lengths, teach

SLOT = slot_bytes(CODEC.code_bytes)
NAMES = {0: "cat", 1: "dog"}


@pytest.fixture
def unrehearsed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sleep that begins at once."""
    monkeypatch.setattr(rehearsal, "ENOUGH", 0)


def trainer_of(base: UpperBlocks, whole: int, features: int = 1 << 20, epochs: float = 0.0, nats: float = 0.0) -> Trainer:
    """With room for the tokens of `whole` samples, and of one in the hold-out for every seven."""
    settings = TrainerSettings(
        features, 16, epochs, 1e-3, 0.1, 0, doubt_nats=nats, token_bytes=-(-SLOT * whole * HELD_SHARE // (HELD_SHARE - 1))
    )
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


def test_a_hold_out_sample_that_has_no_room_for_its_tokens_is_none_that_the_blocks_answer(base: UpperBlocks) -> None:
    trainer = trainer_of(base, whole=28)
    run(trainer.take(lesson(1, 20)))
    run(trainer.sleep())
    assert trainer._floor.whole is not None and trainer.adapted is not None
    trainer._floor.whole._most_held = 0
    run(trainer.take(lesson(21, 1, holdout=True)))
    assert trainer.trimmed == [sample_id_of(21)]
    assert not trainer.adapted.answers(sample_id_of(21))


def test_a_hold_out_sample_that_goes_near_the_end_of_a_sleep_is_none_that_the_blocks_answer(base: UpperBlocks, unrehearsed: None) -> None:
    trainer = trainer_of(base, whole=28)
    run(trainer.take(lesson(1, 20)))
    run(trainer.take(lesson(21, 4, holdout=True)))
    assert trainer.adapted is not None and trainer.whole is not None
    steps = trainer.adapted.sleep(trainer.whole, trainer._floor.holdout, trainer.sums.count)
    for _ in range(trainer.adapted.steps(trainer.whole) * SETTINGS.minibatch // SETTINGS.microbatch + 2):  # into the walk
        next(steps)
    run(trainer.take(lesson(25, 2, holdout=True)))
    run(trainer.take([Entry(27, "forget", 27, sample_id_of(23), None, 1, True, code(1, 23), 0.0)]))
    run(steps)
    assert trainer.adapted.sleeps == 1
    assert trainer.trimmed == [sample_id_of(21), sample_id_of(22)]
    assert sorted(trainer.adapted._holdout) == [sample_id_of(seq) for seq in (24, 25, 26)]


def test_an_old_sample_that_gets_its_label_after_the_walk_has_passed_is_in_no_sum_and_moves_in_none(
    base: UpperBlocks, unrehearsed: None
) -> None:
    trainer = trainer_of(base, whole=64)
    run(trainer.take(lesson(2, 20)))
    assert trainer.adapted is not None and trainer.whole is not None
    steps = trainer.adapted.sleep(trainer.whole, trainer._floor.holdout, trainer.sums.count)
    for _ in range(trainer.adapted.steps(trainer.whole) * SETTINGS.minibatch // SETTINGS.microbatch + 2):
        next(steps)
    waited = code(0, 1)
    run(trainer.take([Entry(22, "relabel", 22, sample_id_of(1), 0, None, False, waited, 0.0)]))
    run(steps)
    assert trainer.adapted.sleeps == 1 and sample_id_of(1) in trainer.whole
    before = [trainer.adapted._sums.count_of(class_id) for class_id in (0, 1)]
    run(trainer.take([Entry(23, "relabel", 23, sample_id_of(1), 1, 0, False, waited, 0.0)]))
    assert before == [10, 10] == [trainer.adapted._sums.count_of(class_id) for class_id in (0, 1)]


@pytest.mark.parametrize(("whole", "features"), [(6, 1 << 20), (64, 6 * slot_bytes(CODEC.features_bytes))], ids=["tokens", "features"])
def test_where_fewer_fit_than_a_first_sleep_asks_for_it_comes_when_the_memory_is_full(base: UpperBlocks, whole: int, features: int) -> None:
    trainer = trainer_of(base, whole, features)
    run(trainer.take(lesson(1, 7)))
    assert not trainer.wants_sleep(), f"{SETTINGS.first} are needed"
    run(trainer.take(lesson(8, 1)))
    assert len(whole_of(trainer)) == 6 < SETTINGS.first
    assert trainer.wants_sleep()


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


def of_an_older_daemon(trainer: Trainer) -> Tuple[Dict[str, NDArray[Any]], Dict[str, Any]]:
    """Its version as one wrote it that had one memory, of samples with their tokens, and did not say what its blocks were made of."""
    arrays, facts = trainer.state()
    del arrays["whole.seqs"], facts["whole"], facts["adapted"]["of"]
    return arrays, facts


def test_a_version_of_before_there_were_two_memories_keeps_its_tokens_and_sleeps_again(base: UpperBlocks) -> None:
    trainer, again = (trainer_of(base, whole=512, nats=9.0) for _ in range(2))
    entries = [*lesson(1, 40), *lesson(41, 10, holdout=True)]
    run(trainer.take(entries))
    run(trainer.sleep())
    for memory in trainer._floor._memories():
        memory.judge(sample_id_of(7), DOUBTED)
    again.restore(*of_an_older_daemon(trainer), entries)
    assert whole_of(again) == whole_of(trainer)
    assert again.whole is not None
    assert again.whole.ids_of(DOUBTED) == (sample_id_of(7),), "no sleep may learn from it"
    assert (again.trimmed, again.evicted) == ([], [])
    assert all(CODEC.holds_tokens(code) for _, code in again._floor.holdout.values())
    assert again.adapted is not None and again.adapted.serving is None
    assert again.wants_sleep()


def test_a_version_of_other_blocks_or_another_rank_is_read_without_them(base: UpperBlocks, tmp_path: Path) -> None:
    trainer = trainer_of(base, whole=512)
    entries = lesson(1, 40)
    run(trainer.take(entries))
    run(trainer.sleep())
    fewer = UpperBlocks.load(tiny.backbone(tmp_path), 2)
    for state in (trainer.state(), of_an_older_daemon(trainer)):
        for blocks, settings in ((fewer, SETTINGS), (base, dataclasses.replace(SETTINGS, rank=1 + SETTINGS.rank))):
            again = trainer_of(base, whole=512)
            again.adapted = Adapted(blocks, CODEC, settings)
            again.restore(*state, entries)
            assert again.adapted.serving is None
            assert again.wants_sleep()


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


@pytest.mark.parametrize("lacks", [("whole", "whole.seqs"), ("adapted",)], ids=["one memory", "no blocks"])
def test_a_version_of_an_older_daemon_is_read_and_its_tokens_go_where_they_fit(base: UpperBlocks, lacks: Sequence[str]) -> None:
    trainer = trainer_of(base, whole=28)
    entries = lesson(1, 30)
    run(trainer.take(entries))
    arrays, facts = ({name: value for name, value in table.items() if name not in lacks} for table in trainer.state())
    again = trainer_of(base, whole=14)
    again.restore(arrays, facts, entries)
    assert (again.memory.used, again.seq, again.version) == (30, trainer.seq, trainer.version)
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


def test_what_was_learned_without_tokens_does_not_put_off_the_second_sleep(base: UpperBlocks) -> None:
    """A folder of 40 samples of a daemon whose head alone learned: growth is of what the blocks can go over."""
    head, cut = Trainer(LatentCodec(CODEC.features), 2 * D, TrainerSettings(1 << 20, 16, 0.0, 1e-3, 0.1, 0)), range(1, 41)
    entries = list(trimmed(lesson(1, 40), [sample_id_of(seq) for seq in cut]))
    run(head.take(entries))
    trainer, replayed = trainer_of(base, whole=512), trainer_of(base, whole=512)
    trainer.restore(*head.state(), entries)
    run(replayed.take(entries))
    for each in (trainer, replayed):
        assert not each.wants_sleep()
        run(each.take(lesson(41, 8)))
        assert each.wants_sleep()
        run(each.sleep())
        run(each.take(lesson(49, 7)))
        assert not each.wants_sleep()
    again = trainer_of(base, whole=512)
    again.restore(*trainer.state(), [*entries, *lesson(41, 15)])
    for each in (trainer, replayed, again):
        run(each.take(lesson(56, 1)))
        assert each.wants_sleep()


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
