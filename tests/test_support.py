"""What the other tests stand on."""

from __future__ import annotations

import pytest

import support
from latentd import config


def test_the_daemons_of_tests_learn_on_a_warm_machine_short_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENTD_ENERGY__BUDGET_W", "1")
    found = config.load(support.environment(), {})
    assert (found.energy.max_temperature_c, found.memory.reserve_bytes, found.energy.budget_w) == (150.0, 0, 0.0)
    own = config.load(support.environment({"LATENTD_MEMORY__RESERVE_BYTES": "7"}), {})
    assert own.memory.reserve_bytes == 7
