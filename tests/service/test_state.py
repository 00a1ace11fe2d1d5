from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Optional

import pytest

from latentd import __version__
from latentd.config import rows
from latentd.energy.board import Board, Clock
from latentd.errors import Unprocessable
from latentd.headroom import Headroom
from latentd.service.memory_plan import MemoryPlan, Part
from latentd.service.routes import info
from latentd.service.routes.energy import moment
from latentd.service.schemas import Accuracy, Info, Learner, Memory, Status
from service.fakes import World, assert_problem, picture


def test_status_is_one_page_of_everything(world: World) -> None:
    world.learn((picture(), "cat"), headers={"Prefer": "wait=5"})
    status = Status.model_validate(world.call("GET", "/v1/status").json())
    assert (status.latentd, status.version, status.classes, status.samples) == (__version__, 7, 1, 1)
    assert [(attempt.engine, attempt.state) for attempt in status.engine.attempts] == [("better", "unavailable"), ("fake", "serving")]
    assert set(status.queues) == {"inference", "journal", "learner", "body_bytes"}
    assert status.temperatures_c == {"CPU-therm": 41.5, "GPU-therm": None}
    assert status.memory.classes == {"cat": 1}
    assert status.readiness.ready
    assert status.uptime_s >= 0


def test_the_parts_of_status_are_the_same_as_their_own_pages(world: World) -> None:
    status = world.call("GET", "/v1/status").json()
    for part in ("learner", "accuracy"):
        assert world.call("GET", f"/v1/{part}").json() == status[part]
    for part in ("energy", "memory"):
        assert world.call("GET", f"/v1/{part}").json().keys() == status[part].keys()


def test_throttling_that_nothing_tells_of_is_null(world: World) -> None:
    assert world.call("GET", "/v1/status").json()["board"]["throttled"] == {"thermal": None, "over-current": None}


def test_the_status_shows_how_the_board_runs_and_what_the_memory_is_planned_for(world: World) -> None:
    clocks = {"cpu": Clock(1.4e9, 1.9e9), "gpu": Clock(None, 1.1e9)}
    world.parts.board = lambda: Board("MODE_15W_6CORE", 6, clocks, 0.25, {"over-current": ("VDD_IN",)}, None)
    world.parts.memory_plan = MemoryPlan(
        (Part("replay memory", 4000, "always", "limit"), Part("left to the system", 50, "system", "limit"))
    )
    world.parts.headroom = lambda: Headroom(5 << 30, 6 << 30, "the control group latentd.service")
    world.parts.room_at_start_bytes = 4050
    status = Status.model_validate(world.call("GET", "/v1/status").json())
    assert (status.board.power_mode, status.board.throttled) == ("MODE_15W_6CORE", {"over-current": ["VDD_IN"]})
    assert (status.board.clocks["cpu"].now_hz, status.board.clocks["gpu"].now_hz) == (1.4e9, None)
    plan = status.memory.plan
    assert [(part.name, part.planned_bytes, part.used_bytes) for part in plan.parts] == [
        ("replay memory", 4000, 40),
        ("left to the system", 50, None),
    ]
    assert (plan.planned_bytes, plan.available_bytes, plan.bounded_by, plan.fits) == (
        4000,
        5 << 30,
        "the control group latentd.service",
        True,
    )


@pytest.mark.parametrize(("room_at_start", "fits"), [(None, None), (4049, False), (4050, True)])
def test_whether_the_plan_fits_was_decided_at_the_start(world: World, room_at_start: Optional[int], fits: Optional[bool]) -> None:
    """A GPU that shares the memory takes of it what no figure of the process counts."""
    parts = (Part("CUDA", 4000, "always", "estimate"), Part("left to the system", 50, "system", "limit"))
    world.parts.memory_plan, world.parts.room_at_start_bytes = MemoryPlan(parts), room_at_start
    world.parts.headroom = lambda: Headroom(1, 6 << 30)
    assert Status.model_validate(world.call("GET", "/v1/status").json()).memory.plan.fits is fits


def test_a_clock_that_jumps_by_decades_moves_the_start_and_not_the_uptime(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: 86_400.0)
    early = world.call("GET", "/v1/status").json()
    monkeypatch.setattr("time.time", lambda: 1_800_000_000.0)
    late = world.call("GET", "/v1/status").json()
    assert early["started_at"].startswith("1970-01-0")
    assert late["started_at"].startswith("2027-01-15")
    assert late["uptime_s"] - early["uptime_s"] < 60


