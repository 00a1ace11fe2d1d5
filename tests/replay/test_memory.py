"""The replay memory: never over its budget, fair to every class, and the same for the same seed."""

from __future__ import annotations

import json
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Dict, List, Optional, Tuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentd.errors import ConfigError
from latentd.replay.memory import DOUBTED, ReplayMemory
from replay.memories import CODE_BYTES, code_of, fill, memory_of, numbers

# --- who stays ---


def test_while_there_is_room_everybody_stays() -> None:
    memory = memory_of(10)
    assert fill(memory, [0] * 7 + [1] * 3) == [None] * 10
    assert memory.used == memory.slots == 10
    assert memory.counts() == {0: 7, 1: 3}
    assert memory.evictions == 0


def test_a_small_class_takes_the_place_of_the_largest() -> None:
    memory = memory_of(10)
    fill(memory, [0] * 7 + [1] * 3)
    evicted = memory.admit("new", 2, code_of(99))
    assert evicted in {f"s{i:07d}" for i in range(7)}
    assert evicted not in memory
    assert memory.counts() == {0: 6, 1: 3, 2: 1}
    assert memory.evictions == 1


def test_classes_end_up_with_equal_shares_of_an_imbalanced_stream() -> None:
    memory = memory_of(60)
    rng = np.random.default_rng(0)
    fill(memory, [int(c) for c in rng.choice(6, 3000, p=[0.6, 0.2, 0.1, 0.05, 0.03, 0.02])])
    assert memory.used == 60
    assert max(memory.counts().values()) - min(memory.counts().values()) <= 1


def test_classes_that_come_one_after_the_other_end_up_with_equal_shares() -> None:
    memory = memory_of(50)
    fill(memory, [c for c in range(10) for _ in range(40)])
    assert memory.counts() == dict.fromkeys(range(10), 5)


