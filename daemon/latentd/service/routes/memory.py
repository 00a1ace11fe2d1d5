"""GET /v1/memory: how full is the replay memory?"""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from latentd.service import problems, views
from latentd.service.answers import json_answer
from latentd.service.parts import parts_of
from latentd.service.schemas import Memory

router = APIRouter(tags=["state"])


@router.get("/v1/memory", response_model=Memory, responses=problems.responses())
async def memory(request: Request) -> Response:
    """Slots, bytes, evictions and the codec of the replay memory."""
    return json_answer(views.memory(parts_of(request)))