def test_a_budget_that_no_meter_watches_is_told(world: World) -> None:
    energy = world.parts.config.energy
    world.parts.config = replace(world.parts.config, energy=replace(energy, budget_w=10.0, battery_wh=50.0))
    found = world.call("GET", "/v1/energy").json()
    assert found["budget"] == {"budget_w": 10.0, "is_enforced": False}
    assert (found["battery"]["capacity_wh"], found["battery"]["hours_left"]) == (50.0, None)
    assert found["battery"]["reason"]


def test_unknown_is_null_and_never_zero(world: World) -> None:
    accuracy = Accuracy.model_validate(world.call("GET", "/v1/accuracy").json())
    assert (accuracy.holdout.value, accuracy.holdout.low, accuracy.holdout.count) == (None, None, 0)
    energy = world.call("GET", "/v1/energy").json()
    assert energy["energy_j"] is None
    assert energy["meter"]["reason"]
    assert energy["activities"]["classify"]["per_item_j"] is None


def test_accuracy_shows_confusions_when_asked(world: World) -> None:
    assert "confusion" not in world.call("GET", "/v1/accuracy").json()
    detailed = Accuracy.model_validate(world.call("GET", "/v1/accuracy?detail=confusion").json())
    assert detailed.confusion == {"cat": {"dog": 1}}
    assert_problem(world.call("GET", "/v1/accuracy?detail=all"), 422, "unprocessable")


def test_accuracy_tells_what_is_refused_and_which_classes_drift(world: World) -> None:
    world.learn((picture(0), "cat"), (picture(1), "dog"), (picture(2), "owl"))
    accuracy = Accuracy.model_validate(world.call("GET", "/v1/accuracy").json())
    assert (accuracy.unknown.below, accuracy.unknown.refused, accuracy.unknown.holdout) == (0.4, 1, 20)
    drifts = {each.name: each.drift for each in accuracy.per_class}
    assert drifts["dog"] is not None
    assert (drifts["dog"].score, drifts["dog"].since_sample, drifts["dog"].drifting) == (1.25, "s00000002", True)
    assert drifts["cat"] is not None
    assert (drifts["cat"].since_sample, drifts["cat"].drifting) == (None, False)
    assert drifts["owl"] is None


def test_learner_and_memory_have_the_documented_shape(world: World) -> None:
    assert Learner.model_validate(world.call("GET", "/v1/learner").json()).state == "idle"
    assert Memory.model_validate(world.call("GET", "/v1/memory").json()).codec == "int8 token"


@pytest.mark.parametrize(
    ("text", "unix_s"),
    [
        ("0", 0.0),
        ("1700000000.5", 1700000000.5),
        ("2023-11-14T22:13:20Z", 1700000000.0),
        ("2023-11-14T22:13:20", 1700000000.0),
        ("2023-11-14T23:13:20+01:00", 1700000000.0),
        ("2023-11-14T23:13:20 01:00", 1700000000.0),
        ("2023-11-14", 1699920000.0),
    ],
)
def test_points_in_time_are_understood(text: str, unix_s: float) -> None:
    assert moment(text) == unix_s


@pytest.mark.parametrize("text", ["", "yesterday", "nan", "inf", "-5", "1e300", "9999-99-99", "0001-01-01T00:00:00+23:00"])
def test_other_texts_are_no_points_in_time(world: World, text: str) -> None:
    with pytest.raises(Unprocessable):
        moment(text)
    assert_problem(world.call("GET", "/v1/energy", params={"since": text}), 422, "unprocessable")


def test_energy_since_adds_the_history(world: World) -> None:
    assert world.call("GET", "/v1/energy?since=2023-11-14T22:13:20Z").json()["history"] == []


def test_info_shows_limits_and_the_origin_of_every_setting(world: World) -> None:
    body = Info.model_validate(world.call("GET", "/v1/info").json())
    assert body.limits.max_images == 16
    assert set(body.config) == {row.key for row in rows()}
    assert body.config["http.bind"].origin == "default"
    assert "image/jpeg" in body.media_types


def test_the_board_is_read_from_the_device_tree(tmp_path: Path) -> None:
    info.board.cache_clear()
    (tmp_path / "model").write_bytes(b"NVIDIA Jetson Xavier NX Developer Kit\0")
    assert info.board(tmp_path / "model") == "NVIDIA Jetson Xavier NX Developer Kit"
    assert info.board(tmp_path / "absent") is None
    info.board.cache_clear()
