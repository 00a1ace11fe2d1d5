from __future__ import annotations

from dataclasses import replace
from typing import Any, Optional, Tuple

import pytest

from latentd.learning.accuracy import Score
from latentd.learning.tuning.candidates import LEAST_REPLAY_BYTES, Candidate, HoldOut, Limits, faults, recommend, settings_of, slots_within
from latentd.replay.memory import slot_bytes

LEAST = 128
NO_LIMITS = Limits()
HEAD = Candidate(
    split=12,
    token_grid=0,
    tokens=0,
    codec="int8",
    codec_kind="token",
    latent_bytes=1500,
    features_bytes=1500,
    slot_bytes=1550,
    fixed_bytes=50_000_000,
    slots=1500,
    holdout=HoldOut(0, 0, 0),
    microbatch=4,
    latency_s=0.040,
    step_s=0.01,
)


def head(correct: Optional[int] = None, **changes: Any) -> Candidate:
    return replace(HEAD, accuracy=None if correct is None else Score(correct, 100), **changes)


def blocks(correct: Optional[int] = None, **changes: Any) -> Candidate:
    told = {"split": 10, "tokens": 257, "latent_bytes": 100_000, "slot_bytes": 100_050, "fixed_bytes": 90_000_000, "latency_s": 0.055}
    return head(correct, **{**told, **changes})


def chosen(*candidates: Candidate, limits: Limits = NO_LIMITS, in_force: Tuple[int, int] = (12, 0)) -> Optional[Candidate]:
    return recommend(candidates, limits, LEAST, in_force).choice


# --- accuracy known ---------------------------------------------------------------------------------------------------


def test_the_most_accurate_wins_when_the_others_lie_outside_its_interval() -> None:
    better = blocks(95)
    assert chosen(head(70), better) is better


def test_inside_the_interval_of_the_best_the_least_memory_wins() -> None:
    cheap = head(92)
    assert chosen(blocks(95), cheap) is cheap


def test_at_equal_memory_the_least_latency_wins() -> None:
    quick = head(92, latency_s=0.030)
    assert chosen(head(95), quick) is quick


def test_bits_are_not_given_up_for_less_than_a_tenth_of_memory_and_latency() -> None:
    fine = head(92)
    assert chosen(fine, head(92, codec="int2", codec_kind="rotated", slot_bytes=450, latency_s=0.039)) is fine
    smaller = blocks(92, codec="int4", slot_bytes=50_000)
    assert chosen(blocks(92), smaller) is smaller


def test_an_accuracy_inside_the_interval_that_is_worse_beyond_chance_on_the_same_questions_does_not_tie() -> None:
    """86 of 100 lies inside the interval of 92 of 100; but it lost seven questions and won one."""
    best_right, losing_right = [True] * 92 + [False] * 8, [False] * 7 + [True] * 85 + [True] + [False] * 7
    best, cheap = blocks(92, right=tuple(best_right)), head(86, right=tuple(losing_right))
    assert chosen(best, cheap) is best
    assert chosen(replace(best, right=None), cheap) is cheap


def test_a_candidate_whose_accuracy_nobody_asked_does_not_compete_with_one_that_was_asked() -> None:
    asked = blocks(60)
    assert chosen(head(), asked) is asked


def test_an_infeasible_best_leaves_the_choice_to_the_feasible() -> None:
    kept = head(70)
    assert chosen(blocks(95), kept, limits=Limits(latency_s=0.05)) is kept


# --- accuracy unknown -------------------------------------------------------------------------------------------------


def test_without_accuracy_the_split_in_force_stays() -> None:
    mine = blocks()
    assert chosen(head(), mine, in_force=(10, 0)) is mine
    assert chosen(head(), blocks(token_grid=8, tokens=65), in_force=(10, 8)) == blocks(token_grid=8, tokens=65)


def test_without_accuracy_the_deepest_split_is_taken_where_the_one_in_force_is_infeasible() -> None:
    deepest = head()
    assert chosen(deepest, blocks(), limits=Limits(memory_bytes=60_000_000), in_force=(10, 0)) is deepest


