"""Asked before they have answered anything: which samples are kept away together, and what a rehearsal leaves behind."""

from __future__ import annotations

from typing import Tuple

import numpy as np
import pytest

from latentd.learning import rehearsal
from latentd.learning.adapted import Adapted
from latentd.learning.blocks import UpperBlocks
from latentd.learning.floor import Floor
from latentd.learning.rehearsal import FOLDS, course, rehearse
from latentd.learning.trainer import Trainer, TrainerSettings
from latentd.replay.memory import AWAY, DOUBTED, PLAIN, VOUCHED, ReplayMemory
from latentd.replay.records import Entry, sample_id_of
from sleepers import CODEC, SETTINGS, D, code, run

RUN = 5  # samples taught in a row under one label


def class_of(seq: int) -> int:
    """Runs of five by turns of two classes; seven samples of a third at the end, taught in one go."""
    return ((seq - 1) // RUN) % 2 if seq <= 60 else 2


def taught(base: UpperBlocks, upto: int = 67) -> Trainer:
    settings = TrainerSettings(1 << 22, 16, 0.0, 1e-3, 0.1, 0, token_bytes=1 << 22)
    trainer = Trainer(CODEC, 2 * D, settings, Adapted(base, CODEC, SETTINGS))
    for first in range(1, upto + 1, RUN):
        run(trainer.take([entry(seq) for seq in range(first, min(first + RUN, upto + 1))]))
    return trainer


def entry(seq: int) -> Entry:
    first = seq - (seq - 1) % RUN
    return Entry(seq, "sample", first, sample_id_of(seq), class_of(seq), None, False, code(class_of(seq), seq), 0.0)


def parts(trainer: Trainer) -> Tuple[Adapted, Floor, ReplayMemory]:
    assert trainer.adapted is not None and trainer.whole is not None
    return trainer.adapted, trainer._floor, trainer.whole


def test_a_run_stays_together_and_the_runs_of_a_class_are_spread(base: UpperBlocks) -> None:
    found = course(taught(base).memory, seed=0)
    assert found.ids == [sample_id_of(seq) for seq in range(1, 68)]
    assert found.class_ids.tolist() == [class_of(seq) for seq in range(1, 68)]
    assert found.runs.tolist() == [(seq - 1) // RUN if seq <= 60 else 12 for seq in range(1, 68)]
    for number in range(13):
        assert len(set(found.folds[found.runs == number].tolist())) == 1
    for class_id in (0, 1):
        sizes = [len(set(found.runs[(found.folds == fold) & (found.class_ids == class_id)].tolist())) for fold in range(FOLDS)]
        assert sorted(sizes) == [1, 1, 2, 2]
    assert set(found.folds[found.class_ids == 2].tolist()) == {-1}, "a few that were taught in one go would be unknown without it"


def test_classes_that_were_taught_one_after_the_other_are_cut_into_runs() -> None:
    """A folder a class, as `latentd learn photos` teaches them."""
    memory = ReplayMemory("int8", 8, 1 << 16, 0)
    for number in range(60):
        memory.admit(sample_id_of(number + 1), number // 20, bytes(8))
    found = course(memory, seed=0)
    for class_id in range(3):
        mine = found.class_ids == class_id
        assert sorted(found.folds[mine].tolist()) == [fold for fold in range(FOLDS) for _ in range(5)]
        assert [len(set(found.runs[mine & (found.folds == fold)].tolist())) for fold in range(FOLDS)] == [1] * FOLDS
        assert np.count_nonzero(np.diff(found.folds[mine])) == FOLDS - 1, "neighbours stay together"
    assert len(set(found.runs.tolist())) == 3 * FOLDS


def test_what_is_doubted_is_neither_learned_nor_asked(base: UpperBlocks) -> None:
    trainer = taught(base)
    trainer.memory.judge(sample_id_of(3), DOUBTED)
    assert sample_id_of(3) not in course(trainer.memory, seed=0).ids


def test_an_empty_memory_has_no_course() -> None:
    found = course(ReplayMemory("int8", 8, 1 << 16, 0), seed=0)
    assert (found.ids, len(found.runs), len(found.folds)) == ([], 0, 0)


def test_every_run_is_asked_once_of_heads_that_never_saw_it_and_nothing_else_changes(base: UpperBlocks) -> None:
    trainer = taught(base)
    adapted, floor, whole = parts(trainer)
    for memory in (trainer.memory, whole):
        memory.judge(sample_id_of(7), VOUCHED)
    drawn = [whole.drawable for _ in rehearse(adapted, floor, seed=0)]
    assert min(drawn) < whole.used, "some were away"
    table = adapted.evidence.table((0, 1, 2))
    assert len(table.columns) == 60
    assert sorted(set(table.groups.tolist())) == list(range(1, 61, RUN)), "each run counts once"
    assert (adapted.serving, adapted.sleeps, adapted.learned_at) == (None, 0, 0)
    assert whole.drawable == whole.used
    assert (whole.standing(sample_id_of(7)), whole.standing(sample_id_of(8))) == (VOUCHED, PLAIN)


def test_heads_that_know_the_answer_are_not_what_is_asked(base: UpperBlocks) -> None:
    """Noise with labels: who was kept away from a sample can only guess, who learned it knows it by heart."""
    trainer = taught(base, upto=60)
    adapted, floor, _ = parts(trainer)
    run(rehearse(adapted, floor, seed=0))
    table = adapted.evidence.table((0, 1))
    known = floor.features([code(class_of(seq), seq) for seq in range(1, 61)])
    head = trainer.sums.solve()
    by_heart = np.array(head.class_ids)[(known @ head.weight + head.bias).argmax(axis=1)]
    assert np.mean(by_heart == [class_of(seq) for seq in range(1, 61)]) == 1.0
    assert np.mean(table.floor.argmax(axis=1) == table.columns) < 1.0


@pytest.mark.parametrize("act", ["forget", "relabel"])
def test_what_voids_a_sleep_voids_a_rehearsal_and_brings_back_who_was_away(base: UpperBlocks, act: str) -> None:
    trainer = taught(base)
    _, _, whole = parts(trainer)
    sleep = trainer.sleep()
    for _ in range(5):
        next(sleep)
    assert whole.drawable < whole.used
    row = Entry(68, act, 68, sample_id_of(2), 1 if act == "relabel" else None, class_of(2), False, code(class_of(2), 2), 0.0)
    run(trainer.take([row]))
    assert run(sleep) <= 1
    assert whole.drawable == whole.used
    assert trainer.adapted is not None and trainer.adapted.sleeps == 0
    assert len(trainer.adapted.evidence) == 0, "half a rehearsal says nothing: the next one asks everything again"


def test_a_sleep_that_is_dropped_brings_back_who_was_away(base: UpperBlocks) -> None:
    trainer = taught(base)
    _, _, whole = parts(trainer)
    sleep = trainer.sleep()
    next(sleep)
    assert AWAY in {whole.standing(sample_id) for sample_id in whole.ids()}
    sleep.close()  # type: ignore[attr-defined]
    assert whole.drawable == whole.used


def test_what_is_taught_meanwhile_is_no_reason_to_begin_again(base: UpperBlocks) -> None:
    trainer = taught(base, upto=60)
    for step, _ in enumerate(trainer.sleep()):
        if step == 20:
            run(trainer.take([entry(seq) for seq in range(61, 66)]))
    assert trainer.adapted is not None and trainer.adapted.sleeps == 1
    assert trainer.sums.count_of(2) == trainer.adapted._sums.count_of(2) == 5


def test_a_sleep_that_much_was_taught_meanwhile_gives_way_to_another_one(base: UpperBlocks) -> None:
    trainer = taught(base, upto=20)
    sleep = trainer.sleep()
    next(sleep)
    for first in range(21, 41, RUN):
        run(trainer.take([entry(seq) for seq in range(first, first + RUN)]))
    version = trainer.version
    assert run(sleep) == 0
    adapted, _, whole = parts(trainer)
    assert (adapted.sleeps, trainer.version, len(adapted.evidence)) == (0, version, 0)
    assert whole.drawable == whole.used
    assert trainer.wants_sleep()
    run(trainer.sleep())
    assert len(adapted.evidence) == 40, "everything is asked"


def test_it_is_rehearsed_once_and_not_where_the_blocks_have_answered_enough(base: UpperBlocks, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = taught(base)
    adapted, _, _ = parts(trainer)
    monkeypatch.setattr(rehearsal, "ENOUGH", 60)
    long = run(trainer.sleep())
    assert len(adapted.evidence) == 60
    assert run(trainer.sleep()) < long / 2
    assert len(adapted.evidence) == 60


def test_a_second_rehearsal_takes_the_place_of_the_first(base: UpperBlocks) -> None:
    trainer = taught(base)
    adapted, _, _ = parts(trainer)
    for _ in range(2):
        run(trainer.sleep())
        assert len(adapted.evidence) == 60


def test_the_gate_decides_on_the_rehearsal(base: UpperBlocks) -> None:
    trainer = taught(base)
    run(trainer.sleep())
    trainer.candidate({0: "cat", 1: "dog", 2: "owl"}, 0.0)
    assert trainer.last_verdict is not None
    assert "before learning" in trainer.last_verdict.reason
    assert trainer.last_verdict.holdout == 60


def test_the_same_log_rehearses_alike(base: UpperBlocks) -> None:
    tables = []
    for _ in range(2):
        trainer = taught(base)
        adapted, floor, _ = parts(trainer)
        run(rehearse(adapted, floor, seed=3))
        tables.append(adapted.evidence.table((0, 1, 2)))
    np.testing.assert_array_equal(tables[0].own, tables[1].own)
    np.testing.assert_array_equal(tables[0].floor, tables[1].floor)
