from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Dict, List, Tuple

import pytest

from latentd.service.problems import all_kinds
from latentd.service.routes import page
from service.fakes import World, assert_problem


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: List[Tuple[str, Dict[str, Any]]] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.found.append((tag, dict(attrs)))


def test_the_page_and_its_files_come_from_the_package(world: World, tmp_path: Path) -> None:
    for name, content in {"index.html": "<h1>hi</h1>", "app.js": "1", "app.css": "a{}", "notes.txt": "no"}.items():
        (tmp_path / name).write_text(content)
    world.app.state.page = page.load(tmp_path)
    assert (world.call("GET", "/").text, world.call("GET", "/").headers["content-type"]) == ("<h1>hi</h1>", "text/html; charset=utf-8")
    assert world.call("GET", "/page/app.js").headers["content-type"] == "text/javascript; charset=utf-8"
    assert world.call("GET", "/page/app.css").headers["content-type"] == "text/css; charset=utf-8"
    assert world.call("HEAD", "/page/app.js").content == b""


@pytest.mark.parametrize("name", ["absent.js", "%2e%2e", "..%2fapp.py", "__init__.py", "notes.txt"])
def test_no_other_file_can_be_named(world: World, name: str) -> None:
    assert_problem(world.call("GET", f"/page/{name}"), 404, "not-found")


def test_the_docs_need_no_script_and_no_other_host(world: World) -> None:
    html = world.call("GET", "/docs").text
    tags = Tags()
    tags.feed(html)
    assert not {tag for tag, _ in tags.found} & {"script", "iframe", "img", "style"}
    links = [attributes[name] for _, attributes in tags.found for name in ("href", "src") if name in attributes]
    assert links and all(link.startswith("/") and not link.startswith("//") for link in links)
    assert not any(name.startswith("on") or name == "style" for _, attributes in tags.found for name in attributes)
    assert world.call("GET", "/docs.css").headers["content-type"] == "text/css; charset=utf-8"


def test_the_docs_name_every_route_and_every_problem(world: World) -> None:
    html = world.call("GET", "/docs").text
    for path, operations in world.app.openapi()["paths"].items():
        for method in operations:
            assert f"{method.upper()} {path}" in html
    for kind in all_kinds():
        assert f'id="problem-{kind.slug}"' in html


def test_a_problem_points_at_its_entry_in_the_docs(world: World) -> None:
    target = world.call("GET", "/nothing").json()["type"]
    path, _, anchor = target.partition("#")
    assert f'id="{anchor}"' in world.call("GET", path).text


def test_openapi_refers_only_to_shapes_that_it_has(world: World) -> None:
    document = world.call("GET", "/openapi.json")
    schemas = document.json()["components"]["schemas"]
    references = set(re.findall(r'"\$ref": ?"#/components/schemas/([^"]+)"', document.text))
    assert "Problem" in references
    assert references <= set(schemas)
    assert "HTTPValidationError" not in schemas


def test_openapi_documents_bodies_and_problems_of_every_image_route(world: World) -> None:
    paths = world.app.openapi()["paths"]
    for path in ("/v1/classify", "/v1/learn", "/v1/latents"):
        operation = paths[path]["post"]
        assert set(operation["requestBody"]["content"]) >= {"image/jpeg", "multipart/form-data", "application/json"}
        assert {"400", "408", "413", "415", "422", "503"} <= set(operation["responses"])
        assert "application/problem+json" in operation["responses"]["422"]["content"]
    for operations in paths.values():
        for operation in operations.values():
            assert "application/problem+json" in operation["responses"]["default"]["content"]
            assert operation["description"]
