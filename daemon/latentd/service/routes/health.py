"""/livez, /readyz and /metrics: for whoever looks after the process."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from latentd.errors import NotReady
from latentd.service import problems
from latentd.service.answers import json_answer
from latentd.service.metrics import CONTENT_TYPE
from latentd.service.parts import parts_of
from latentd.service.schemas import Health

router = APIRouter(tags=["operations"])


@router.get("/livez", response_model=Health, responses=problems.responses())
async def livez() -> Response:
    """The process answers."""
    return json_answer({"status": "ok"})


@router.get("/readyz", response_model=Health, responses=problems.responses(503))
async def readyz(request: Request) -> Response:
    """An image passed the real engine within the last minute."""
    reason = parts_of(request).readiness.why_not()
    if reason is not None:
        raise NotReady(reason)
    return json_answer({"status": "ready"})


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **problems.responses()},
)
async def metrics(request: Request) -> Response:
    """Prometheus metrics."""
    return Response(parts_of(request).metrics.text(), headers={"Content-Type": CONTENT_TYPE})
