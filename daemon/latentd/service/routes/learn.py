"""POST /v1/learn: these images are of that class. The answer comes after the fsync."""

from __future__ import annotations

import re
from typing import Dict, Optional, Sequence

from fastapi import APIRouter, Header, Query, Request, Response

from latentd.replay.records import SampleRecord, sample_id_of
from latentd.service import problems, teaching
from latentd.service.answers import json_answer
from latentd.service.bodies import read_upload
from latentd.service.documents import image_body
from latentd.service.parts import parts_of
from latentd.service.schemas import LearnAnswer

router = APIRouter(tags=["images"])

MAX_WAIT_S = 120
_WAIT = re.compile(r"(?:^|[,;\s])wait\s*=\s*\"?(\d{1,9})\"?(?=$|[,;\s])", re.IGNORECASE)


@router.post(
    "/v1/learn",
    status_code=202,
    response_model=LearnAnswer,
    responses={200: {"model": LearnAnswer, "description": "Learned"}, **problems.responses(400, 408, 409, 413, 415, 422, 503, 507)},
    openapi_extra=image_body(labelled=True),
)
async def learn(
    request: Request,
    label: Optional[str] = Query(None, description="the label of every image that has none of its own"),
    prefer: Optional[str] = Header(
        None, description=f"`wait=N`: answer 200 once learned, after N seconds (at most {MAX_WAIT_S}) 202 all the same"
    ),
    idempotency_key: Optional[str] = Header(None, description="the same key with the same images gives the stored answer, for 24 hours"),
) -> Response:
    """Teaches 1 to `http.max_images` labelled images as one mini-batch; they are on the disk when the answer comes."""
    parts = parts_of(request)
    key = teaching.idempotency_key(request)
    async with read_upload(request, parts.config.http, parts.pending, parts.pipeline.in_pool) as upload:
        lesson = await teaching.teach(parts, request, upload, key)
    headers = {"Idempotent-Replayed": "true"} if lesson.was_replayed else {}
    is_learned, records = False, lesson.records
    wait_s = preferred_wait(prefer)
    if wait_s is not None:
        is_learned, records = await teaching.wait_until_learned(parts, lesson.records, wait_s)
        headers["Preference-Applied"] = f"wait={wait_s}"
    if not is_learned:
        headers.update(_location(records))
    answer = {"request_id": lesson.request_id, "version": parts.learner.snapshot.version, "results": teaching.results(lesson, records)}
    return json_answer(answer, 200 if is_learned else 202, headers)


def preferred_wait(prefer: Optional[str]) -> Optional[int]:
    """Seconds in `Prefer: wait=N` (RFC 7240), within bounds; None when there is no such preference."""
    found = _WAIT.search(prefer or "")
    return min(int(found.group(1)), MAX_WAIT_S) if found else None


def _location(records: Sequence[SampleRecord]) -> Dict[str, str]:
    """Where the state of the samples can be read: the one sample, or the page that begins with the first."""
    if len(records) == 1:
        return {"Location": f"/v1/samples/{records[0].sample_id}"}
    return {"Location": f"/v1/samples?cursor={sample_id_of(records[0].seq - 1)}&limit={len(records)}"}
