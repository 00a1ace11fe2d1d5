"""What a verb prints with, and the border where an error becomes a sentence and an exit code.

Answers go to stdout (tables for people, one JSON object with --json), everything else to stderr. Colours and live displays only on a
terminal. Class and file names come from users: they are printed as text, never as markup, and without control characters.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from typing import Any, Callable, Dict, Iterable, Optional, Sequence, TypeVar, cast

import typer
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from latentd import config
from latentd.cli.client import UNIX, Client, Refused, address
from latentd.errors import LatentdError, Unreachable

OK, FAILED, USAGE, UNREACHABLE, REFUSED, INTERRUPTED = 0, 1, 2, 3, 4, 130
WIDE = 4096  # columns where nobody looks: a pipe must get whole names

URL = typer.Option(None, "--url", help="Where the daemon listens, e.g. http://127.0.0.1:8420.", show_default="from the configuration")
JSON = typer.Option(False, "--json", help="Print one JSON object.")

Verb = TypeVar("Verb", bound=Callable[..., None])


def console(stderr: bool = False) -> Console:
    """A console on stdout or stderr as they are now; as wide as the terminal, or wide enough for anything when it is none."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(file=stream, width=None if stream.isatty() else WIDE, markup=False, emoji=False, highlight=False)


def verb(function: Verb) -> Verb:
    """Wraps a command: what it raises is printed as title, detail and hint, and decides the exit code."""

    @functools.wraps(function)
    def bordered(**arguments: Any) -> None:
        try:
            function(**arguments)
        except LatentdError as error:
            complain(error)
            if arguments.get("as_json"):
                print_json({"problem": problem(error)})
            raise typer.Exit(exit_code(error)) from error
        except KeyboardInterrupt as stop:
            raise typer.Exit(INTERRUPTED) from stop

    return cast(Verb, bordered)


def exit_code(error: LatentdError) -> int:
    """3 nobody answered; 4 the daemon refused; 1 it or we failed."""
    if isinstance(error, Unreachable):
        return UNREACHABLE
    return REFUSED if isinstance(error, Refused) and error.status != 500 else FAILED


def problem(error: LatentdError) -> Dict[str, Any]:
    """The problem document: the daemon's own, or one of the same shape."""
    if isinstance(error, Refused):
        return error.problem
    return {"title": error.title, "code": error.slug, "detail": error.detail, "hint": error.hint}


def complain(error: LatentdError) -> None:
    """Title, detail and hint on stderr."""
    found = problem(error)
    screen = console(stderr=True)
    screen.print(Text(plain(found.get("title") or "latentd refused"), style="bold red"))
    for part in (found.get("detail"), found.get("hint")):
        if part and part != found.get("title"):
            screen.print(Text(f"  {plain(part)}"))


def note(sentence: str) -> None:
    """A line for the person at the terminal, on stderr, so that stdout stays the answer."""
    console(stderr=True).print(Text(plain(sentence)))


def show(answer: RenderableType) -> None:
    """A table on stdout; without the blanks at the ends of its lines where a program reads it."""
    screen = console()
    if screen.is_terminal:
        screen.print(answer)
        return
    with screen.capture() as text:
        screen.print(answer)
    sys.stdout.write("".join(f"{line.rstrip()}\n" for line in text.get().splitlines()))


def say(sentence: str) -> None:
    """A sentence of the answer, on stdout."""
    show(Text(plain(sentence)))


def print_json(value: Any) -> None:
    """One JSON document on stdout; ASCII, so that any encoding and any file name survive."""
    print(json.dumps(value, indent=2 if sys.stdout.isatty() else None), flush=True)


def table(headings: Sequence[str], rows: Iterable[Sequence[Any]], right: Iterable[int] = ()) -> Table:
    """A plain table; `right` are the columns of figures."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for column, heading in enumerate(headings):
        made.add_column(heading, justify="right" if column in set(right) else "left", overflow="fold")
    for row in rows:
        made.add_row(*(cell if isinstance(cell, Text) else Text(plain(cell)) for cell in row))
    return made


def plain(value: Any) -> str:
    """Text that can't move the cursor or break an encoding: control characters and undecodable bytes are shown escaped; None is a dash."""
    if value is None:
        return "-"
    text = str(value).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(char if char.isprintable() or char == "\n" else repr(char)[1:-1] for char in text)


def connect(url: Optional[str]) -> Client:
    """The daemon at --url, or where the configuration says."""
    if url is None:
        return Client(address(config.load(os.environ, {})))
    if "://" not in url and not url.startswith(UNIX):
        url = f"http://{url}"
    if not url.startswith(("http://", "https://", UNIX)):
        raise typer.BadParameter(f"{url} is neither an http address nor unix: and a path", param_hint="--url")
    return Client(url)
