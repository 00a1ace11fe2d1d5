"""`latentd backbone …`: the weights in the cache folder. Needs no daemon; `pull` is the only verb that fetches anything."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, Optional

import typer

from latentd import config
from latentd.cli.figures import size
from latentd.cli.terminal import JSON, note, print_json, say, show, table, verb

if TYPE_CHECKING:
    from latentd.vision.checkpoints import Backbone

app = typer.Typer(no_args_is_help=True, help="Get and list backbones.")

CACHE_DIR = typer.Option(None, help="Folder of weights and compiled graphs.", show_default="from the configuration")


NORMALISATION = typer.Option(None, help="imagenet, or half (mean and deviation 0.5).", show_default="from the kind of checkpoint")


@app.command("pull")
@verb
def pull(
    name: Optional[str] = typer.Argument(None, help="Which backbone.", show_default="the default one"),
    cache_dir: Optional[str] = CACHE_DIR,
    as_json: bool = JSON,
) -> None:
    """Fetch a backbone into the cache and check it; does nothing when it is there already."""
    from latentd.vision import checkpoints

    _present(checkpoints.pull(_settings(cache_dir).cache_dir, name or checkpoints.DEFAULT, note), as_json)


@app.command("import")
@verb
def import_file(
    file: Path = typer.Argument(..., help="A safetensors or ONNX file of a vision transformer."),
    name: Optional[str] = typer.Option(None, help="Name in the cache.", show_default="from the file"),
    normalisation: Optional[str] = NORMALISATION,
    cache_dir: Optional[str] = CACHE_DIR,
    as_json: bool = JSON,
) -> None:
    """Convert a checkpoint file into the cache."""
    from latentd.vision import checkpoints

    _present(checkpoints.import_file(file, _settings(cache_dir).cache_dir, name, normalisation=normalisation), as_json)


@app.command("list")
@verb
def installed(cache_dir: Optional[str] = CACHE_DIR, as_json: bool = JSON) -> None:
    """List the backbones in the cache."""
    from latentd.vision import checkpoints

    settings = _settings(cache_dir)
    found = [_described(backbone) for backbone in checkpoints.installed(settings.cache_dir)]
    if as_json:
        print_json({"backbones": found})
    elif found:
        rows = [
            [
                each["name"],
                f"{each['depth']} blocks",
                each["width"],
                f"{each['image_size']} px",
                size(each["size_bytes"]),
                each["sha256"][:12],
                each["source"],
            ]
            for each in found
        ]
        show(table(["name", "depth", "width", "images", "file", "sha256", "source"], rows))
    else:
        note(f"No backbone in {settings.cache_dir}; `latentd backbone pull` fetches the default one.")


def _settings(cache_dir: Optional[str]) -> config.Config:
    return config.load(os.environ, {"state.cache_dir": cache_dir})


def _present(backbone: Backbone, as_json: bool) -> None:
    found = _described(backbone)
    if as_json:
        print_json(found)
    else:
        say(f"{found['name']} is in the cache: {size(found['size_bytes'])}, sha256 {found['sha256'][:12]}…, {found['path']}")


def _described(backbone: Backbone) -> Dict[str, Any]:
    shape = backbone.shape
    return {
        "name": backbone.name,
        "path": str(backbone.path),
        "size_bytes": backbone.path.stat().st_size,
        "sha256": backbone.sha256,
        "source": backbone.source,
        "depth": shape.depth,
        "width": shape.width,
        "patch": shape.patch,
        "image_size": shape.image_size,
    }
