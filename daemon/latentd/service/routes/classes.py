"""/v1/classes: what can be told apart."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request, Response

from latentd.errors import LabelInvalid
from latentd.service import problems, views
from latentd.service.answers import json_answer
from latentd.service.bodies import read_small_json
from latentd.service.documents import json_body
from latentd.service.labels import clean_label
from latentd.service.parts import parts_of
from latentd.service.schemas import ClassEntry, ClassesAnswer

router = APIRouter(tags=["classes"])


@router.get("/v1/classes", response_model=ClassesAnswer, responses=problems.responses())
async def list_classes(request: Request) -> Response:
    """Every class with its counts and accuracy."""
    parts = parts_of(request)
    report = parts.learner.accuracy()
    return json_answer({"classes": [views.class_entry(record, report) for record in parts.journal.classes()]})


@router.put(
    "/v1/classes/{name:path}",
    response_model=ClassEntry,
    responses={201: {"model": ClassEntry, "description": "Created"}, **problems.responses(400, 404, 409, 413, 415, 422, 503)},
    openapi_extra=json_body("RenameBody", required=False),
)
async def put_class(request: Request, name: str) -> Response:
    """Creates the class (201), finds it (200), or renames it: `{"rename_to": "…"}` (200)."""
    parts = parts_of(request)
    most = parts.config.http.max_label_chars
    body = await read_small_json(request, parts.config.http, parts.pending)
    rename_to = body.get("rename_to") if isinstance(body, dict) else body
    if not isinstance(rename_to, (str, type(None))):
        raise LabelInvalid('The body must be empty or {"rename_to": text}.')
    new_name = None if rename_to is None else clean_label(rename_to, most)
    record, created = await asyncio.wrap_future(parts.journal.put_class(clean_label(name, most), new_name))
    return json_answer(views.class_entry(record), 201 if created else 200)


@router.delete("/v1/classes/{name:path}", status_code=202, response_model=ClassEntry, responses=problems.responses(404, 503))
async def forget_class(request: Request, name: str) -> Response:
    """Forgets a class and every sample of it."""
    return json_answer(views.class_entry(await asyncio.wrap_future(parts_of(request).journal.forget_class(name))), 202)
