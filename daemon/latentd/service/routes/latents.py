"""POST /v1/latents: the frozen stage as a service."""

from __future__ import annotations

import io
import json
from typing import Any, Dict, List, Tuple

import numpy as np
import safetensors.numpy
from fastapi import APIRouter, Header, Query, Request, Response
from numpy.typing import NDArray
from typing_extensions import Literal

from latentd.errors import LatentdError, NotAcceptable
from latentd.service import problems
from latentd.service.answers import json_bytes, request_id, server_timing
from latentd.service.batcher import EncodedImage, Priority
from latentd.service.bodies import read_upload
from latentd.service.clients import while_connected
from latentd.service.documents import image_body
from latentd.service.parts import parts_of
from latentd.service.routes.classify import Outcome, slowest
from latentd.service.schemas import LatentsAnswer

router = APIRouter(tags=["images"])

JSON, NPY, SAFETENSORS = "application/json", "application/x-npy", "application/x-safetensors"
_BINARY = {kind: {"schema": {"type": "string", "format": "binary"}} for kind in (NPY, SAFETENSORS)}


@router.post(
    "/v1/latents",
    response_model=LatentsAnswer,
    responses={200: {"content": _BINARY}, **problems.responses(400, 406, 408, 413, 415, 422, 503)},
    openapi_extra=image_body(labelled=False),
)
async def latents(
    request: Request,
    of: Literal["features", "tokens"] = Query("features", description="class tokens of the last blocks, or all tokens after block `split`"),
    accept: str = Header(JSON, description=f"{JSON}, {NPY} or {SAFETENSORS}; the binary ones hold the usable images only"),
) -> Response:
    """The latents of 1 to `http.max_images` images, as the frozen stage gives them."""
    kind = negotiated(accept)
    parts = parts_of(request)
    async with read_upload(request, parts.config.http, parts.pending, parts.pipeline.in_pool) as upload:
        outcomes = await while_connected(request, parts.pipeline.encode(upload.images, Priority.CLASSIFY, tokens=of == "tokens"))
    encoded = [outcome for outcome in outcomes if isinstance(outcome, EncodedImage)]
    if not encoded:
        raise problems.first_problem([outcome for outcome in outcomes if isinstance(outcome, LatentdError)])
    spec = parts.choice.stage.spec
    about: Dict[str, Any] = {
        "request_id": request_id(request),
        "engine": parts.choice.stage.name,
        "backbone": {"name": spec.backbone_name, "sha256": spec.backbone_sha256},
        "image_size": spec.image_size,
        "split": spec.split,
        "of": of,
        "shape": [spec.tokens if of == "tokens" else spec.class_tokens, spec.width],
    }
    body, headers = await parts.pipeline.in_pool(_body, kind, about, outcomes)
    return Response(body, 200, {**headers, **server_timing(slowest(encoded))}, kind)


def negotiated(accept: str) -> str:
    """The first of our types, by quality, that an Accept header takes. Raises NotAcceptable."""
    wanted: List[Tuple[float, str]] = []
    for part in accept.split(","):
        name, _, parameters = part.strip().lower().partition(";")
        wanted.append((-_quality(parameters), name.strip()))
    for quality, name in sorted(wanted, key=lambda item: item[0]):
        if quality < 0:
            if name in ("*/*", "application/*", ""):
                return JSON
            if name in (JSON, NPY, SAFETENSORS):
                return name
    raise NotAcceptable(f"None of the types in Accept: {accept[:100]} is known here.")


def _quality(parameters: str) -> float:
    for parameter in parameters.split(";"):
        name, _, value = parameter.strip().partition("=")
        if name == "q":
            try:
                return float(value)
            except ValueError:
                return 0.0
    return 1.0


def _body(kind: str, about: Dict[str, Any], outcomes: List[Outcome]) -> Tuple[bytes, Dict[str, str]]:
    """In the decode pool: the answer's bytes and headers. Tokens of 16 images are some 25 MB of text."""
    if kind == JSON:
        return _as_json(about, outcomes), {}
    rows = np.stack([_latent(outcome, about) for outcome in outcomes if isinstance(outcome, EncodedImage)])  # (n, N, D)
    described = _described(about, outcomes)
    headers = {f"X-Latentd-{name}": value for name, value in described.items()}
    if kind == NPY:
        file = io.BytesIO()
        np.save(file, rows)
        return file.getvalue(), headers
    return safetensors.numpy.save({"latents": rows}, metadata={name.lower(): value for name, value in described.items()}), headers


def _described(about: Dict[str, Any], outcomes: List[Outcome]) -> Dict[str, str]:
    """What a file of numbers can't say itself. Images: the place in the request of each row; Problems: image -> code of those left out."""
    left_out = {str(index): outcome.slug for index, outcome in enumerate(outcomes) if isinstance(outcome, LatentdError)}
    return {
        "Engine": about["engine"],
        "Backbone": about["backbone"]["name"],
        "Backbone-SHA256": about["backbone"]["sha256"],
        "Image-Size": str(about["image_size"]),
        "Split": str(about["split"]),
        "Of": about["of"],
        "Shape": json.dumps(about["shape"]),
        "Images": json.dumps([index for index, outcome in enumerate(outcomes) if isinstance(outcome, EncodedImage)]),
        "Problems": json.dumps(left_out),
    }


def _latent(image: EncodedImage, about: Dict[str, Any]) -> NDArray[np.float32]:
    """(N, D) or (class_tokens, D)."""
    if about["of"] == "tokens":
        assert image.tokens is not None, "tokens were asked for when the image was encoded"
        return image.tokens
    return image.features.reshape(about["shape"])  # (class_tokens, D)


def _as_json(about: Dict[str, Any], outcomes: List[Outcome]) -> bytes:
    results = [
        json_bytes({"problem": problems.document(outcome)})
        if isinstance(outcome, LatentdError)
        else b'{"latent":' + _numbers(_latent(outcome, about)) + b"}"
        for outcome in outcomes
    ]
    return json_bytes(about)[:-1] + b',"results":[' + b",".join(results) + b"]}"


def _numbers(latent: NDArray[np.float32]) -> bytes:
    """(N, D) as nested JSON arrays; nine digits bring a float32 back exactly."""
    rows = ("[" + ",".join([f"{value:.9g}" for value in row]) + "]" for row in latent.tolist())
    return ("[" + ",".join(rows) + "]").encode("ascii")
