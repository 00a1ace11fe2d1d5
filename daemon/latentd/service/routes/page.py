"""The page at /, its files, and /docs; all from the package, nothing from elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Dict, NamedTuple

from fastapi import APIRouter, Request, Response

from latentd.errors import NotFound
from latentd.service import docs_page

router = APIRouter(include_in_schema=False)

FOLDER = Path(__file__).parent.parent / "page"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".ico": "image/x-icon",
    ".webmanifest": "application/manifest+json",
    ".woff2": "font/woff2",
}


class StaticFile(NamedTuple):
    content: bytes
    media_type: str


def load(folder: Path) -> Dict[str, StaticFile]:
    """Every file of the page, by name; read once, so that a request can name only these."""
    return {path.name: StaticFile(path.read_bytes(), TYPES[path.suffix]) for path in sorted(folder.iterdir()) if path.suffix in TYPES}


def _answer(request: Request, name: str) -> Response:
    file = request.app.state.page.get(name)
    if file is None:
        raise NotFound(f"The page has no file {name[:80]!r}.")
    return Response(file.content, headers={"Content-Type": file.media_type})


@router.get("/")
async def page(request: Request) -> Response:
    return _answer(request, "index.html")


@router.get("/page/{name}")
async def page_file(request: Request, name: str) -> Response:
    return _answer(request, name)


@router.get("/docs")
async def docs(request: Request) -> Response:
    return Response(docs_page.render(request.app.openapi()), headers={"Content-Type": TYPES[".html"]})


@router.get("/docs.css")
async def docs_style() -> Response:
    return Response(docs_page.STYLE, headers={"Content-Type": TYPES[".css"]})
