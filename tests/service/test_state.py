from __future__ import annotations

from pathlib import Path

import pytest

from latentd import __version__
from latentd.config import rows
from latentd.errors import Unprocessable
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
    for part in ("learner", "accuracy", "memory"):
        assert world.call("GET", f"/v1/{part}").json() == status[part]
    assert world.call("GET", "/v1/energy").json().keys() == status["energy"].keys()


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
