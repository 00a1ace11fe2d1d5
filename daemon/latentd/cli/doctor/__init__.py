"""`latentd doctor`: what on this machine keeps latentd from working well, one line and one fix a check. Needs no daemon."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import List, Optional, Tuple

import typer
from rich.text import Text

from latentd import config
from latentd.cli.configuration import FOLDER, chosen
from latentd.cli.doctor import board, network, software, storage
from latentd.cli.doctor.machine import BROKEN, NOTE, OK, Finding, Machine, User, asking_user
from latentd.cli.terminal import FAILED, JSON, print_json, show, table, verb
from latentd.config import Config
from latentd.errors import ConfigError

STYLES = {OK: "green", NOTE: "yellow", BROKEN: "bold red"}


@verb
def doctor(folder: Optional[Path] = FOLDER, as_json: bool = JSON) -> None:
    """Check this machine: driver, PyTorch, TensorRT, sensors, folders, memory, port, clock. Exit code 1 when something is broken."""
    machine = Machine()
    findings = examine(machine, chosen(folder), asking_user(machine))
    if as_json:
        print_json({"ok": not any(found.state == BROKEN for found in findings), "findings": [found._asdict() for found in findings]})
    else:
        rows = [
            [found.check, Text(found.state, style=STYLES[found.state]), f"{found.detail}\n→ {found.fix}" if found.fix else found.detail]
            for found in findings
        ]
        show(table(["check", "", "found"], rows))
    if any(found.state == BROKEN for found in findings):
        raise typer.Exit(FAILED)


def examine(machine: Machine, folder: Path, user: User) -> List[Finding]:
    """Every check, in the order in which faults cause each other. folder: of the configuration."""
    settings, first = _configuration(folder, user)
    return [
        first,
        board.board(machine),
        board.driver(machine, user),
        software.torch(machine, user),
        software.tensorrt(machine),
        software.plan_cache(settings, user),
        board.sensors(machine, settings.energy.meters),
        storage.state_folder(machine, settings, user),
        storage.disk(machine, settings),
        storage.memory(machine, settings),
        storage.swap(machine),
        board.power_mode(machine),
        network.port(settings),
        board.clock(machine, time.time()),
    ]


def _configuration(folder: Path, user: User) -> Tuple[Config, Finding]:
    """The configuration of the user, or the defaults where it is broken."""
    is_service = user.uid == 0 or user.name == "latentd"
    try:
        settings = config.load(os.environ, {}, system=folder, is_service=is_service)
    except ConfigError as cause:
        defaults = config.load({}, {}, system=Path(os.devnull), is_service=is_service)
        return defaults, Finding("configuration", BROKEN, cause.detail, cause.hint)
    changed = sum(origin != "default" for origin in settings.origins.values())
    return settings, Finding("configuration", OK, f"{changed} keys set, the others at their defaults")
