"""Problem documents (RFC 9457): the one shape of every error, whoever raised it.

Runs on the event loop. Expected failures are LatentdError; the framework's own (unknown route, wrong method, bad parameter) are turned into
them here, and anything else is a bug: logged with its traceback, answered as 500.
"""

from __future__ import annotations

import logging
from typing import Any, Dict, List, Mapping, Optional, Tuple, Type

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import Scope

from latentd.errors import (
    BadRequest,
    LatentdError,
    MethodNotAllowed,
    NotFound,
    OutOfMemory,
    TooLarge,
    Unprocessable,
    UnsupportedMedia,
)
from latentd.service.answers import json_bytes, request_id
from latentd.service.schemas import Problem
from latentd.trouble import is_shortage

PROBLEM_JSON = "application/problem+json"
METHODS = ("DELETE", "GET", "PATCH", "POST", "PUT")
LONGEST_ECHO = 200  # characters of the request that a detail repeats at most

log = logging.getLogger(__name__)

_BY_STATUS: Dict[int, Type[LatentdError]] = {400: BadRequest, 404: NotFound, 413: TooLarge, 415: UnsupportedMedia, 422: Unprocessable}


def document(error: LatentdError, request: Optional[str] = None) -> Dict[str, Any]:
    """The problem document of `error`; `request` is the request id."""
    problem: Dict[str, Any] = {
        "type": f"/docs#problem-{error.slug}",
        "title": error.title,
        "status": error.http_status,
        "code": error.slug,
        "detail": error.detail,
        "hint": error.hint,
    }
    if request:
        problem["request_id"] = request
    return problem


def answer(error: LatentdError, request: Optional[str] = None, headers: Optional[Mapping[str, str]] = None) -> Response:
    """The whole answer that `error` makes, with Retry-After where waiting helps."""
    extra = dict(headers or {})
    if error.retry_after_s is not None:
        extra["Retry-After"] = str(error.retry_after_s)
    return Response(json_bytes(document(error, request)), error.http_status, extra, PROBLEM_JSON)


def unexpected(error: BaseException, request: Optional[str]) -> LatentdError:
    """The problem of a bug, or of a device without memory, which is none; the traceback goes to the log, not to the client."""
    log.error("request %s failed", request, exc_info=error)
    if is_shortage(error):
        return OutOfMemory("There was not enough memory for this request.")
    return LatentdError(f"Something in latentd broke while it served request {request}.")


def first_problem(found: List[LatentdError]) -> LatentdError:
    """The one problem that a request answers with when none of its images can be used: theirs if they agree, else 422."""
    if all(type(error) is type(found[0]) for error in found):
        return found[0]
    return Unprocessable(
        "None of the images can be used: " + " ".join(f"({index + 1}) {error.detail}" for index, error in enumerate(found))
    )


def install(app: FastAPI) -> None:
    """Registers the handlers of `app`."""
    app.add_exception_handler(LatentdError, _on_latentd_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(RequestValidationError, _on_bad_parameter)


def responses(*statuses: int) -> Dict[Any, Dict[str, Any]]:
    """The OpenAPI entries of these statuses, and of every other one, as problem documents."""
    content = {"content": {PROBLEM_JSON: {"schema": {"$ref": "#/components/schemas/Problem"}}}}
    texts = {str(status): {"description": describe(status), **content} for status in statuses}
    return {**texts, "default": {"description": "Any other error", "model": Problem, **content}}


def describe(status: int) -> str:
    """What a status can mean: the codes and titles of every error that answers with it."""
    kinds = [kind for kind in all_kinds() if kind.http_status == status]
    return "; ".join(f"`{kind.slug}`: {kind.title}" for kind in kinds)


def all_kinds() -> List[Type[LatentdError]]:
    """Every error class, parents first."""

    def below(kind: Type[LatentdError]) -> List[Type[LatentdError]]:
        return [kind, *(found for child in kind.__subclasses__() for found in below(child))]

    return below(LatentdError)


async def _on_latentd_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, LatentdError), "registered for LatentdError only"
    return answer(error, request_id(request))


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException), "registered for HTTPException only"
    path = request.scope["path"][:LONGEST_ECHO]
    if error.status_code == 405:
        allow = ", ".join(allowed_methods(request.scope))
        refused = MethodNotAllowed(f"{path} takes {allow}, not {request.scope['method'][:20]}.")
        return answer(refused, request_id(request), {"Allow": allow})
    kind = _BY_STATUS.get(error.status_code, BadRequest)
    detail = f"There is nothing at {path}." if kind is NotFound else str(error.detail)
    return answer(kind(detail), request_id(request))


async def _on_bad_parameter(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError), "registered for RequestValidationError only"
    return answer(Unprocessable("; ".join(_parameter(found) for found in error.errors())), request_id(request))


def _parameter(found: Mapping[str, Any]) -> str:
    where: Tuple[Any, ...] = tuple(found.get("loc", ()))
    return f"{where[-1] if where else 'request'}: {found.get('msg', 'not valid')}"


def allowed_methods(scope: Scope) -> List[str]:
    """Every method that some route takes at this path; HEAD goes with GET."""
    routes = scope["app"].router.routes
    found = []
    for method in METHODS:
        tried = {**scope, "method": method}
        if any(route.matches(tried)[0] is Match.FULL for route in routes):
            found.append(method)
    return sorted([*found, "HEAD"]) if "GET" in found else found
