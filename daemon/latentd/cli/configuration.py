"""`latentd config …`: the effective configuration, its origins, and whether it can be used. Needs no daemon."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Optional

import typer

from latentd import config, configtext
from latentd.cli.terminal import JSON, plain, print_json, say, show, table, verb

app = typer.Typer(no_args_is_help=True, help="Show and check the configuration.")

FOLDER = typer.Option(None, "--config", help="Folder of config.toml and conf.d.", show_default=str(config.SYSTEM_CONFIG))
ORIGIN = typer.Option(False, "--origin", help="Also say where each value came from.")


@app.command("show")
@verb
def show_config(origin: bool = ORIGIN, folder: Optional[Path] = FOLDER, as_json: bool = JSON) -> None:
    """Print every key and its effective value."""
    settings = config.load(os.environ, {}, system=chosen(folder))
    values = config.as_table(settings)
    if as_json:
        print_json({key: {"value": value, "origin": settings.origins[key]} if origin else value for key, value in values.items()})
        return
    units = {row.key: row.unit for row in config.rows()}
    headings = ["key", "value", "unit", "origin"] if origin else ["key", "value", "unit"]
    rows = [[key, _shown(value), units[key], *([settings.origins[key]] if origin else [])] for key, value in values.items()]
    show(table(headings, rows))


@app.command("check")
@verb
def check(folder: Optional[Path] = FOLDER, as_json: bool = JSON) -> None:
    """Say whether the configuration can be used; exit code 1 when it can't."""
    settings = config.load(os.environ, {}, system=chosen(folder))
    if as_json:
        print_json({"ok": True, "origins": dict(settings.origins)})
    else:
        changed = sum(origin != "default" for origin in settings.origins.values())
        say(f"The configuration is good: {changed} of {len(settings.origins)} keys are set, the others have their defaults.")


@app.command("example")
@verb
def example(as_json: bool = JSON) -> None:
    """Print a config.toml with every key at its default, commented out."""
    text = configtext.example_toml()
    if as_json:
        print_json({"toml": text})
    else:
        print(text, end="")


def chosen(folder: Optional[Path]) -> Path:
    """The folder of the configuration. One that was named must be there. Raises BadParameter."""
    if folder is not None and not folder.is_dir():
        raise typer.BadParameter(f"{folder} is not a folder", param_hint="--config")
    return folder or config.SYSTEM_CONFIG


def _shown(value: object) -> str:
    return ", ".join(str(part) for part in value) if isinstance(value, tuple) else plain(value)
