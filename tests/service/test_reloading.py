from __future__ import annotations

from dataclasses import replace

import pytest

from latentd.config import Config, EnergyConfig, HttpConfig, LearnConfig, LogConfig, rows
from latentd.service import reloading


def test_live_keys_change_and_the_others_are_named_and_stay() -> None:
    running = Config(origins={"log.level": "default", "http.bind": "default"})
    wanted = Config(
        http=HttpConfig(bind="127.0.0.1:1", body_timeout_s=5.0),
        learn=LearnConfig(max_lag_samples=99, seed=3),
        energy=EnergyConfig(budget_w=9.0),
        log=LogConfig(level="debug"),
        origins={"log.level": "config.toml", "http.bind": "config.toml"},
    )
    found = reloading.merge(running, wanted)
    assert found.taken == ("http.body_timeout_s", "learn.max_lag_samples", "energy.budget_w", "log.level")
    assert found.needs_restart == ("http.bind", "learn.seed")
    assert (found.config.http.bind, found.config.http.body_timeout_s) == (HttpConfig().bind, 5.0)
    assert (found.config.learn.max_lag_samples, found.config.learn.seed, found.config.log.level) == (99, 0, "debug")
    assert (found.config.origins["log.level"], found.config.origins["http.bind"]) == ("config.toml", "default")


def test_a_key_that_is_set_back_needs_no_restart_any_more() -> None:
    running = Config()
    changed = replace(running, learn=LearnConfig(seed=3))
    assert reloading.merge(running, changed).needs_restart == ("learn.seed",)
    assert reloading.merge(reloading.merge(running, changed).config, running).needs_restart == ()


def test_every_live_key_is_a_key() -> None:
    assert set(reloading.LIVE) <= {row.key for row in rows()}


def test_the_log_says_what_came_of_it(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    for wanted in (Config(), replace(Config(), log=LogConfig("debug")), replace(Config(), learn=LearnConfig(seed=3))):
        reloading.tell(reloading.merge(Config(), wanted))
    assert [record.getMessage().split(": ")[1] for record in caplog.records] == [
        "nothing changed",
        "log.level changed",
        "restart needed for learn.seed",
    ]
