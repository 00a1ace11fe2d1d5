"""`latentd status`: everything about the daemon on one page, once or again and again."""

from __future__ import annotations

import sys
import time
from typing import Any, Dict, List, Optional, Tuple

import typer
from rich.console import RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from latentd.cli.client import Client
from latentd.cli.figures import duration, joules, score, size
from latentd.cli.terminal import JSON, URL, connect, console, plain, print_json, show, verb
from latentd.errors import Unreachable

EVERY_S = 2.0

WATCH = typer.Option(False, "--watch", "-w", help=f"Show it again every {EVERY_S:g} seconds, until Ctrl-C.")


@verb
def status(watch: bool = WATCH, url: Optional[str] = URL, as_json: bool = JSON) -> None:
    """Show how the daemon is doing."""
    with connect(url) as client:
        if watch and not as_json and sys.stdout.isatty():
            _watch_screen(client)
        while True:
            found = client.get("/v1/status")
            if as_json:
                print_json(found)
            else:
                show(page(found))
            if not watch:
                return
            time.sleep(EVERY_S)


def _watch_screen(client: Client) -> None:
    """Redraws in place, until Ctrl-C. A daemon that went away is shown as such and asked again."""
    screen = console()
    with Live(console=screen, auto_refresh=False, transient=False) as live:
        while True:
            try:
                shown: RenderableType = page(client.get("/v1/status"))
            except Unreachable as gone:
                shown = Text(f"{gone.title} ({gone.detail} Asking again every {EVERY_S:g} s.)", style="bold red")
            live.update(shown, refresh=True)
            time.sleep(EVERY_S)


def page(found: Dict[str, Any]) -> Table:
    """GET /v1/status as a page: a heading and a sentence a line."""
    made = Table.grid(padding=(0, 2, 0, 0))
    made.add_column(style="dim", no_wrap=True)
    made.add_column(overflow="fold")
    for heading, sentence in _lines(found):
        made.add_row(heading, Text(plain(sentence)))
    return made


def _lines(found: Dict[str, Any]) -> List[Tuple[str, str]]:
    ready = found["readiness"]
    state = "ready" if ready["ready"] else f"not ready: {ready['reason']}"
    return [
        ("latentd", f"{found['latentd']}, {state}, up {duration(found['uptime_s'])}"),
        ("knows", f"{found['classes']} classes from {found['samples']} samples; version {found['version']}"),
        *_engine(found["engine"]),
        ("learner", _learner(found["learner"])),
        ("accuracy", f"hold-out {score(found['accuracy']['holdout'])}; before learning {score(found['accuracy']['prequential_recent'])}"),
        ("energy", energy(found["energy"])),
        ("memory", memory(found["memory"])),
        ("", plan(found["memory"]["plan"])),
        ("journal", _journal(found["journal"])),
        ("queues", ", ".join(f"{name} {_fill(name, queue)}" for name, queue in found["queues"].items())),
        (
            "temperature",
            ", ".join(f"{name} {value:.0f} °C" for name, value in found["temperatures_c"].items() if value is not None) or "unavailable",
        ),
        *_board(found["board"]),
        *([("restart", f"needed for {', '.join(found['needs_restart'])}")] if found["needs_restart"] else []),
    ]


def _fill(name: str, queue: Dict[str, int]) -> str:
    depth, capacity = queue["depth"], queue["capacity"]
    return f"{size(depth)} of {size(capacity)}" if name.endswith("_bytes") else f"{depth} of {capacity}"


def _engine(engine: Dict[str, Any]) -> List[Tuple[str, str]]:
    features = f"{engine['class_tokens']} x {engine['width']} features"
    backbone = f"{engine['backbone']['name']}, {engine['image_size']} px, split after block {engine['split']}, {features}"
    others = [("", f"{tried['engine']} {tried['state']}: {tried['reason']}") for tried in engine["attempts"] if tried["state"] != "serving"]
    return [("backbone", backbone), ("engine", engine["name"]), *others]


def _learner(learner: Dict[str, Any]) -> str:
    waiting = f", {learner['lag_samples']} samples waiting ({duration(learner['lag_s'])})" if learner["lag_samples"] else ""
    reason = f": {learner['reason']}" if learner["reason"] else ""
    rejected = f"; last version not published: {learner['last_publish_rejected']}" if learner["last_publish_rejected"] else ""
    return f"{learner['state']}{reason}{waiting}, {learner['steps']} steps{rejected}"


def energy(found: Dict[str, Any]) -> str:
    """The meter and the most telling figures of GET /v1/energy in one sentence."""
    meter = found["meter"]
    if meter["reason"] is not None:
        return f"unavailable: {meter['reason']}"
    power = "" if meter["power_w"] is None else f"{meter['power_w']:.1f} W now, "
    each = found["activities"]["classify"]["per_item_j"]
    sentence = f"{power}{joules(found['energy_j'])} so far, {joules(each)} an image ({found['quality']}, {found['source']})"
    return f"{sentence}{_battery(found.get('battery'))}"


def _battery(found: Optional[Dict[str, Any]]) -> str:
    if found is None or found["hours_left"] is None:
        return ""
    charge = "" if found["charge_ratio"] is not None else ", were the battery full"
    return f"; {found['hours_left']:.1f} h left at this rate of learning ({found['samples_per_hour']:.0f} samples an hour{charge})"


def memory(found: Dict[str, Any]) -> str:
    tokens = found.get("tokens")  # a daemon of an older version tells of none
    whole = "" if tokens is None else f"; tokens of {tokens['used']}, {size(tokens['used_bytes'])} of {size(tokens['budget_bytes'])}"
    return (
        f"{found['used']} of {found['slots']} latents, {size(found['used_bytes'])} of {size(found['budget_bytes'])} as {found['codec']}, "
        f"{found['evictions']} evicted{whole}"
    )


def plan(found: Dict[str, Any]) -> str:
    """What latentd takes at most, and whether there is as much."""
    now = f"{size(found['resident_bytes'])} used now, {size(found['available_bytes'])} available ({found['bounded_by']})"
    short = "; at its worst moment latentd does not fit" if found["fits"] is False else ""
    return f"planned {size(found['planned_bytes'])} in all, {now}{short}"


def _board(found: Dict[str, Any]) -> List[Tuple[str, str]]:
    """Power mode and clocks, where there are any; and what is held back."""
    clocks = [f"{unit} {clock['now_hz'] / 1e6:.0f} MHz" for unit, clock in found["clocks"].items() if clock["now_hz"] is not None]
    shown = [part for part in (found["power_mode"], *clocks) if part]
    held = "; ".join(f"{cause}: {', '.join(what)}" for cause, what in found["throttled"].items() if what)
    return [*([("board", ", ".join(shown))] if shown else []), *([("throttled", held)] if held else [])]


def _journal(found: Dict[str, Any]) -> str:
    fill = f"{size(found['size_bytes'])} of {size(found['budget_bytes'])}"
    aside = f"; {found['set_aside']} damaged rows were set aside, the daemon's log says what was lost" if found["set_aside"] else ""
    return f"failed: {found['failed']}" if found["failed"] else f"{fill}{aside}"
