"""GET /v1/status and /v1/learner: how is it doing?"""

from __future__ import annotations

import time

from fastapi import APIRouter, Request, Response

from latentd import __version__
from latentd.service import problems, views
from latentd.service.answers import json_answer, rfc3339
from latentd.service.parts import parts_of
from latentd.service.schemas import Learner, Status

router = APIRouter(tags=["state"])


@router.get("/v1/status", response_model=Status, responses=problems.responses())
async def status(request: Request) -> Response:
    """One page of everything."""
    parts = parts_of(request)
    reason, uptime_s = parts.readiness.why_not(), time.monotonic() - parts.started_on
    view = {
        "latentd": __version__,
        "version": parts.learner.snapshot.version,
        "started_at": rfc3339(time.time() - uptime_s),  # by the clock as it is set now: it may have been wrong at the start
        "uptime_s": uptime_s,
        "readiness": {"ready": reason is None, "reason": reason, "last_success_s": parts.readiness.age_s},
        "classes": len(parts.journal.classes()),
        "samples": parts.journal.status().samples,
        "engine": views.engine(parts.choice),
        "learner": views.learner(parts),
        "accuracy": views.accuracy(parts.learner.accuracy()),
        "energy": views.energy(parts),
        "memory": views.memory(parts),
        "journal": views.journal(parts),
        "queues": {name: {"depth": depth, "capacity": capacity} for name, (depth, capacity) in parts.queues().items()},
        "temperatures_c": dict(parts.temperatures_c()),
        "board": views.board(parts),
        "needs_restart": list(parts.needs_restart),
    }
    return json_answer(view)


@router.get("/v1/learner", response_model=Learner, responses=problems.responses())
async def learner(request: Request) -> Response:
    """The learner: its state, how far it is, and why it last refused to publish."""
    return json_answer(views.learner(parts_of(request)))
