"""GET /v1/accuracy: how good is it?"""

from __future__ import annotations

from typing import Optional

from fastapi import APIRouter, Query, Request, Response
from typing_extensions import Literal

from latentd.service import problems, views
from latentd.service.answers import json_answer
from latentd.service.parts import parts_of
from latentd.service.schemas import Accuracy

router = APIRouter(tags=["state"])


@router.get("/v1/accuracy", response_model=Accuracy, responses=problems.responses(422))
async def accuracy(
    request: Request, detail: Optional[Literal["confusion"]] = Query(None, description="adds the hold-out confusions, true -> predicted")
) -> Response:
    """Prequential and hold-out accuracy with counts and 95 % intervals; null where nothing was measured."""
    return json_answer(views.accuracy(parts_of(request).learner.accuracy(), confusion=detail == "confusion"))
