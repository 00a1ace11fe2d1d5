"""GET /v1/info: what is this, and what does it accept?"""

from __future__ import annotations

import functools
import platform
from pathlib import Path
from typing import Any, Dict, Optional

from fastapi import APIRouter, Request, Response

from latentd import __version__
from latentd.config import as_table, rows
from latentd.service import problems, views
from latentd.service.answers import json_answer
from latentd.service.bodies import MEDIA_TYPES
from latentd.service.parts import Parts, parts_of
from latentd.service.schemas import Info, Limits

router = APIRouter(tags=["state"])

BOARD_FILE = Path("/proc/device-tree/model")


@router.get("/v1/info", response_model=Info, responses=problems.responses())
async def info(request: Request) -> Response:
    """Limits, engines, board, and the effective configuration with the origin of every value."""
    parts = parts_of(request)
    view = {
        "latentd": __version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "board": board(BOARD_FILE),
        "power_mode": parts.board().power_mode,
        "media_types": list(MEDIA_TYPES),
        "limits": {name: getattr(parts.config.http, name) for name in Limits.model_fields},
        "engine": views.engine(parts.choice),
        "config": _settings(parts),
    }
    return json_answer(view)


@functools.lru_cache(maxsize=1)
def board(file: Path) -> Optional[str]:
    """The board's name from the device tree, read once; None where there is none, as on a PC."""
    try:
        return file.read_bytes().rstrip(b"\0").decode("utf-8", "replace")
    except OSError:
        return None


def _settings(parts: Parts) -> Dict[str, Any]:
    values = as_table(parts.config)
    return {
        row.key: {"value": values[row.key], "origin": parts.config.origins.get(row.key, "default"), "unit": row.unit, "help": row.help}
        for row in rows()
    }
