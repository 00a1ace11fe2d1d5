"""POST /v1/classify: what do the images show?"""

from __future__ import annotations

import time
from typing import Any, Dict, List, Optional, Tuple, Union

import numpy as np
from fastapi import APIRouter, Query, Request, Response
from numpy.typing import NDArray
from typing_extensions import Literal

from latentd.errors import BudgetFull, JournalError, LatentdError, Overloaded
from latentd.service import problems
from latentd.service.answers import json_answer, request_id, server_timing
from latentd.service.batcher import EncodedImage, Priority
from latentd.service.bodies import Upload, read_upload
from latentd.service.clients import while_connected
from latentd.service.documents import image_body
from latentd.service.labels import UNKNOWN
from latentd.service.parts import Parts, parts_of
from latentd.service.schemas import ClassifyAnswer
from latentd.service.teaching import Material, store, tokens_of

router = APIRouter(tags=["images"])

Outcome = Union[EncodedImage, LatentdError]


@router.post(
    "/v1/classify",
    response_model=ClassifyAnswer,
    responses=problems.responses(400, 408, 413, 415, 422, 503),
    openapi_extra=image_body(labelled=False),
)
async def classify(
    request: Request,
    top_k: int = Query(5, ge=1, le=1000, description="most probable labels to answer"),
    keep: Literal["none", "uncertain", "all"] = Query("none", description="keep the latent, so that the image can be labelled later"),
) -> Response:
    """Predictions for 1 to `http.max_images` images, one result an image, in order."""
    parts = parts_of(request)
    async with read_upload(request, parts.config.http, parts.pending, parts.pipeline.in_pool) as upload:
        adapted = parts.learner.snapshot.wants_tokens
        with_tokens = adapted or (keep != "none" and parts.codec.tokens is not None)
        outcomes = await while_connected(request, parts.pipeline.encode(upload.images, Priority.CLASSIFY, tokens=with_tokens))
        if adapted:  # some milliseconds of transformer blocks: not on the event loop
            version, results, timing = await parts.pipeline.in_pool(_judge, parts, outcomes, top_k)
        else:
            version, results, timing = _judge(parts, outcomes, top_k)
        if keep != "none":
            await _keep(parts, upload, outcomes, results, only_uncertain=keep == "uncertain")
    answer = {"request_id": request_id(request), "version": version, "engine": parts.choice.stage.name, "results": results}
    return json_answer(answer, headers=server_timing(timing))


def _judge(parts: Parts, outcomes: List[Outcome], top_k: int) -> Tuple[int, List[Dict[str, Any]], Dict[str, float]]:
    """The version that judged, one result an image, and the longest time of each stage. Raises the problem when no image can be used."""
    encoded = [outcome for outcome in outcomes if isinstance(outcome, EncodedImage)]
    if not encoded:
        raise problems.first_problem([outcome for outcome in outcomes if isinstance(outcome, LatentdError)])
    snapshot = parts.learner.snapshot
    began = time.perf_counter()
    tokens = tokens_of(parts, encoded) if snapshot.wants_tokens and encoded[0].tokens is not None else None
    features = np.stack([image.features for image in encoded])  # (B, F)
    probabilities = snapshot.predict(features, tokens)  # (B, C)
    decisions = snapshot.decide(features, probabilities)
    adaptive_s = time.perf_counter() - began
    parts.metrics.stage("adaptive", adaptive_s)
    power = parts.ledger.image_energy()
    energy = {"value": power.value_j, "quality": power.quality, "source": power.source}
    shown = iter(
        {
            "predictions": _top(snapshot.labels, row, top_k),
            "decision": decision,
            "sample_id": None,
            "timing_s": {"queue": image.queue_s, "decode": image.decode_s, "frozen": image.frozen_s, "adaptive": adaptive_s},
            "energy_j": energy,
        }
        for image, row, decision in zip(encoded, probabilities, decisions)
    )
    results = [{"problem": problems.document(item)} if isinstance(item, LatentdError) else next(shown) for item in outcomes]
    return snapshot.version, results, {**slowest(encoded), "adaptive": adaptive_s}


def slowest(encoded: List[EncodedImage]) -> Dict[str, float]:
    """The longest time that one of the images spent in each stage, in seconds."""
    return {
        "queue": max(image.queue_s for image in encoded),
        "decode": max(image.decode_s for image in encoded),
        "frozen": max(image.frozen_s for image in encoded),
    }


def _top(labels: Tuple[str, ...], row: NDArray[np.float64], top_k: int) -> List[Dict[str, Any]]:
    best = np.argsort(-row, kind="stable")[:top_k]
    return [{"label": labels[index], "probability": float(row[index])} for index in best]


async def _keep(parts: Parts, upload: Upload, outcomes: List[Outcome], results: List[Dict[str, Any]], only_uncertain: bool) -> None:
    """Stores latents without a label and notes their ids. Where that is not possible now the ids stay null: classify goes on."""
    chosen: List[Dict[str, Any]] = []
    materials: List[Material] = []
    for image, outcome, result in zip(upload.images, outcomes, results):
        wanted: Optional[bool] = result.get("decision") == UNKNOWN or not only_uncertain
        if wanted and isinstance(image, bytes) and isinstance(outcome, EncodedImage):
            chosen.append(result)
            materials.append(Material(image, outcome, None))
    if not materials:
        return
    try:
        records = await store(parts, materials)
    except (BudgetFull, JournalError, Overloaded):
        return
    for result, record in zip(chosen, records):
        result["sample_id"] = record.sample_id
