"""The HTTP application of one daemon: its routes, the one shape of its errors, the edge around them."""

from __future__ import annotations

from typing import Any, Dict

from fastapi import FastAPI

from latentd import __version__
from latentd.service import problems
from latentd.service.parts import Parts
from latentd.service.routes import accuracy, classes, classify, energy, health, info, latents, learn, memory, page, samples, status
from latentd.service.schemas import LabelBody, RenameBody
from latentd.service.security import Edge

ROUTES = (classify, learn, latents, samples, classes, status, energy, accuracy, memory, info, health, page)  # the busiest first
DESCRIPTION = (
    "Teach it what images show, ask it what images show; it keeps learning on this device. Every error is an RFC 9457 problem document."
)


def create_app(parts: Parts) -> FastAPI:
    """The application that serves `parts`; it starts and stops nothing itself."""
    app = FastAPI(title="latentd", version=__version__, description=DESCRIPTION, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.parts = parts
    app.state.page = page.load(page.FOLDER)
    for module in ROUTES:
        app.include_router(module.router)
    problems.install(app)
    app.add_middleware(
        Edge,
        allowed_hosts=parts.config.http.allowed_hosts,
        max_connections=parts.config.http.max_connections,
        open_connections=lambda: parts.open_connections(),  # the server that knows is made after the application
        observe=parts.metrics.request,
    )
    _document_bodies(app)
    parts.metrics.watch(parts)
    return app


def _document_bodies(app: FastAPI) -> None:
    """Adds the request bodies that FastAPI does not parse to the schemas of /openapi.json."""
    generate = app.openapi

    def openapi() -> Dict[str, Any]:
        document = generate()
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        for model in (LabelBody, RenameBody):
            schemas.setdefault(model.__name__, model.model_json_schema())
        return document

    setattr(app, "openapi", openapi)  # noqa: B010 - FastAPI's own way to extend the document
