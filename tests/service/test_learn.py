from __future__ import annotations

import asyncio
from concurrent.futures import Future
from typing import Callable

import pytest

from latentd.config import Config, LearnConfig
from latentd.errors import LearnerError
from latentd.service.routes.learn import MAX_WAIT_S, preferred_wait
from latentd.service.schemas import LearnAnswer
from service.fakes import World, assert_problem, picture


def test_learning_is_accepted_after_it_is_stored_and_says_where_to_look(world: World) -> None:
    answer = world.learn((picture(), "cat"))
    body = LearnAnswer.model_validate(answer.json())
    assert answer.status_code == 202
    (result,) = body.results
    assert (result.label, result.state, result.duplicate_of) == ("cat", "queued", None)
    assert answer.headers["location"] == f"/v1/samples/{result.sample_id}"
    assert world.call("GET", answer.headers["location"]).json()["label"] == "cat"
    assert "preference-applied" not in answer.headers


def test_the_location_of_several_samples_lists_exactly_them(world: World) -> None:
    world.learn((picture(9), "before"))
    answer = world.learn((picture(1), "cat"), (picture(2), "dog"))
    page = world.call("GET", answer.headers["location"]).json()
    assert [sample["sample_id"] for sample in page["samples"]] == [result["sample_id"] for result in answer.json()["results"]]


def test_prefer_wait_answers_200_once_learned(world: World) -> None:
    answer = world.learn((picture(), "cat"), headers={"Prefer": "wait=5"})
    assert (answer.status_code, answer.headers["preference-applied"]) == (200, "wait=5")
    assert answer.json()["results"][0]["state"] == "learned"
    assert "location" not in answer.headers


def test_prefer_wait_gives_up_in_time_with_202(world: World) -> None:
    world.learner.learns = False
    answer = world.learn((picture(), "cat"), headers={"Prefer": "wait=0"})
    assert (answer.status_code, answer.headers["preference-applied"]) == (202, "wait=0")
    assert answer.json()["results"][0]["state"] == "queued"
    world.learner.finish()  # settles what nobody waits for any more


def test_prefer_wait_with_a_learner_that_is_down_answers_202(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def down(seq: int) -> object:
        future: Future[None] = Future()
        future.set_exception(LearnerError("it died"))
        return future

    monkeypatch.setattr(world.learner, "learned", down)
    assert world.learn((picture(), "cat"), headers={"Prefer": "wait=5"}).status_code == 202


@pytest.mark.parametrize(
    ("prefer", "wait_s"),
    [
        (None, None),
        ("", None),
        ("wait=5", 5),
        ("respond-async, wait=10", 10),
        ('Wait="7"; x', 7),
        ("wait=99999", MAX_WAIT_S),
        ("await=5", None),
        ("wait=x", None),
        ("wait=-1", None),
    ],
)
def test_the_preference_is_read_as_rfc_7240_writes_it(prefer: str, wait_s: int) -> None:
    assert preferred_wait(prefer) == wait_s


def test_the_same_image_and_label_is_a_duplicate_and_learned_once(world: World) -> None:
    first = world.learn((picture(), "cat")).json()["results"][0]
    again = world.learn((picture(), "cat"), headers={"Prefer": "wait=5"})
    assert again.status_code == 200
    result = again.json()["results"][0]
    assert (result["state"], result["duplicate_of"]) == ("duplicate", first["sample_id"])


def test_when_no_image_can_be_used_nothing_is_stored(world: World) -> None:
    assert_problem(world.learn((b"", "cat"), (b"", "dog")), 422, "image-undecodable")
    assert world.call("GET", "/v1/samples").json() == {"samples": [], "next": None}


def test_a_learner_that_is_too_far_behind_refuses_more(new_world: Callable[..., World]) -> None:
    world = new_world(Config(learn=LearnConfig(max_lag_samples=16)))
    world.learner.lag_samples = 16
    assert world.learn((picture(), "cat")).status_code == 202
    world.learner.lag_samples = 17
    answer = world.learn((picture(1), "cat"))
    assert_problem(answer, 503, "overloaded")
    assert int(answer.headers["retry-after"]) >= 1
    assert 'latentd_queue_rejected_total{queue="learner"} 1.0' in world.call("GET", "/metrics").text


def test_a_journal_that_is_down_refuses_learning_while_classify_goes_on(world: World) -> None:
    world.parts.journal.close()
    assert_problem(world.learn((picture(), "cat")), 503, "journal-failed")
    assert world.classify(picture()).status_code == 200


def test_the_same_key_and_images_give_the_stored_answer(world: World) -> None:
    taught = ((picture(1), "cat"), (b"broken", "dog"), (picture(2), "owl"))
    first = world.learn(*taught, headers={"Idempotency-Key": "k1"})
    again = world.learn(*taught, headers={"Idempotency-Key": "k1"})
    assert "idempotent-replayed" not in first.headers
    assert again.headers["idempotent-replayed"] == "true"
    assert again.json() == first.json()
    assert again.status_code == first.status_code == 202
    assert len(world.call("GET", "/v1/samples").json()["samples"]) == 2


def test_the_same_key_with_other_images_is_refused(world: World) -> None:
    world.learn((picture(1), "cat"), headers={"Idempotency-Key": "k1"})
    assert_problem(world.learn((picture(2), "cat"), headers={"Idempotency-Key": "k1"}), 422, "idempotency-key-reused")
    assert_problem(world.learn((picture(1), "dog"), headers={"Idempotency-Key": "k1"}), 422, "idempotency-key-reused")


def test_a_key_whose_request_still_runs_is_a_conflict(world: World) -> None:
    async def twice() -> None:
        world.stage.gate.clear()
        request = {"files": [("image", picture())], "data": {"label": "cat"}, "headers": {"Idempotency-Key": "k1"}}
        first = asyncio.ensure_future(world.acall("POST", "/v1/learn", **request))
        await asyncio.get_running_loop().run_in_executor(None, world.stage.entered.wait, 10)
        assert_problem(await world.acall("POST", "/v1/learn", **request), 409, "conflict")
        world.stage.gate.set()
        assert (await first).status_code == 202
        assert (await world.acall("POST", "/v1/learn", **request)).headers["idempotent-replayed"] == "true"

    asyncio.run(twice())


@pytest.mark.parametrize("key", ["", "x" * 256, "sn\u00f6", "a\tb"])
def test_a_key_that_can_not_be_one_is_a_bad_request(world: World, key: str) -> None:
    answer = world.learn((picture(), "cat"), headers={"Idempotency-Key": key.encode("latin-1")})
    assert_problem(answer, 400, "bad-request")


def test_outcomes_are_counted(world: World) -> None:
    world.learn((picture(), "cat"), (b"broken", "cat"))
    world.learn((picture(), "cat"))
    text = world.call("GET", "/metrics").text
    for outcome in ("queued", "problem", "duplicate"):
        assert f'latentd_learn_samples_total{{outcome="{outcome}"}} 1.0' in text
