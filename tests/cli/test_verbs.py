from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Dict, List

import pytest
import typer

from cli.conftest import Latentd
from latentd.cli import status
from latentd.cli.reports import moment
from latentd.energy.board import Board, Clock
from latentd.headroom import Headroom
from latentd.replay import catalogue
from latentd.service.memory_plan import MemoryPlan, Part
from service.fakes import World

NOW = datetime(2026, 5, 3, 12, 0, tzinfo=timezone.utc)


@pytest.fixture(autouse=True)
def lesson(asked: Latentd, folder: Path) -> None:
    assert asked("learn", str(folder)).code == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["status"],
        ["samples"],
        ["samples", "list", "--label", "cat", "--state", "learned"],
        ["samples", "show", "s00000001"],
        ["classes"],
        ["classes", "list"],
        ["classes", "create", "owl"],
        ["classes", "rename", "cat", "tom cat/2"],
        ["label", "s00000001", "dog"],
        ["forget", "s00000001"],
        ["forget", "--class", "cat", "--yes"],
        ["accuracy", "--confusion"],
        ["energy", "--since", "1h"],
        ["memory"],
    ],
)
def test_every_verb_answers_people_and_programs(asked: Latentd, arguments: List[str]) -> None:
    ran = asked(*arguments, "--json")
    assert (ran.code, ran.err) == (0, "")
    assert isinstance(ran.json, dict)
    if "forget" not in arguments and "rename" not in arguments:
        human = asked(*arguments)
        assert (human.code, human.err) == (0, "")
        assert human.out.strip()
        assert not human.out.startswith("{")


def test_the_status_is_one_page_of_everything(asked: Latentd) -> None:
    out = asked("status").out
    for text in (
        "2 classes from 4 samples; version 7",
        "better unavailable: not installed",
        "CPU-therm 42 °C",
        "unavailable: ",
        "1 of 100 latents",
    ):
        assert text in out
    assert "GPU-therm" not in out


def test_damaged_rows_of_the_journal_are_told(asked: Latentd, world: World) -> None:
    assert "damaged" not in asked("status").out
    world.parts.journal._set_aside = 2
    assert asked("status", "--json").json["journal"]["set_aside"] == 2
    assert "2 damaged rows were set aside" in asked("status").out


