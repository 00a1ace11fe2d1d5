"""What the replay memory knows of doubtful labels: kept over restarts, and never drawn."""

from __future__ import annotations

import numpy as np

from latentd.replay.memory import DOUBTED, PLAIN, VOUCHED
from replay.memories import code_of, fill, memory_of, numbers


def test_doubted_samples_are_not_drawn_until_they_are_cleared() -> None:
    memory = memory_of(20)
    fill(memory, [0] * 10 + [1] * 2)
    doubted = ["s0000010", "s0000011", "s0000003"]
    for sample_id in doubted:
        memory.judge(sample_id, DOUBTED)
    codes, class_ids = memory.draw(9, np.random.default_rng(0))
    assert sorted(numbers(codes)) == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert (class_ids == 0).all()
    assert (memory.ids_of(DOUBTED), memory.doubted(0), memory.doubted(1)) == (tuple(sorted(doubted)), 1, 2)
    for sample_id in doubted:
        memory.judge(sample_id, PLAIN)
    assert sorted(numbers(memory.draw(20, np.random.default_rng(0))[0])) == sorted([*range(12), *[10, 11] * 4])


def test_a_doubted_sample_that_is_given_up_stays_doubted_until_its_label_is_settled() -> None:
    memory = memory_of(4)
    fill(memory, [0] * 4)
    for sample_id in memory.ids():
        memory.judge(sample_id, DOUBTED)
    fill(memory, [0] * 40, start=4)
    gone = [name for name in ("s0000000", "s0000001", "s0000002", "s0000003") if name not in memory]
    assert gone and all(memory.standing(name) == DOUBTED for name in gone)
    again = memory_of(4)
    again.restore(memory.state(), [(sample_id, 0, code_of(0)) for sample_id in memory.ids()])
    assert [again.standing(name) for name in gone] == [DOUBTED] * len(gone)
    again.judge(gone[0], PLAIN)
    assert again.standing(gone[0]) == PLAIN


def test_what_is_thought_of_labels_outlives_a_restart() -> None:
    memory = memory_of(6)
    fill(memory, [0] * 6)
    memory.judge("s0000001", DOUBTED)
    memory.judge("s0000002", VOUCHED)
    again = memory_of(6)
    again.restore(memory.state(), [(sample_id, 0, code_of(0)) for sample_id in memory.ids()])
    assert (again.ids_of(DOUBTED), again.ids_of(VOUCHED)) == (("s0000001",), ("s0000002",))


def test_a_version_from_before_there_was_doubt_doubts_nothing() -> None:
    memory = memory_of(2)
    state = {name: value for name, value in memory.state().items() if name in ("seen", "evictions", "rng")}
    memory.restore(state, [("s0000001", 0, code_of(0))])
    assert memory.ids_of(PLAIN) == ("s0000001",)
