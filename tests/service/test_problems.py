"""One shape of every error, over every route."""

from __future__ import annotations

from typing import Any, Dict, Iterator, List, Tuple

import pytest
from fastapi import FastAPI

from latentd.errors import LatentdError, Overloaded
from latentd.service import problems
from latentd.service.schemas import Problem
from service.fakes import World, assert_problem, picture

METHODS = ["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"]


def routes(app: FastAPI) -> Iterator[Tuple[str, List[str]]]:
    """Every documented path, with something in the place of its parameters, and the methods it takes."""
    for path, operations in app.openapi()["paths"].items():
        yield path.replace("{sample_id}", "s00000001").replace("{name}", "cat"), [method.upper() for method in operations]


def test_every_route_refuses_every_other_method_with_405_and_says_which_it_takes(world: World) -> None:
    tried = 0
    for path, takes in routes(world.app):
        for method in METHODS:
            if method not in takes:
                answer = world.call(method, path)
                problem = assert_problem(answer, 405, "method-not-allowed")
                assert answer.headers["allow"].split(", ") == sorted([*takes, *(["HEAD"] if "GET" in takes else [])])
                assert path in problem["detail"]
                tried += 1
    assert tried > 80


def test_every_post_and_put_route_refuses_every_kind_of_bad_body_with_a_problem(world: World) -> None:
    bodies: List[Dict[str, Any]] = [
        {"content": b"\x00\xff", "headers": {"Content-Type": "application/json"}},
        {"content": b"words", "headers": {"Content-Type": "text/plain"}},
        {"content": b"x" * 100, "headers": {"Content-Type": "multipart/form-data; boundary=y"}},
    ]
    for path, takes in routes(world.app):
        for method in set(takes) & {"POST", "PUT"}:
            for body in bodies:
                answer = world.call(method, path, **body)
                assert answer.status_code in (400, 415, 422), (method, path, body, answer.text)
                Problem.model_validate(answer.json())
                assert answer.headers["content-type"] == problems.PROBLEM_JSON


def test_every_route_turns_a_failure_of_the_parts_into_a_problem(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a route reads a part that fails, the answer is that failure; where it reads none, it still answers."""

    def fails(*_: Any, **__: Any) -> None:
        raise Overloaded("on purpose")

    for name in ("status", "samples", "sample", "forget", "relabel", "put_class", "forget_class", "classes", "admit"):
        monkeypatch.setattr(world.parts.journal, name, fails)
    for name in ("status", "memory", "accuracy"):
        monkeypatch.setattr(world.learner, name, fails)
    for path, takes in routes(world.app):
        for method in takes:
            request: Dict[str, Any] = {"params": {"label": "cat"}, "files": [("image", picture())]} if method == "POST" else {}
            if path.endswith("/label"):
                request = {"json": {"label": "cat"}}
            answer = world.call(method, path, **request)
            if answer.status_code != 200:
                assert_problem(answer, 503, "not-ready" if path == "/readyz" else "overloaded")
                assert answer.headers["retry-after"] == "1"


@pytest.mark.parametrize(
    "path",
    [
        "/nothing",
        "/v1",
        "/v1/",
        "/v2/health/live",
        "/v1/samples/a/b",
        "/v1/../etc",
        "/v1/classify/x",
        "/%00",
        "/docs/x",
        "/page/",
        "/page/../app.py",
        "/page/%2e%2e%2fapp.py",
    ],
)
def test_an_unknown_address_is_a_problem(world: World, path: str) -> None:
    assert_problem(world.call("GET", path), 404, "not-found")


@pytest.mark.parametrize("path", ["/v1/status/", "/livez/", "/docs/", "/v1/samples/"])
def test_a_trailing_slash_is_no_redirect(world: World, path: str) -> None:
    answer = world.call("GET", path)
    assert_problem(answer, 404, "not-found")
    assert "location" not in answer.headers


def test_every_error_class_has_a_slug_of_its_own_and_says_what_to_do() -> None:
    kinds = [kind for kind in problems.all_kinds() if kind.__module__ == "latentd.errors"]
    slugs = [kind.slug for kind in kinds]
    assert len(set(slugs)) == len(slugs) > 20
    for kind in kinds:
        document = problems.document(kind())
        assert 400 <= document["status"] < 600
        assert document["hint"] and document["title"] and document["detail"]


def test_a_problem_repeats_no_more_than_a_little_of_the_request(world: World) -> None:
    answer = world.call("GET", "/" + "x" * 5000)
    assert len(answer.content) < 1000


def test_waiting_is_advised_where_it_helps() -> None:
    assert problems.answer(Overloaded("full", retry_after_s=7)).headers["retry-after"] == "7"
    assert "retry-after" not in problems.answer(LatentdError("a bug")).headers
