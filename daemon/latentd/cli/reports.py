"""`latentd accuracy`, `energy` and `memory`: the parts of the status, in full."""

from __future__ import annotations

import re
from datetime import datetime, timedelta, timezone
from typing import Any, Dict, List, Optional

import typer
from rich.console import Group

from latentd.cli import status
from latentd.cli.figures import duration, joules, score, size
from latentd.cli.terminal import JSON, URL, connect, note, print_json, say, show, table, verb

CONFUSION = typer.Option(False, "--confusion", help="Also show which classes are taken for which.")
SINCE = typer.Option(None, "--since", help="From then on: 30m, 12h or 2d ago, or a time such as 2026-05-03T08:00.", show_default="all")

AGO = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


@verb
def accuracy(confusion: bool = CONFUSION, url: Optional[str] = URL, as_json: bool = JSON) -> None:
    """Show how often it is right, with the 95 % interval and the number of images it was measured on."""
    with connect(url) as client:
        found = client.get("/v1/accuracy", detail="confusion" if confusion else None)
    if as_json:
        print_json(found)
        return
    rows = [["all", score(found["prequential"]), score(found["holdout"])], ["last 500", score(found["prequential_recent"]), "-"]]
    rows += [[each["name"], score(each["prequential"]), score(each["holdout"])] for each in found["per_class"]]
    show(table(["", "right before learning", "right on hold-out"], rows))
    say(_unknown(found["unknown"]))
    for each in found["per_class"]:
        if each["drift"] and each["drift"]["drifting"]:
            say(f"{each['name']}: its new images look less and less like it, from {each['drift']['since_sample']} on.")
    if confusion:
        _show_confusion(found.get("confusion") or {})


@verb
def energy(since: Optional[str] = SINCE, url: Optional[str] = URL, as_json: bool = JSON) -> None:
    """Show where the joules went."""
    with connect(url) as client:
        found = client.get("/v1/energy", since=moment(since, datetime.now(timezone.utc)) if since else None)
    if as_json:
        print_json(found)
    else:
        show(_energy(found))


@verb
def memory(url: Optional[str] = URL, as_json: bool = JSON) -> None:
    """Show how full the replay memory is, and what each part of latentd takes."""
    with connect(url) as client:
        found = client.get("/v1/memory")
    if as_json:
        print_json(found)
    else:
        say(status.memory(found))
        say(status.plan(found["plan"]))
        rows = [
            [part["name"], size(part["planned_bytes"]), size(part["used_bytes"]), part["when"], part["basis"]]
            for part in found["plan"]["parts"]
        ]
        show(table(["part", "planned", "used", "when", "basis"], rows, right=(1, 2)))


def moment(text: str, now: datetime) -> str:
    """A time as RFC 3339 in UTC, from "12h" (ago) or from a time of this device's time zone. Raises BadParameter."""
    ago = re.fullmatch(r"(\d{1,6})([smhd])", text)
    if ago:
        return _utc(now - timedelta(**{AGO[ago[2]]: int(ago[1])}))
    try:
        return _utc(datetime.fromisoformat(text.replace("Z", "+00:00")))
    except ValueError as cause:
        raise typer.BadParameter(
            f"{text} is neither like 30m, 12h, 2d nor a time such as 2026-05-03T08:00", param_hint="--since"
        ) from cause


def _utc(time: datetime) -> str:
    return time.astimezone(timezone.utc).isoformat(timespec="seconds").replace("+00:00", "Z")


def _energy(found: Dict[str, Any]) -> Group:
    rows = [
        [
            name,
            joules(each["energy_j"]),
            joules(each["above_idle_j"]),
            duration(each["active_s"]),
            each["count"],
            joules(each["per_item_j"]),
        ]
        for name, each in found["activities"].items()
    ]
    rows.append(["all", joules(found["energy_j"]), joules(found["above_idle_j"]), duration(found["covered_s"]), "", ""])
    spent = table(["", "energy", "above idle", "time", "images", "each"], rows, right=(1, 2, 3, 4, 5))
    parts: List[Any] = [status.energy(found), spent]
    if found["rails"]:
        rails = [
            [name, joules(each["energy_j"]), f"{each['power_w']:.2f} W" if each["power_w"] is not None else "-"]
            for name, each in found["rails"].items()
        ]
        parts += ["", table(["rail", "energy", "now"], rails, right=(1, 2))]
    parts += [sentence for sentence in (_budget(found["budget"]), _battery(found["battery"])) if sentence]
    if found["gaps"]:
        parts.append(f"Not counted: {found['gaps']} gaps between readings, {duration(found['gap_s'])} in all.")
    return Group(*parts)


def _budget(found: Dict[str, Any]) -> str:
    if found["budget_w"] is None:
        return ""
    kept = "the learner waits above it" if found["is_enforced"] else "which nothing keeps, for no meter reads"
    return f"Power budget {found['budget_w']:g} W, {kept}."


def _battery(found: Optional[Dict[str, Any]]) -> str:
    """The battery beyond the hours left: how it would last at the rate by which learners on batteries are compared."""
    if found is None:
        return ""
    paced = found["hours_at_a_minibatch_a_minute"]
    lasting = "how long it lasts is not known yet" if paced is None else f"from full {paced:.1f} h at one mini-batch a minute"
    return f"Battery of {found['capacity_wh']:g} Wh: {lasting}."


def _unknown(found: Dict[str, Any]) -> str:
    if found["below"] is None:
        return f"Nothing is answered unknown: {found['reason']}."
    share = f"{100 * found['rate']:g} % of right answers"
    return f"{found['refused']} of {found['holdout']} hold-out images are answered unknown; up to {share} may be refused."


def _show_confusion(found: Dict[str, Dict[str, int]]) -> None:
    mistakes = [[true, taken, count] for true, row in found.items() for taken, count in row.items() if taken != true and count]
    if mistakes:
        show("\nHold-out images taken for another class:")
        show(table(["is", "taken for", "images"], sorted(mistakes, key=lambda row: -row[2]), right=(2,)))
    else:
        note("No hold-out image is taken for another class." if found else "No hold-out images yet.")
