"""/docs: the OpenAPI document as one plain page that needs no script and no other host."""

from __future__ import annotations

import json
from html import escape
from typing import Any, Dict, Iterator, Mapping

from latentd.service.problems import all_kinds

STYLE = """\
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1b1b1f; background: #fff; }
h2 { margin: 2.5rem 0 .5rem; font-size: 1.1rem; }
h2 code { background: none; }
code { background: #f0f0f3; padding: .1em .3em; border-radius: .2em; }
table { border-collapse: collapse; width: 100%; margin: .5rem 0; }
th, td { text-align: left; vertical-align: top; padding: .3rem .6rem .3rem 0; border-bottom: 1px solid #ddd; }
th { font-weight: 600; }
details { margin: .5rem 0; }
pre { overflow: auto; background: #f0f0f3; padding: .8rem; }
@media (prefers-color-scheme: dark) {
  body { color: #e6e6ea; background: #16161a; }
  code, pre { background: #26262c; }
  th, td { border-color: #3a3a42; }
}
"""


def render(openapi: Mapping[str, Any]) -> str:
    """The whole page. `openapi` is the document at /openapi.json."""
    return "".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
            '<title>latentd: HTTP interface</title><link rel="stylesheet" href="/docs.css"></head><body>',
            f"<h1>latentd {escape(openapi['info']['version'])}</h1><p>{escape(openapi['info']['description'])} ",
            'For programs: <a href="/openapi.json">/openapi.json</a>. The page for people: <a href="/">/</a>.</p>',
            *(
                part
                for path, methods in openapi["paths"].items()
                for method, about in methods.items()
                for part in _operation(method, path, about)
            ),
            *_problems(),
            *_schemas(openapi["components"]["schemas"]),
            "</body></html>",
        ]
    )


def _operation(method: str, path: str, about: Mapping[str, Any]) -> Iterator[str]:
    yield f"<h2><code>{escape(method.upper())} {escape(path)}</code></h2><p>{_prose(about.get('description', ''))}</p>"
    rows = [
        (parameter["name"], parameter["in"], _limits(parameter["schema"]), parameter.get("description", ""))
        for parameter in about.get("parameters", [])
    ]
    if rows:
        yield _table(("parameter", "in", "values", ""), rows)
    bodies = about.get("requestBody", {}).get("content", {})
    if bodies:
        yield "<p>Body: " + ", ".join(f"<code>{escape(kind)}</code>" for kind in bodies) + "</p>"
    yield _table(("status", "means"), [(status, answer.get("description", "")) for status, answer in about["responses"].items()])


def _limits(schema: Mapping[str, Any]) -> str:
    """A parameter's schema in a few words."""
    options = [option for option in schema.get("anyOf", [schema]) if option.get("type") != "null"]
    chosen: Mapping[str, Any] = options[0] if options else {}
    words = [" | ".join(map(str, chosen["enum"]))] if "enum" in chosen else [str(chosen.get("const", chosen.get("type", "")))]
    if "minimum" in chosen and "maximum" in chosen:
        words.append(f"{chosen['minimum']} to {chosen['maximum']}")
    if schema.get("default") is not None:
        words.append(f"default {schema['default']}")
    return ", ".join(words)


def _problems() -> Iterator[str]:
    yield "<h1>Problems</h1><p>Every error is <code>application/problem+json</code> with a stable <code>code</code>.</p><table>"
    yield "<tr><th>code</th><th>status</th><th>title</th><th>what to do</th></tr>"
    for kind in all_kinds():
        cells = (f"<code>{kind.slug}</code>", str(kind.http_status), escape(kind.title), escape(kind.default_hint))
        yield f'<tr id="problem-{kind.slug}">' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
    yield "</table>"


def _schemas(schemas: Mapping[str, Dict[str, Any]]) -> Iterator[str]:
    yield "<h1>Shapes</h1>"
    for name, schema in sorted(schemas.items()):
        text = escape(json.dumps(schema, indent=2, ensure_ascii=False))
        yield f'<details id="{escape(name)}"><summary><code>{escape(name)}</code></summary><pre>{text}</pre></details>'


def _table(headings: tuple[str, ...], rows: list[Any]) -> str:
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    body = "".join("<tr>" + "".join(f"<td>{_prose(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _prose(text: str) -> str:
    """Text with its `code` marked up."""
    parts = escape(text).split("`")
    return "".join(f"<code>{part}</code>" if index % 2 else part for index, part in enumerate(parts))
