"""/v1/samples: what was taught, its state, corrections and forgetting."""

from __future__ import annotations

import asyncio
from typing import Any, Dict, Optional, Tuple

from fastapi import APIRouter, Query, Request, Response
from typing_extensions import Literal

from latentd.errors import LabelInvalid, Unprocessable
from latentd.replay.records import SampleRecord, seq_of
from latentd.service import problems, views
from latentd.service.answers import json_answer
from latentd.service.bodies import read_small_json
from latentd.service.documents import json_body
from latentd.service.labels import clean_label
from latentd.service.parts import Parts, parts_of
from latentd.service.schemas import Sample, SamplesPage

router = APIRouter(tags=["samples"])

State = Literal["queued", "learned", "duplicate", "rejected", "evicted", "held", "forgotten"]


@router.get("/v1/samples", response_model=SamplesPage, responses=problems.responses(422, 503))
async def list_samples(
    request: Request,
    limit: int = Query(50, ge=1, le=1000),
    cursor: Optional[str] = Query(None, description="`next` of the page before"),
    label: Optional[str] = Query(None, description="samples of this class only"),
    state: Optional[State] = Query(None, description="samples in this state only"),
    doubted: bool = Query(False, description="samples whose label looks wrong only"),
) -> Response:
    """What was taught, oldest first, a page at a time."""
    if cursor is not None and seq_of(cursor) is None:
        raise Unprocessable(f"{cursor[:40]!r} is no cursor.", hint="Use the `next` of the page before.")
    if doubted:
        records, following = await _doubted(parts_of(request), cursor or "", limit)
        records = tuple(record for record in records if label in (None, record.label) and state in (None, record.state))
    else:
        records, following = await asyncio.wrap_future(parts_of(request).journal.samples(cursor, limit, label, state))
    memory = parts_of(request).learner.memory()
    return json_answer({"samples": [views.sample(record, memory) for record in records], "next": following})


@router.get("/v1/samples/{sample_id}", response_model=Sample, responses=problems.responses(404, 503))
async def one_sample(request: Request, sample_id: str) -> Response:
    """One sample."""
    return json_answer(_view(request, await asyncio.wrap_future(parts_of(request).journal.sample(sample_id))))


@router.delete("/v1/samples/{sample_id}", status_code=202, response_model=Sample, responses=problems.responses(404, 503))
async def forget_sample(request: Request, sample_id: str) -> Response:
    """Forgets a sample: off the disk and out of what was learned."""
    return json_answer(_view(request, await asyncio.wrap_future(parts_of(request).journal.forget(sample_id))), 202)


@router.put(
    "/v1/samples/{sample_id}/label",
    status_code=202,
    response_model=Sample,
    responses=problems.responses(400, 404, 409, 413, 415, 422, 503),
    openapi_extra=json_body("LabelBody", required=True),
)
async def relabel_sample(request: Request, sample_id: str) -> Response:
    """Late truth for a held sample, a correction, or its own label again where that is doubted: `{"label": "…"}`."""
    parts = parts_of(request)
    body = await read_small_json(request, parts.config.http, parts.pending)
    if not isinstance(body, dict) or not isinstance(body.get("label"), str):
        raise LabelInvalid('The body must be {"label": text}.')
    label = clean_label(body["label"], parts.config.http.max_label_chars)
    again = parts.learner.memory().doubts(sample_id)
    return json_answer(_view(request, await asyncio.wrap_future(parts.journal.relabel(sample_id, label, again))), 202)


async def _doubted(parts: Parts, after: str, limit: int) -> Tuple[Tuple[SampleRecord, ...], Optional[str]]:
    """One page of them, and the next cursor."""
    ids, more = parts.learner.memory().doubted_after(after, limit)
    return await asyncio.wrap_future(parts.journal.samples_of(ids)), ids[-1] if more else None


def _view(request: Request, record: SampleRecord) -> Dict[str, Any]:
    return views.sample(record, parts_of(request).learner.memory())
