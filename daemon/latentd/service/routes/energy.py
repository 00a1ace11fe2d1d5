"""GET /v1/energy: where did the joules go?"""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any, Dict, Optional

from fastapi import APIRouter, Query, Request, Response

from latentd.errors import Unprocessable
from latentd.service import problems, views
from latentd.service.answers import json_answer
from latentd.service.parts import parts_of

router = APIRouter(tags=["state"])


@router.get("/v1/energy", response_model=Dict[str, Any], responses=problems.responses(422))
async def energy(
    request: Request, since: Optional[str] = Query(None, description="RFC 3339, or unix seconds; the last 24 hours can be told apart")
) -> Response:
    """Joules by activity, rail, image and learned sample. Unknown is null, with the reason under `meter`."""
    return json_answer(views.energy(parts_of(request), None if since is None else moment(since)))


def moment(text: str) -> float:
    """Unix seconds of a point in time. Raises Unprocessable."""
    try:
        unix_s = float(text)
    except ValueError:
        try:
            unix_s = _from_iso(text)
        except (ValueError, OverflowError) as cause:
            raise Unprocessable(f"since: {text[:40]!r} is no point in time.", hint="Send RFC 3339 text, or unix seconds.") from cause
    if not 0 <= unix_s < 1e11:
        raise Unprocessable("since: out of range.", hint="Send RFC 3339 text, or unix seconds.")
    return unix_s


def _from_iso(text: str) -> float:
    # A bare + is a space once it went through a query string; Python 3.8 to 3.10 don't know the Z.
    parsed = datetime.fromisoformat(text.strip().replace("Z", "+00:00").replace(" ", "+") if "T" in text else text.strip())
    return (parsed if parsed.tzinfo else parsed.replace(tzinfo=timezone.utc)).timestamp()
