"""Small pieces that every answer is made of: JSON bytes, times, Server-Timing.

Runs on the event loop, on the hot path: no validation, one C call to encode.
"""

from __future__ import annotations

import json
from datetime import datetime, timezone
from typing import Any, Dict, Mapping, Optional

from starlette.requests import Request
from starlette.responses import Response

# NaN is not JSON: an answer that holds one is a bug and must not leave the process.
_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


def json_bytes(payload: Any) -> bytes:
    return _encode(payload).encode("utf-8")


def json_answer(payload: Any, status: int = 200, headers: Optional[Mapping[str, str]] = None) -> Response:
    return Response(json_bytes(payload), status, dict(headers or {}), "application/json")


def request_id(request: Request) -> str:
    """The id that the Edge middleware gave this request (and the X-Request-Id header of the answer)."""
    return str(request.scope.get("request_id", ""))


def rfc3339(unix_s: float) -> str:
    """Unix seconds as UTC text, to the millisecond."""
    return datetime.fromtimestamp(unix_s, timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def server_timing(durations_s: Mapping[str, float]) -> Dict[str, str]:
    """The Server-Timing header; the durations are in seconds, the header's unit is milliseconds."""
    return {"Server-Timing": ", ".join(f"{name};dur={1000 * duration_s:.2f}" for name, duration_s in durations_s.items())}