def test_without_accuracy_slots_count_before_bits_and_bits_before_memory() -> None:
    many = head(codec="int4", slots=1500)
    assert chosen(head(slots=900), many) is many
    fine = head()
    assert chosen(head(codec="int2", slot_bytes=400), fine) is fine


# --- limits -----------------------------------------------------------------------------------------------------------


def test_each_limit_is_named_with_the_figure_that_breaks_it() -> None:
    candidate = blocks(slots=3, power_w=14.0)
    found = faults(candidate, Limits(64_000_000, 0.05, 10.0), LEAST)
    assert [fault.reason for fault in found] == [
        "with 128 latents learning takes 102.8 MB, the limit is 64.0 MB",
        "an answer takes 55.0 ms, the limit is 50 ms",
        "it draws 14.0 W, the limit is 10 W",
    ]
    assert [round(fault.times, 2) for fault in found] == [1.61, 1.1, 1.4]
    assert faults(candidate, NO_LIMITS, LEAST) == []


def test_figures_exactly_at_their_limits_are_inside() -> None:
    candidate = head(power_w=10.0)
    assert faults(candidate, Limits(candidate.learning_bytes, candidate.latency_s, 10.0), LEAST) == []


def test_a_power_that_nobody_measured_keeps_no_limit_of_power() -> None:
    assert "unknown" in faults(head(), Limits(power_w=10.0), LEAST)[0].reason


def test_where_nothing_is_feasible_the_nearest_is_named_with_its_figures() -> None:
    near, far = head(latency_s=0.040), blocks(latency_s=0.100)
    found = recommend([far, near], Limits(latency_s=0.030), LEAST, (12, 0))
    assert found.choice is None
    assert found.nearest is near
    assert found.reason == (
        "no candidate keeps the limits. The nearest is split 12, int8 token: an answer takes 40.0 ms, the limit is 30 ms."
    )


def test_the_nearest_is_the_one_whose_worst_excess_is_least() -> None:
    hot, slow = head(power_w=30.0), head(power_w=12.0, latency_s=0.050)
    found = recommend([hot, slow], Limits(latency_s=0.030, power_w=10.0), LEAST, (12, 0))
    assert found.nearest is slow


def test_nothing_measured_is_said_so() -> None:
    assert recommend([], NO_LIMITS, LEAST, (12, 0)).reason == "no candidate was measured."


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "slots"), [(None, 1500), (10**9, 1500), (50_000_000 + 500 * 1550, 500), (50_000_000 + 500 * 1550 - 1, 499)]
)
def test_slots_fill_the_limit_to_the_byte(limit: Optional[int], slots: int) -> None:
    assert slots_within(limit, 1500, HEAD.bytes_with) == slots


def test_no_slots_fit_where_the_fixed_part_alone_is_over_the_limit() -> None:
    assert slots_within(10_000_000, 1500, HEAD.bytes_with) == 0


def test_the_hold_out_grows_with_the_slots_up_to_its_own_limit() -> None:
    """One in ten is held out: 9 stay for each."""
    holdout = HoldOut(every=10, most=100, each_bytes=2000)
    assert [holdout.latents(slots) for slots in (8, 9, 90, 5000)] == [0, 1, 10, 100]
    assert HoldOut(every=0, most=100, each_bytes=2000).latents(1000) == 0
    assert head(holdout=holdout).bytes_with(900) == 50_000_000 + 900 * 1550 + 100 * 2000


def test_a_replay_memory_is_never_smaller_than_the_configuration_takes() -> None:
    assert head(slots=1, slot_bytes=50).replay_bytes == LEAST_REPLAY_BYTES == 1 << 14


def test_a_candidate_is_written_as_the_keys_that_make_it() -> None:
    assert settings_of(blocks(token_grid=8, tokens=65, codec="int4", codec_kind="rotated"), depth=12) == {
        "backbone.split": 10,
        "learn.token_grid": 8,
        "learn.token_codec": "int4",
        "learn.token_codec_kind": "rotated",
        "learn.token_bytes": 1500 * (100_050 - 4 * slot_bytes(1500)),
        "learn.replay_bytes": 1500 * 4 * slot_bytes(1500),
        "learn.microbatch": 4,
    }
    assert settings_of(head(), depth=12)["backbone.split"] == 0
