"""`latentd service …`: makes latentd a service of systemd, and takes it away again. Needs root, and no daemon."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import List, Optional

import typer

import latentd
from latentd.cli import install as installing
from latentd.cli.install import Host, Step
from latentd.cli.terminal import JSON, note, print_json, say, verb
from latentd.errors import InstallError

app = typer.Typer(no_args_is_help=True, help="Install latentd as a service of systemd, or remove it.")

DRY_RUN = typer.Option(False, "--dry-run", help="Only say what would be done.")
ROOT = typer.Option(Path("/"), "--root", help="Folder that holds the root of the system, of an image for example.")
EXEC = typer.Option(None, "--exec", help="The latentd that the service runs.", show_default="this one")
NO_START = typer.Option(False, "--no-start", help="Do not start or restart it now.")
PURGE = typer.Option(False, "--purge-state", help="Also remove what was taught, the caches and the user. /etc/latentd stays.")


@app.command("install")
@verb
def install(
    dry_run: bool = DRY_RUN,
    root: Path = ROOT,
    executable: Optional[Path] = EXEC,
    no_start: bool = NO_START,
    as_json: bool = JSON,
) -> None:
    """Install or upgrade the unit, and start it. Never touches /etc/latentd or what was taught; safe to run again."""
    host = _host(root, dry_run)
    binary = executable or Path(sys.prefix) / "bin" / "latentd"
    if host.root == Path("/"):
        if not os.access(binary, os.X_OK):
            raise InstallError(f"there is no {binary} to run", hint="Name the latentd to run with --exec.")
        interpreter = installing.interpreter_of(binary)
        own = [] if executable else [Path(latentd.__file__).resolve()]
        installing.check_reachable(host, [binary, *([interpreter] if interpreter else []), *own])
    _take(installing.install_steps(host, binary, not no_start), dry_run, as_json)
    if not as_json and not dry_run:
        note("`systemctl status latentd` shows how it is, `journalctl -u latentd` what it said, `latentd doctor` what could be better.")


@app.command("uninstall")
@verb
def uninstall(dry_run: bool = DRY_RUN, root: Path = ROOT, purge_state: bool = PURGE, as_json: bool = JSON) -> None:
    """Stop the service and remove its unit; what was taught stays unless told."""
    host = _host(root, dry_run)
    _take(installing.uninstall_steps(host, purge_state), dry_run, as_json)
    kept = [str(host.path(name)) for name in (installing.STATE, installing.CACHE, "etc/latentd") if host.path(name).exists()]
    if kept and not as_json and not dry_run:
        note(f"Kept: {', '.join(kept)}.")


def _host(root: Path, dry_run: bool) -> Host:
    if not dry_run and root == Path("/") and os.geteuid() != 0:
        raise InstallError(f"this needs root, and you are user {os.geteuid()}", hint=f"sudo {' '.join(sys.argv)}; --dry-run needs no root.")
    if not root.is_dir():
        raise typer.BadParameter(f"{root} is not a folder", param_hint="--root")
    return Host(root.resolve(), installing.run)


def _take(steps: List[Step], dry_run: bool, as_json: bool) -> None:
    """Takes the steps one after the other, saying each before it, for one may take minutes; a failure leaves the rest for the next run."""
    for step in steps:
        if not as_json:
            say(f"{'would ' if dry_run else ''}{step.sentence}")
        if not dry_run:
            step.act()
    if as_json:
        print_json({"dry_run": dry_run, "steps": [step.sentence for step in steps]})
    elif not steps:
        say("Nothing to do.")
