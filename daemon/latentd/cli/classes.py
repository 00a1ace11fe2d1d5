"""`latentd classes`: what the daemon can tell apart, and how well."""

from __future__ import annotations

from typing import Any, Dict, Optional
from urllib.parse import quote

import typer

from latentd.cli.figures import score
from latentd.cli.terminal import JSON, URL, connect, note, print_json, say, show, table, verb

app = typer.Typer(help="List, create and rename classes.", invoke_without_command=True)

NAME = typer.Argument(..., metavar="NAME", help="The class.", show_default=False)


@app.callback()
@verb
def classes(context: typer.Context, url: Optional[str] = URL, as_json: bool = JSON) -> None:
    """List the classes."""
    if context.invoked_subcommand is None:
        _list(url, as_json)


@app.command("list")
@verb
def list_classes(url: Optional[str] = URL, as_json: bool = JSON) -> None:
    """List the classes with their counts and accuracy."""
    _list(url, as_json)


@app.command("create")
@verb
def create(name: str = NAME, url: Optional[str] = URL, as_json: bool = JSON) -> None:
    """Create a class before anything is taught under it."""
    _put(name, {}, f"{name} is there.", url, as_json)


@app.command("rename")
@verb
def rename(
    name: str = NAME,
    new_name: str = typer.Argument(..., metavar="NEW", help="Its new name.", show_default=False),
    url: Optional[str] = URL,
    as_json: bool = JSON,
) -> None:
    """Rename a class; all that was taught stays."""
    _put(name, {"rename_to": new_name}, f"{name} is now called {new_name}.", url, as_json)


def _put(name: str, body: Dict[str, Any], done: str, url: Optional[str], as_json: bool) -> None:
    with connect(url) as client:
        found = client.send("PUT", f"/v1/classes/{quote(name, safe='')}", json=body).body
    if as_json:
        print_json(found)
    else:
        say(done)


def _list(url: Optional[str], as_json: bool) -> None:
    with connect(url) as client:
        found = client.get("/v1/classes")
    if as_json:
        print_json(found)
    elif found["classes"]:
        rows = [
            [
                each["name"],
                each["samples"],
                each["holdout"],
                each["stored"],
                score(each.get("prequential")),
                score(each.get("holdout_accuracy")),
            ]
            for each in found["classes"]
        ]
        headings = ["class", "samples", "hold-out", "kept", "right before learning", "right on hold-out"]
        show(table(headings, rows, right=(1, 2, 3)))
    else:
        note("No classes yet; `latentd learn --label NAME FILE` teaches the first one.")