@pytest.mark.parametrize(
    ("slots", "classes", "runs"), [(10, 1, 300), (1, 1, 1500), (9, 2, 400)], ids=["one class", "one slot", "two classes"]
)
def test_a_class_keeps_a_uniform_sample_of_all_it_was_taught(slots: int, classes: int, runs: int) -> None:
    kept: Counter[int] = Counter()
    for seed in range(runs):
        memory = memory_of(slots, seed)
        fill(memory, [i % classes for i in range(40)])
        kept.update(int(sample_id[1:]) // 10 for sample_id in memory.ids())
    # A quarter of the stream each, within four standard deviations.
    expected = runs * slots / 4
    assert all(abs(kept[quarter] - expected) < 4 * (expected * 0.75) ** 0.5 for quarter in range(4))


def test_the_new_sample_itself_may_be_the_one_that_goes() -> None:
    memory = memory_of(2)
    outcome = fill(memory, [0] * 50)
    refused = [f"s{i:07d}" for i in range(50) if outcome[i] == f"s{i:07d}"]
    assert refused
    assert not any(sample_id in memory for sample_id in refused)
    assert memory.evictions == 48


def test_a_class_whose_samples_were_removed_may_grow_again() -> None:
    memory = memory_of(20)
    fill(memory, [0] * 100 + [1] * 100)
    for sample_id in [s for s in memory.ids() if int(s[1:]) < 100][:8]:
        memory.remove(sample_id)
    fill(memory, [1] * 50, start=1000)
    assert memory.counts() == {0: 2, 1: 18}
    fill(memory, [0] * 50, start=2000)
    assert memory.counts() == {0: 10, 1: 10}


def test_a_class_that_was_forgotten_can_be_taught_again() -> None:
    memory = memory_of(4)
    fill(memory, [0] * 20 + [1] * 20)
    gone = memory.remove_class(0)
    assert len(gone) == 2
    assert memory.counts() == {1: 2}
    fill(memory, [0] * 5, start=100)
    assert memory.counts()[0] == 2


def test_relabelling_moves_a_sample_and_its_counts() -> None:
    memory = memory_of(5)
    fill(memory, [0, 0, 1])
    assert memory.relabel("s0000001", 7)
    assert memory.counts() == memory.seen() == {0: 1, 1: 1, 7: 1}
    assert memory.relabel("s0000000", 7)
    assert memory.counts() == {1: 1, 7: 2}
    assert memory.relabel("s0000000", 7)
    assert memory.counts() == memory.seen() == {1: 1, 7: 2}
    assert not memory.relabel("s0000009", 7)


def test_a_removed_sample_counts_as_never_seen_and_an_evicted_one_as_seen() -> None:
    memory = memory_of(4)
    fill(memory, [0] * 6)
    assert memory.seen() == {0: 6}
    assert memory.remove(memory.ids()[0])
    assert memory.counts() == {0: 3}
    assert memory.seen() == {0: 5}


def test_removing_what_is_not_there_says_so() -> None:
    memory = memory_of(3)
    fill(memory, [0])
    assert memory.remove("s0000000")
    assert not memory.remove("s0000000")
    assert memory.remove_class(0) == ()
    assert memory.used == memory.used_bytes == 0


# --- bytes ---


def test_a_budget_below_one_latent_is_a_configuration_error_that_says_how_much_is_needed() -> None:
    with pytest.raises(ConfigError, match=r"holds no latent: one takes \d+ as int8 token") as caught:
        ReplayMemory("int8 token", 257 * 388, 16_384, 0)
    needed = int(caught.value.hint.split()[3])
    assert ReplayMemory("int8 token", 257 * 388, needed, 0).slots == 1


def test_what_the_process_allocates_stays_within_the_budget() -> None:
    codes = np.random.default_rng(0).integers(0, 256, (50, 272), np.uint8)
    budget = 1 << 20
    tracemalloc.start()
    try:
        memory = ReplayMemory("int8 token", 272, budget, 0)
        for i in range(memory.slots + 2000):
            memory.admit(f"s{i:07d}", i % 13, codes[i % 50].tobytes())
        memory.draw(8, np.random.default_rng(0))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert memory.used == memory.slots
    assert 0.94 * budget < memory.used_bytes <= budget
    # On top: one call's own work, here mostly the sort of one order by class.
    assert peak < 1.1 * budget


def test_memory_is_taken_as_it_is_used() -> None:
    statm = Path("/proc/self/statm")
    if not statm.exists():
        pytest.skip("resident memory is read from /proc")

    def resident_pages() -> int:
        return int(statm.read_text().split()[1])

    before = resident_pages()
    memory = ReplayMemory("fp32", 257 * 384 * 4, 512 << 20, 0)
    assert memory.slots > 1000
    assert (resident_pages() - before) * 4096 < 32 << 20


# --- what the learner reads ---


def test_a_draw_gives_codes_with_their_own_classes() -> None:
    memory = memory_of(30)
    fill(memory, [i % 3 for i in range(30)])
    codes, class_ids = memory.draw(12, np.random.default_rng(1))
    assert codes.shape == (12, CODE_BYTES)
    assert codes.dtype == np.uint8
    assert class_ids.dtype == np.int64
    assert [number % 3 for number in numbers(codes)] == class_ids.tolist()


def test_a_draw_sees_every_change_since_the_last_one() -> None:
    memory = memory_of(4)
    rng = np.random.default_rng(0)
    fill(memory, [0, 0])
    assert sorted(memory.draw(2, rng)[1]) == [0, 0]
    fill(memory, [1], start=5)
    assert sorted(memory.draw(2, rng)[1]) == [0, 1]
    memory.relabel("s0000000", 2)
    assert sorted(memory.draw(3, rng)[1]) == [0, 1, 2]
    memory.remove("s0000001")
    assert sorted(numbers(memory.draw(2, rng)[0])) == [0, 5]


def test_every_class_gets_its_share_of_a_draw_however_small_it_is() -> None:
    memory = memory_of(100)
    fill(memory, [0] * 90 + [1] * 7 + [2] * 3)
    rng = np.random.default_rng(0)
    drawn: Counter[int] = Counter()
    for _ in range(300):
        drawn.update(memory.draw(10, rng)[1].tolist())
    # 3000 places, 1000 a class; the tenth place goes to a random class.
    assert all(abs(drawn[class_id] - 1000) < 60 for class_id in range(3))


def test_samples_of_a_class_are_drawn_equally_often() -> None:
    memory = memory_of(20)
    fill(memory, [0] * 12 + [1] * 8)
    rng = np.random.default_rng(0)
    drawn: Counter[int] = Counter()
    for _ in range(1000):
        drawn.update(numbers(memory.draw(10, rng)[0]))
    # Five places a class and draw: 417 for each of twelve, 625 for each of eight; standard deviation about 16.
    assert all(abs(drawn[i] - 5000 / 12) < 80 for i in range(12))
    assert all(abs(drawn[i] - 5000 / 8) < 80 for i in range(12, 20))


@given(sizes=st.lists(st.integers(1, 20), min_size=1, max_size=6), count=st.integers(0, 90), seed=st.integers(0, 1000))
@settings(max_examples=200, deadline=None)
def test_a_sample_is_repeated_only_when_its_class_is_used_up(sizes: List[int], count: int, seed: int) -> None:
    memory = memory_of(200)
    fill(memory, [class_id for class_id, size in enumerate(sizes) for _ in range(size)])
    codes, class_ids = memory.draw(count, np.random.default_rng(seed))
    assert len(codes) == count
    times = Counter(numbers(codes))
    places = Counter(class_ids.tolist())
    assert all(count // len(sizes) <= places[class_id] <= -(-count // len(sizes)) for class_id in range(len(sizes)))
    start = 0
    for class_id, size in enumerate(sizes):
        mine = [times[start + i] for i in range(size)]
        assert sum(mine) == places[class_id]
        assert max(mine) - min(mine) <= 1
        start += size


def test_nothing_can_be_drawn_from_an_empty_memory() -> None:
    memory = memory_of(4)
    for _ in range(2):
        codes, class_ids = memory.draw(5, np.random.default_rng(0))
        assert codes.shape == (0, CODE_BYTES)
        assert class_ids.shape == (0,)
        if not memory.used:
            fill(memory, [3])
            memory.judge("s0000000", DOUBTED)


def test_codes_are_found_by_id() -> None:
    memory = memory_of(5)
    fill(memory, [0, 1, 0, 1])
    memory.remove("s0000000")
    assert numbers(memory.get(["s0000003", "s0000001"])) == [3, 1]
    assert memory.get([]).shape == (0, CODE_BYTES)
    with pytest.raises(KeyError, match="s0000000"):
        memory.get(["s0000001", "s0000000"])


def test_everything_is_read_in_chunks_in_the_order_of_the_ids() -> None:
    memory = memory_of(10)
    fill(memory, [i % 2 for i in range(30)])
    chunks = list(memory.all(chunk=4))
    assert [len(chunk.ids) for chunk in chunks] == [4, 4, 2]
    ids = [sample_id for chunk in chunks for sample_id in chunk.ids]
    assert tuple(ids) == memory.ids() == tuple(sorted(ids))
    for chunk in chunks:
        assert numbers(chunk.codes) == [int(sample_id[1:]) for sample_id in chunk.ids]
        assert chunk.class_ids.tolist() == [number % 2 for number in numbers(chunk.codes)]


def test_a_memory_that_changes_while_it_is_read_is_an_error() -> None:
    memory = memory_of(5)
    fill(memory, [0, 0, 0])
    chunks = memory.all(chunk=1)
    next(chunks)
    memory.relabel("s0000002", 1)
    with pytest.raises(RuntimeError, match="changed while it was read"):
        next(chunks)


# --- the same for the same seed ---


def history(memory: ReplayMemory) -> Tuple[List[Optional[str]], Dict[int, int], List[int]]:
    rng = np.random.default_rng(5)
    outcome = fill(memory, [int(c) for c in rng.integers(0, 4, 200)], start=100)
    return outcome, memory.counts(), numbers(memory.draw(20, rng)[0])


def test_the_same_seed_and_order_give_the_same_memory() -> None:
    one, other, third = memory_of(25, 1), memory_of(25, 1), memory_of(25, 2)
    assert history(one) == history(other)
    assert one.ids() == other.ids()
    assert history(third)[0] != history(memory_of(25, 1))[0]


def test_a_restart_goes_on_as_if_nothing_had_happened() -> None:
    lived = memory_of(25)
    fill(lived, [i % 3 for i in range(90)])
    samples = [(i, int(c), code_of(int(i[1:]))) for chunk in lived.all() for i, c in zip(chunk.ids, chunk.class_ids)]
    restarted = memory_of(25)
    state = json.loads(json.dumps(lived.state()))
    assert restarted.restore(state, samples[::-1]) == ()
    assert restarted.ids() == lived.ids()
    assert restarted.seen() == lived.seen() == {0: 30, 1: 30, 2: 30}
    assert restarted.evictions == lived.evictions
    assert history(restarted) == history(lived)


def test_a_smaller_budget_after_a_restart_names_what_no_longer_fits() -> None:
    lived = memory_of(20)
    fill(lived, [0] * 12 + [1] * 8)
    samples = [(i, int(c), code_of(int(i[1:]))) for chunk in lived.all() for i, c in zip(chunk.ids, chunk.class_ids)]
    restarted = memory_of(6)
    gone = restarted.restore(lived.state(), samples)
    assert restarted.counts() == {0: 3, 1: 3}
    assert sorted([*gone, *restarted.ids()]) == list(lived.ids())


# --- refusals ---


@pytest.mark.parametrize("sample_id", ["", "seventeen letters", "é", "a\0"])
def test_an_id_that_does_not_fit_its_field_is_refused(sample_id: str) -> None:
    with pytest.raises(ValueError, match="1 to 16 ASCII"):
        memory_of(2).admit(sample_id, 0, code_of(0))


def test_programming_errors_are_refused_before_anything_changes() -> None:
    memory = memory_of(3)
    fill(memory, [0])
    with pytest.raises(ValueError, match="already"):
        memory.admit("s0000000", 1, code_of(0))
    with pytest.raises(ValueError, match="16 bytes, not 3"):
        memory.admit("s0000001", 1, b"abc")
    for class_id in (-1, 1 << 31):
        with pytest.raises(ValueError, match="class id"):
            memory.admit("s0000001", class_id, code_of(0))
        with pytest.raises(ValueError, match="class id"):
            memory.relabel("s0000000", class_id)
    assert memory.counts() == memory.seen() == {0: 1}


def test_class_ids_of_any_size_are_drawn() -> None:
    memory = memory_of(6)
    fill(memory, [5, 70_000, 5, (1 << 31) - 1])
    assert sorted(memory.draw(3, np.random.default_rng(0))[1].tolist()) == [5, 70_000, (1 << 31) - 1]