def test_watch_goes_on_until_ctrl_c(asked: Latentd, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: List[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("latentd.cli.status.time.sleep", pause)
    ran = asked("status", "--watch")
    assert ran.code == 130
    assert ran.out.count("2 classes from 4 samples") == 3
    assert pauses == [2.0, 2.0, 2.0]


def test_a_list_that_is_cut_says_how_to_go_on(asked: Latentd) -> None:
    first = asked("samples", "--limit", "3")
    assert first.out.count("learned") == 3
    assert "--cursor s00000003" in first.err
    rest = asked("samples", "--cursor", "s00000003")
    assert rest.out.count("learned") == 1
    assert rest.err == ""


def test_labels_that_look_wrong_are_listed_and_marked(asked: Latentd, world: World) -> None:
    world.learner.doubted = ("s00000002",)
    found = asked("samples", "--doubted").out
    assert "s00000002" in found and "its label looks wrong" in found
    assert "s00000001" not in found


def test_a_list_of_few_among_many_is_whole(asked: Latentd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "_PASSED_OVER", 1)
    found = asked("samples", "--label", "dog", "--json").json
    assert ([sample["label"] for sample in found["samples"]], found["next"]) == (["dog", "dog"], None)


def test_a_correction_changes_the_class(asked: Latentd, world: World) -> None:
    assert asked("label", "s00000001", "dog").code == 0
    assert {record.name: record.samples for record in world.parts.journal.classes()} == {"cat": 1, "dog": 3}


def test_a_renamed_class_keeps_its_samples_whatever_its_name_holds(asked: Latentd, world: World) -> None:
    assert asked("classes", "rename", "cat", "a/b ?#%").code == 0
    assert asked("classes", "rename", "a/b ?#%", "cat 2").code == 0
    assert {record.name for record in world.parts.journal.classes()} == {"cat 2", "dog"}


def test_a_class_is_not_forgotten_unasked(asked: Latentd, world: World) -> None:
    ran = asked("forget", "--class", "cat")
    assert ran.code == 2
    assert "--yes" in ran.err
    assert len(world.parts.journal.classes()) == 2
    assert asked("forget", "--class", "cat", "--yes").code == 0
    assert [record.name for record in world.parts.journal.classes()] == ["dog"]


@pytest.mark.parametrize("arguments", [["forget"], ["forget", "s00000001", "--class", "cat"]])
def test_forget_takes_a_sample_or_a_class(asked: Latentd, arguments: List[str]) -> None:
    assert asked(*arguments).code == 2


def test_empty_lists_say_what_to_do(asked: Latentd) -> None:
    assert "No such samples" in asked("samples", "--label", "owl").err
    for name in ("cat", "dog"):
        asked("forget", "--class", name, "--yes")
    assert "latentd learn" in asked("classes").err


def test_accuracy_says_what_is_refused_and_what_drifts(asked: Latentd) -> None:
    said = asked("accuracy").out
    assert "1 of 20 hold-out images are answered unknown; up to 5 % of right answers may be refused." in said
    assert "dog: its new images look less and less like it, from s00000002 on." in said
    assert "cat: " not in said


def test_the_confusions_are_listed(asked: Latentd) -> None:
    assert asked("accuracy", "--confusion").out.splitlines()[-1].split() == ["cat", "dog", "1"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("30m", "2026-05-03T11:30:00Z"),
        ("2d", "2026-05-01T12:00:00Z"),
        ("2026-05-03T08:00:00Z", "2026-05-03T08:00:00Z"),
        ("2026-05-03T08:00+02:00", "2026-05-03T06:00:00Z"),
    ],
)
def test_a_time_is_said_as_one_that_passed_or_as_a_date(text: str, expected: str) -> None:
    assert moment(text, NOW) == expected


@pytest.mark.parametrize("text", ["yesterday", "5", "1y", ""])
def test_no_time_is_a_usage_error(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        moment(text, NOW)


def test_the_status_shows_power_mode_throttling_and_the_memory_plan(world: World, asked: Latentd) -> None:
    clocks = {"cpu": Clock(1.4208e9, 1.9e9), "gpu": Clock(None, 1.1e9)}
    world.parts.board = lambda: Board("MODE_15W_6CORE", 6, clocks, None, {"thermal": ("thermal-cpufreq-0 at 4 of 10",)}, None)
    world.parts.memory_plan = MemoryPlan((Part("replay memory", 48 << 20, "always", "limit"), Part("left", 1 << 60, "system", "limit")))
    world.parts.headroom = lambda: Headroom(3 << 30, 6 << 30, "the control group latentd.service")
    world.parts.room_at_start_bytes = 4 << 30
    out = " ".join(asked("status").out.split())
    for text in (
        "MODE_15W_6CORE, cpu 1421 MHz",
        "thermal: thermal-cpufreq-0 at 4 of 10",
        "planned 48.0 MiB in all",
        "3.0 GiB available (the control group",
        "does not fit",
    ):
        assert text in out
    assert "gpu" not in out
    assert "48.0 MiB" in asked("memory").out


def test_the_hours_left_on_a_battery_are_part_of_the_energy() -> None:
    found: Dict[str, Any] = {"meter": {"reason": None, "power_w": 5.0}, "activities": {"classify": {"per_item_j": 0.2}}, "energy_j": 100.0}
    found.update(quality="measured", source="ina3221")
    rate = {"hours_left": 4.94, "samples_per_hour": 1260.0, "charge_ratio": None}
    assert status.energy({**found, "battery": rate}).endswith(
        "; 4.9 h left at this rate of learning (1260 samples an hour, were the battery full)"
    )
    assert status.energy({**found, "battery": {**rate, "charge_ratio": 0.5}}).endswith("(1260 samples an hour)")
    assert "left" not in status.energy({**found, "battery": None})


def test_the_energy_names_budget_and_battery(world: World, asked: Latentd) -> None:
    settings = replace(world.parts.config.energy, budget_w=10.0, battery_wh=50.0)
    world.parts.config = replace(world.parts.config, energy=settings)
    out = " ".join(asked("energy").out.split())
    assert "Power budget 10 W, which nothing keeps, for no meter reads." in out
    assert "Battery of 50 Wh: how long it lasts is not known yet." in out
