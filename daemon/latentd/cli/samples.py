"""`latentd samples`, `label` and `forget`: look at what was taught, correct it, take it back."""

from __future__ import annotations

import sys
from typing import Any, Dict, List, Optional
from urllib.parse import quote

import typer

from latentd.cli.terminal import JSON, URL, connect, note, print_json, say, show, table, verb

app = typer.Typer(help="List and show what was taught.", invoke_without_command=True)

OF_CLASS = typer.Option(None, "--label", "-l", help="Only this class.", show_default=False)
STATE = typer.Option(
    None, "--state", help="Only these: queued, learned, duplicate, rejected, evicted, held, forgotten.", show_default=False
)
DOUBTED = typer.Option(False, "--doubted", help="Only those whose label looks wrong.")
LIMIT = typer.Option(50, "--limit", min=1, max=1000, help="At most this many.")
CURSOR = typer.Option(None, "--cursor", help="Go on where the last list ended.", show_default=False)
SAMPLE = typer.Argument(..., metavar="SAMPLE", help="A sample's id, such as s0000042.", show_default=False)


@app.callback()
@verb
def samples(
    context: typer.Context,
    label: Optional[str] = OF_CLASS,
    state: Optional[str] = STATE,
    doubted: bool = DOUBTED,
    limit: int = LIMIT,
    cursor: Optional[str] = CURSOR,
    url: Optional[str] = URL,
    as_json: bool = JSON,
) -> None:
    """List what was taught."""
    if context.invoked_subcommand is None:
        _list(label, state, doubted, limit, cursor, url, as_json)


@app.command("list")
@verb
def list_samples(
    label: Optional[str] = OF_CLASS,
    state: Optional[str] = STATE,
    doubted: bool = DOUBTED,
    limit: int = LIMIT,
    cursor: Optional[str] = CURSOR,
    url: Optional[str] = URL,
    as_json: bool = JSON,
) -> None:
    """List what was taught, newest last."""
    _list(label, state, doubted, limit, cursor, url, as_json)


@app.command("show")
@verb
def show_sample(sample: str = SAMPLE, url: Optional[str] = URL, as_json: bool = JSON) -> None:
    """Show one sample."""
    with connect(url) as client:
        found = client.get(_path(sample))
    _present([found], found, as_json)


@verb
def label(
    sample: str = SAMPLE,
    name: str = typer.Argument(..., metavar="NAME", help="The right class.", show_default=False),
    url: Optional[str] = URL,
    as_json: bool = JSON,
) -> None:
    """Correct the class of a sample, or name one that was kept unnamed."""
    with connect(url) as client:
        found = client.send("PUT", f"{_path(sample)}/label", json={"label": name}).body
    _present([found], found, as_json)


@verb
def forget(
    sample: Optional[str] = typer.Argument(None, metavar="SAMPLE", help="A sample's id, such as s0000042.", show_default=False),
    of_class: Optional[str] = typer.Option(None, "--class", help="Forget this whole class.", show_default=False),
    yes: bool = typer.Option(False, "--yes", "-y", help="Do not ask before a class is forgotten."),
    url: Optional[str] = URL,
    as_json: bool = JSON,
) -> None:
    """Forget a sample or a whole class: off the disk and out of the model. It can't be undone."""
    if (sample is None) == (of_class is None):
        raise typer.BadParameter("name a SAMPLE or a --class, one of the two")
    if of_class is not None and not yes and not _sure(of_class):
        raise typer.Exit(1)
    with connect(url) as client:
        path = _path(sample) if sample is not None else f"/v1/classes/{quote(of_class or '', safe='')}"
        found = client.send("DELETE", path).body
    if as_json:
        print_json(found)
    else:
        say(f"{sample or of_class} is forgotten.")


def _sure(name: str) -> bool:
    if not sys.stdin.isatty():
        raise typer.BadParameter("forgetting a whole class needs --yes where nobody can be asked")
    return typer.confirm(f"Forget everything about {name}? It can't be undone.", err=True)


def _path(sample: str) -> str:
    return f"/v1/samples/{quote(sample, safe='')}"


def _list(
    label: Optional[str], state: Optional[str], doubted: bool, limit: int, cursor: Optional[str], url: Optional[str], as_json: bool
) -> None:
    with connect(url) as client:
        asked = {"label": label, "state": state, "doubted": doubted or None}
        page = client.get("/v1/samples", **asked, limit=limit, cursor=cursor)
        while page["next"] and len(page["samples"]) < limit:  # so far it looked, and found few
            more = client.get("/v1/samples", **asked, limit=limit - len(page["samples"]), cursor=page["next"])
            page = {"samples": [*page["samples"], *more["samples"]], "next": more["next"]}
    _present(page["samples"], page, as_json)
    if page["next"] and not as_json:
        note(f"There are more: add --cursor {page['next']}")


def _present(found: List[Dict[str, Any]], document: Dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(document)
    elif found:
        rows = [[each["sample_id"], each["label"], _state(each), each["taught_at"], _mark(each)] for each in found]
        show(table(["sample", "class", "state", "taught at", ""], rows))
    else:
        note("No such samples.")


def _mark(sample: Dict[str, Any]) -> str:
    return "hold-out" if sample["holdout"] else "its label looks wrong" if sample["doubted"] else ""


def _state(sample: Dict[str, Any]) -> str:
    return f"duplicate of {sample['duplicate_of']}" if sample["duplicate_of"] else str(sample["state"])
