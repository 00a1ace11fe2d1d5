"""The codec table: the plan by both rules, the runs, and the points lost against fp32."""

from __future__ import annotations

from typing import Any, Dict, List

import pytest

import nicv2_codecs
from courses import TOKENS, WIDTH, SmallSource
from latentd import config
from latentd.replay.latents import make_latent_codec
from latentd.replay.memory import ReplayMemory

SETTINGS = config.load({}, {"energy.meters": ""})
MAKE = nicv2_codecs.features_codec(TOKENS, WIDTH // TOKENS, 0)


def test_the_plan_has_every_kind_at_every_number_of_bits_by_both_rules() -> None:
    planned = nicv2_codecs.cases(MAKE, count=100, budget=1 << 16)
    assert len(planned) == 2 * (1 + 4 * 6)
    assert all(case.latents == 100 for case in planned if case.rule == "equal count")
    assert {case.replay_bytes for case in planned if case.rule == "equal bytes"} == {1 << 16}
    fits = {case.name: case.latents for case in planned if case.rule == "equal bytes" and case.kind in ("float", "token")}
    assert fits["fp32"] < fits["int8"] < fits["int4"] < fits["int2"]


@pytest.mark.parametrize("name", ["fp32", "int8", "int3"])
def test_a_memory_of_so_many_slot_bytes_holds_so_many_latents(name: str) -> None:
    codec = MAKE(name, "rotated")
    memory = ReplayMemory(str(codec), codec.code_bytes, 37 * nicv2_codecs.slot_bytes(codec), 0)
    assert memory.slots == 37


def test_the_plan_takes_codecs_of_any_latent() -> None:
    planned = nicv2_codecs.cases(lambda name, kind: make_latent_codec(name, "token", (2, 16), (9, 16)), count=10, budget=1 << 16)
    assert {case.latent_bytes for case in planned if case.name == "int8"} == {2 * 16 + 8 + 9 * 16 + 9 * 4}


def test_the_plan_of_one_rule_has_no_other() -> None:
    assert {case.rule for case in nicv2_codecs.cases(MAKE, rules=("equal count",))} == {"equal count"}


@pytest.mark.parametrize("closed_form", [False, True])
@pytest.mark.parametrize("kind", ["token", "rotated", "scattered", "tensor", "float"])
def test_a_case_streams_one_order_with_its_codec(kind: str, closed_form: bool) -> None:
    name = "fp32" if kind == "float" else "int4"
    (case,) = (case for case in nicv2_codecs.cases(MAKE, 50) if (case.name, case.kind, case.rule) == (name, kind, "equal count"))
    assert nicv2_codecs.run(case, 0, 391, True, closed_form, SmallSource(), SETTINGS)["accuracy"] > 90


def test_the_table_compares_with_fp32_by_the_same_rule() -> None:
    planned = [case for case in nicv2_codecs.cases(MAKE) if case.name in ("fp32", "int2") and case.kind in ("float", "token")]
    found: Dict[str, float] = {"fp32 equal count": 92.0, "fp32 equal bytes": 90.0, "int2 equal count": 91.0, "int2 equal bytes": 91.5}
    runs: List[List[Dict[str, Any]]] = [
        [{"accuracy": found[f"{case.name} {case.rule}"], "trained_head_weight": 0.0}] * 2 for case in planned
    ]
    table = nicv2_codecs.table(planned, runs)
    lost = {(row["name"], row["rule"]): row["against_fp32"] for row in table}
    assert lost == {("fp32", "equal count"): 0, ("fp32", "equal bytes"): 0, ("int2", "equal count"): -1.0, ("int2", "equal bytes"): 1.5}
