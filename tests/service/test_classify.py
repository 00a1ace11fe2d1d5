from __future__ import annotations

import base64
from typing import Callable

import pytest

from latentd.config import Config, EngineConfig
from latentd.service.batcher import Priority
from latentd.service.schemas import ClassifyAnswer
from latentd.vision.images import ImageLimits, decode
from service.fakes import SIZE, World, assert_problem, picture


def test_a_raw_picture_is_answered_with_one_result_of_the_documented_shape(world: World) -> None:
    answer = world.call("POST", "/v1/classify?top_k=2", content=picture(), headers={"Content-Type": "image/png"})
    assert answer.status_code == 200
    body = ClassifyAnswer.model_validate(answer.json())
    assert (body.version, body.engine, body.request_id) == (7, "fake", answer.headers["x-request-id"])
    (result,) = body.results
    assert [each.label for each in result.predictions or []] == ["cat", "dog"]
    assert (result.decision, result.sample_id, result.problem) == ("cat", None, None)
    assert result.timing_s is not None and min(result.timing_s.model_dump().values()) >= 0.0


def test_unknown_energy_is_null_and_says_so(world: World) -> None:
    result = world.classify(picture()).json()["results"][0]
    assert result["energy_j"] == {"value": None, "quality": "unavailable", "source": None}


def test_server_timing_names_every_stage(world: World) -> None:
    parts = world.classify(picture(), picture(1)).headers["server-timing"].split(", ")
    assert [part.split(";dur=")[0] for part in parts] == ["queue", "decode", "frozen", "adaptive"]
    assert all(float(part.split(";dur=")[1]) >= 0 for part in parts)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP"])
def test_every_documented_format_is_taken_as_a_raw_body(world: World, format: str) -> None:
    answer = world.call("POST", "/v1/classify", content=picture(format=format), headers={"Content-Type": f"image/{format.lower()}"})
    assert answer.json()["results"][0]["decision"] == "cat"


def test_raw_multipart_and_json_bodies_give_the_same_predictions(world: World) -> None:
    image = picture(3)
    raw = world.call("POST", "/v1/classify", content=image, headers={"Content-Type": "image/png"})
    form = world.classify(image)
    coded = world.call("POST", "/v1/classify", json={"images": [{"data": base64.b64encode(image).decode()}]})
    wrapped = world.call("POST", "/v1/classify", json={"images": [{"data": base64.encodebytes(image).decode()}]})
    predictions = [answer.json()["results"][0]["predictions"] for answer in (raw, form, coded, wrapped)]
    assert predictions[0] and predictions.count(predictions[0]) == 4


def test_bad_images_keep_their_places_among_good_ones(world: World) -> None:
    body = world.classify(picture(0), b"no image", picture(1), picture(2)[:40], picture(3)).json()
    assert ["problem" in result for result in body["results"]] == [False, True, False, True, False]
    assert body["results"][1]["problem"]["code"] == "unsupported-media-type"
    assert body["results"][3]["problem"]["code"] == "image-undecodable"
    ClassifyAnswer.model_validate(body)


def test_when_no_image_can_be_used_the_answer_is_their_problem(world: World) -> None:
    assert_problem(world.classify(b"", b""), 422, "image-undecodable")


def test_when_images_fail_for_different_reasons_the_answer_names_them_all(world: World) -> None:
    problem = assert_problem(world.classify(b"", b"GIF89a" + bytes(20)), 422, "unprocessable")
    assert "(1)" in problem["detail"] and "(2)" in problem["detail"]


def test_an_image_whose_latent_is_not_finite_is_refused_alone(world: World) -> None:
    bright = picture(0, size=(4, 3))
    world.stage.poison = int(_first_value(bright))
    body = world.classify(bright, picture(7)).json()
    assert body["results"][0]["problem"]["code"] == "latent-not-finite"
    assert body["results"][1]["decision"] == "cat"


def _first_value(image: bytes) -> int:
    return int(decode(image, SIZE, ImageLimits(1 << 20, 1 << 20, 1))[0, 0, 0])


@pytest.mark.parametrize("top_k", ["0", "-1", "1001", "many"])
def test_top_k_out_of_range_is_a_problem_that_names_it(world: World, top_k: str) -> None:
    problem = assert_problem(world.classify(picture(), params={"top_k": top_k}), 422, "unprocessable")
    assert problem["detail"].startswith("top_k: ")


def test_unknown_query_parameters_are_ignored(world: World) -> None:
    assert world.classify(picture(), params={"colour": "red"}).status_code == 200


def test_before_anything_was_taught_the_decision_is_unknown(world: World) -> None:
    world.learner.snapshot.labels = ()
    result = world.classify(picture()).json()["results"][0]
    assert (result["predictions"], result["decision"]) == ([], "unknown")


def test_keep_all_stores_a_held_sample_that_can_be_labelled_later(world: World) -> None:
    kept = world.classify(picture(0), b"no image", params={"keep": "all"}).json()["results"]
    sample_id = kept[0]["sample_id"]
    assert world.call("GET", f"/v1/samples/{sample_id}").json()["state"] == "held"
    labelled = world.call("PUT", f"/v1/samples/{sample_id}/label", json={"label": "newt"})
    assert (labelled.status_code, labelled.json()["label"]) == (202, "newt")


def test_keep_uncertain_stores_only_what_was_not_decided(world: World) -> None:
    sure = world.classify(picture(0), params={"keep": "uncertain"}).json()["results"][0]
    world.learner.snapshot.refuses = True
    unsure = world.classify(picture(1), params={"keep": "uncertain"}).json()["results"][0]
    assert sure["sample_id"] is None
    assert (unsure["decision"], unsure["sample_id"] is not None) == ("unknown", True)


def test_classify_goes_on_without_keeping_when_the_journal_is_down(world: World) -> None:
    world.parts.journal.close()
    answer = world.classify(picture(), params={"keep": "all"})
    assert (answer.status_code, answer.json()["results"][0]["sample_id"]) == (200, None)


def test_a_full_queue_is_answered_with_503_and_retry_after(new_world: Callable[..., World]) -> None:
    world = new_world(Config(engine=EngineConfig(queue_images=16)))
    world.parts.batcher.reserve(16, Priority.CLASSIFY)
    answer = world.classify(picture())
    assert_problem(answer, 503, "overloaded")
    assert answer.headers["retry-after"] == "1"
    assert 'latentd_queue_rejected_total{queue="inference"} 1.0' in world.call("GET", "/metrics").text
