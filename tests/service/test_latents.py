from __future__ import annotations

import io
import json

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from latentd.errors import NotAcceptable
from latentd.service.routes.latents import JSON, NPY, SAFETENSORS, negotiated
from latentd.service.schemas import LatentsAnswer
from service.fakes import SPEC, World, assert_problem, picture

SHAPES = {"features": [SPEC.class_tokens, SPEC.width], "tokens": [SPEC.tokens, SPEC.width]}


@pytest.mark.parametrize("of", SHAPES)
def test_every_format_gives_the_same_numbers_exactly(world: World, of: str) -> None:
    def ask(accept: str) -> bytes:
        files = [("image", picture(seed)) for seed in range(3)]
        answer = world.call("POST", f"/v1/latents?of={of}", files=files, headers={"Accept": accept})
        assert (answer.status_code, answer.headers["content-type"]) == (200, accept)
        return answer.content

    body = LatentsAnswer.model_validate(json.loads(ask(JSON)))
    from_json = np.array([result.latent for result in body.results], np.float32)
    from_npy = np.load(io.BytesIO(ask(NPY)), allow_pickle=False)
    from_safetensors = safetensors.numpy.load(ask(SAFETENSORS))["latents"]
    assert body.shape == SHAPES[of]
    assert from_npy.shape == (3, *SHAPES[of])
    assert from_npy.dtype == np.float32
    assert (from_json == from_npy).all()
    assert (from_safetensors == from_npy).all()


def test_the_answer_says_what_the_numbers_are(world: World) -> None:
    body = LatentsAnswer.model_validate(world.call("POST", "/v1/latents", files=[("image", picture())]).json())
    assert (body.engine, body.backbone.name, body.backbone.sha256) == ("fake", SPEC.backbone_name, SPEC.backbone_sha256)
    assert (body.split, body.of, body.image_size) == (SPEC.split, "features", SPEC.image_size)


@pytest.mark.parametrize("accept", [NPY, SAFETENSORS])
def test_binary_answers_hold_the_usable_images_and_name_the_others(world: World, accept: str) -> None:
    files = [("image", picture(0)), ("image", b"broken"), ("image", picture(1))]
    answer = world.call("POST", "/v1/latents", files=files, headers={"Accept": accept})
    assert json.loads(answer.headers["x-latentd-images"]) == [0, 2]
    assert json.loads(answer.headers["x-latentd-problems"]) == {"1": "unsupported-media-type"}
    assert json.loads(answer.headers["x-latentd-shape"]) == SHAPES["features"]
    assert answer.headers["x-latentd-split"] == str(SPEC.split)
    assert answer.headers["x-latentd-backbone-sha256"] == SPEC.backbone_sha256
    rows = np.load(io.BytesIO(answer.content)) if accept == NPY else safetensors.numpy.load(answer.content)["latents"]
    assert len(rows) == 2


def test_a_safetensors_file_carries_its_description(world: World) -> None:
    answer = world.call("POST", "/v1/latents", files=[("image", picture())], headers={"Accept": SAFETENSORS})
    size = int.from_bytes(answer.content[:8], "little")
    metadata = json.loads(answer.content[8 : 8 + size])["__metadata__"]
    assert (metadata["backbone-sha256"], metadata["split"], metadata["of"]) == (SPEC.backbone_sha256, str(SPEC.split), "features")


def test_when_no_image_can_be_used_a_binary_request_gets_the_problem_too(world: World) -> None:
    answer = world.call("POST", "/v1/latents", files=[("image", b"broken")], headers={"Accept": NPY})
    assert_problem(answer, 415, "unsupported-media-type")


@pytest.mark.parametrize("of", ["everything", ""])
def test_an_unknown_kind_of_latent_is_a_problem(world: World, of: str) -> None:
    assert_problem(world.call("POST", "/v1/latents", params={"of": of}, files=[("image", picture())]), 422, "unprocessable")


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("*/*", JSON),
        ("", JSON),
        (NPY, NPY),
        ("text/html, application/x-npy;q=0.5, */*;q=0.1", NPY),
        ("application/json;q=0.1, application/x-safetensors", SAFETENSORS),
        ("application/json, application/problem+json", JSON),
        ("APPLICATION/X-NPY", NPY),
    ],
)
def test_the_best_liked_known_type_is_chosen(accept: str, kind: str) -> None:
    assert negotiated(accept) == kind


@pytest.mark.parametrize("accept", ["text/html", "application/x-npy;q=0", "application/x-npy;q=nonsense"])
def test_no_acceptable_type_is_refused(world: World, accept: str) -> None:
    with pytest.raises(NotAcceptable):
        negotiated(accept)
    assert_problem(world.call("POST", "/v1/latents", files=[("image", picture())], headers={"Accept": accept}), 406, "not-acceptable")
