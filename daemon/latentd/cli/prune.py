"""`latentd prune`: a smaller backbone for what this device sees. Needs no daemon; loads torch, and computes for minutes.

It needs the images themselves, because the journal keeps latents only, and those of another backbone mean nothing to the pruned one.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, NamedTuple, Optional, Tuple

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from latentd import config
from latentd.cli import heads, pictures
from latentd.cli.figures import size
from latentd.cli.terminal import FAILED, JSON, console, note, plain, print_json, say, show, table, verb
from latentd.errors import CheckpointError, FileUnusable, LatentdError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from latentd.engines.stage import FrozenStage
    from latentd.learning.price import Joules
    from latentd.learning.pruning import Lesson, Outcome, Wish
    from latentd.vision.checkpoints import Backbone

LEAST_IMAGES = 4  # of a class: two to score on, so that one can be fitted and one asked, and one held out at least

FOLDER = typer.Argument(..., metavar="DIR", help="A folder that holds one folder a class, with images of each.", show_default=False)
SHARE = typer.Option(0.25, min=0.01, max=0.9, help="Share of the heads to take out.")
MAX_COST = typer.Option(0.5, min=0.0, max=100.0, help="Percentage points of accuracy on held-out images that this may cost.")
SCORE = typer.Option("residual", help="What a head is judged by: residual, entropy, gradient or leave-one-out (slow).")
NAME = typer.Option(None, help="Name of the pruned backbone.", show_default="<backbone>-pruned-<percent>")
IMAGES = typer.Option(600, min=8, help="Images to use at most, evenly over the classes.")
REPAIR = typer.Option(True, "--repair/--no-repair", help="Refit what is left so that it gives what the whole gave.")
EPOCHS = typer.Option(2.0, min=0.0, max=100.0, help="Passes over the images in which it then learns to give what the whole gave; 0: none.")
PICTURE = typer.Option(None, help="Write the picture of the heads to this PNG file.", show_default=False)


@verb
def prune(
    folder: str = FOLDER,
    share: float = SHARE,
    max_cost: float = MAX_COST,
    score: str = SCORE,
    name: Optional[str] = NAME,
    images: int = IMAGES,
    repair: bool = REPAIR,
    epochs: float = EPOCHS,
    picture: Optional[Path] = PICTURE,
    as_json: bool = JSON,
) -> None:
    """Take the least useful attention heads out of the backbone, judged on your images.

    DIR holds what you taught, one folder a class: latentd itself keeps latents only, never images. The pruned backbone is installed beside
    the one it came from, exported, checked, and compared with it.
    """
    from latentd.learning.pruning import SCORES, Wish, prune
    from latentd.vision import checkpoints

    if score not in SCORES:
        raise typer.BadParameter(f"{plain(score)} is no score; known are {', '.join(SCORES)}", param_hint="--score")
    settings = config.load(os.environ, {})
    base = checkpoints.find(settings.cache_dir, settings.backbone.name)
    _refuse_taken(settings.cache_dir, name)
    if max(base.shape.heads) == 1:
        raise CheckpointError(f"every block of {base.name} has one head left, and keeps it", hint="Prune another backbone: backbone.name.")
    taught = _taught(folder, images, settings, quiet=as_json)
    wish = Wish(share, max_cost, score, repaired=repair, epochs=epochs)
    with _progress(as_json) as progress:
        task = progress.add_task("reading weights")
        outcome = prune(
            checkpoints.read_weights(base),
            base.shape,
            settings.backbone.image_size,
            settings.backbone.class_tokens,
            *taught,
            wish,
            lambda doing, done, total: progress.update(task, description=doing, completed=done, total=total),
        )
    if picture is not None:
        heads.save([row.tolist() for row in outcome.worth], outcome.removed, picture)
    made = _installed(settings, base, outcome, name) if outcome.removed else None
    compared = _compared(settings, base, made, taught[1]) if made is not None else []
    if as_json:
        print_json(_document(base, made, outcome, taught, wish, compared))
    else:
        _show(base, made, outcome, taught, compared)
    raise typer.Exit(FAILED if made is None else 0)


class Side(NamedTuple):
    """One backbone in numbers. engine: the one that serves, and how well it agrees with eager PyTorch."""

    backbone: Backbone
    engine: str
    gate: str
    latency_s: float
    energy: Joules


def _refuse_taken(cache_dir: Path, name: Optional[str]) -> None:
    """A name that is taken is refused before the work, not after it."""
    from latentd.vision import checkpoints

    if name is not None and name in [backbone.name for backbone in checkpoints.installed(cache_dir)]:
        raise CheckpointError(f"there is already a backbone {plain(name)}", hint="Give the pruned one another name with --name.")


def _taught(folder: str, most: int, settings: config.Config, quiet: bool) -> Tuple[Lesson, Lesson]:
    """The images of the folder, decoded: those to score and fit on, and those held out. Files that can't be used are named and left out."""
    import numpy as np

    from latentd.learning.pruning import Lesson, halves
    from latentd.vision.images import ImageLimits, decode

    http = settings.http
    limits = ImageLimits(http.max_image_bytes, http.max_pixels, http.max_frames)
    found = pictures.find_by_class(folder)
    refused = list(found.unusable)
    pixels: List[NDArray[np.uint8]] = []
    labels: List[str] = []
    for picture in found.pictures:
        if len(pixels) == most:
            break
        try:
            pixels.append(decode(pictures.read(picture.path, http.max_image_bytes), settings.backbone.image_size, limits))
            labels.append(picture.label or "")
        except LatentdError as error:
            refused.append(pictures.failed(picture, error))
    for outcome in [] if quiet else refused:
        note(f"{outcome.picture.path}: {_why(outcome.result)}")
    _refuse_too_few(folder, labels)
    names = sorted(set(labels))
    class_ids = np.array([names.index(label) for label in labels], dtype=np.int64)
    lesson = Lesson(np.stack(pixels), class_ids)
    shown, held = halves(class_ids)
    return lesson.of(shown), lesson.of(held)


def _why(result: Dict[str, Any]) -> str:
    found = result["problem"]
    return f"{found['title']}. {found['detail']}"


def _refuse_too_few(folder: str, labels: List[str]) -> None:
    hint = "DIR must hold one folder a class, with JPEG, PNG, WebP or BMP files in it."
    counts = Counter(labels)
    if not labels:
        raise FileUnusable(f"{plain(folder)} holds no images that can be used.", hint=hint)
    if len(counts) == 1:
        raise FileUnusable(f"{plain(folder)} holds one class only, {plain(labels[0])}: there is nothing to tell apart.", hint=hint)
    poor = [f"{plain(label)} ({count})" for label, count in sorted(counts.items()) if count < LEAST_IMAGES]
    if poor:
        detail = f"Each class needs {LEAST_IMAGES} images, better many more; too few has {', '.join(poor[:5])}."
        raise FileUnusable(detail, hint="Half of them are held out to see what pruning costs. Or raise --images.")


def _installed(settings: config.Config, base: Backbone, outcome: Outcome, name: Optional[str]) -> Backbone:
    """The pruned backbone in the cache; without a name of its own it gets a number where its name is taken by another."""
    from latentd.vision import prune

    total = len(prune.heads_in(base.shape))
    stem = name or prune.default_name(base.name, len(outcome.removed), total)
    return prune.install(settings.cache_dir, base, outcome.best, outcome.removed, stem, numbered=name is None)


def _compared(settings: config.Config, base: Backbone, made: Backbone, held: Lesson) -> List[Side]:
    """Both backbones through the gate and in their engines: exported, checked, and timed in turn."""
    from latentd.engines.choose import choose
    from latentd.learning import price

    stages: List[FrozenStage] = []
    gates = []
    for backbone in (base, made):
        own = dataclasses.replace(settings, backbone=dataclasses.replace(settings.backbone, name=backbone.name))
        choice = choose(own, backbone)
        stages.append(choice.stage)
        gates.append(next(attempt.reason for attempt in choice.attempts if attempt.state == "serving"))
    seconds = price.latencies_s(stages, held.pixels)
    energies = [price.joules(stage, held.pixels, settings.energy) for stage in stages]
    for stage in stages:
        stage.close()
    return [
        Side(backbone, stage.name, gate, taken, energy)
        for backbone, stage, gate, taken, energy in zip((base, made), stages, gates, seconds, energies)
    ]


def _show(base: Backbone, made: Optional[Backbone], outcome: Outcome, taught: Tuple[Lesson, Lesson], compared: List[Side]) -> None:
    show(heads.drawn([row.tolist() for row in outcome.worth], outcome.removed))
    shown, held = (len(lesson.pixels) for lesson in taught)
    say(f"Scored on {shown} images, asked on {held} others: one of those is {100 / held:.2g} points.")
    last = outcome.steps[-1]
    if made is None:
        lost = outcome.before - last.accuracy
        say(f"Nothing was pruned: without {len(last.removed)} heads accuracy falls by {lost:.2f} points, more than --max-cost allows.")
        return
    if outcome.kept_steps < len(outcome.steps):
        say(f"It stopped there: without {len(last.removed)} heads accuracy falls by {outcome.before - last.accuracy:.2f} points.")
    show(table(["", "before", "after", ""], _rows(compared, outcome), right=(1, 2)))
    say(f"{made.name} is in the cache, from {base.name}. To serve it, put this into the configuration:")
    say(f'[backbone]\nname = "{made.name}"')
    say("Latents of two backbones don't mix: start with an empty state folder (state.dir, or --state-dir) and teach again.")


def _rows(compared: List[Side], outcome: Outcome) -> List[List[str]]:
    from latentd.vision.prune import parameters

    before, after = compared
    counts = [sum(side.backbone.shape.heads) for side in compared]
    weights = [parameters(side.backbone.shape) for side in compared]
    return [
        ["heads", *map(str, counts), f"{100 * (counts[1] / counts[0] - 1):+.0f} %"],
        ["parameters", *(f"{count / 1e6:.2f} M" for count in weights), f"{100 * (weights[1] / weights[0] - 1):+.0f} %"],
        ["file", *(size(side.backbone.path.stat().st_size) for side in compared), ""],
        ["accuracy", f"{outcome.before:.2f} %", f"{outcome.after:.2f} %", f"{outcome.after - outcome.before:+.2f} points"],
        ["one image", *(f"{1000 * side.latency_s:.1f} ms" for side in compared), f"x {after.latency_s / before.latency_s:.2f}"],
        ["energy", *(_energy(side.energy) for side in compared), ""],
        ["engine", *(side.engine for side in compared), after.gate],
    ]


def _energy(energy: Joules) -> str:
    return f"unavailable: {energy.reason}" if energy.value_j is None else f"{energy.value_j:.3f} J ({energy.source})"


def _document(
    base: Backbone, made: Optional[Backbone], outcome: Outcome, taught: Tuple[Lesson, Lesson], wish: Wish, compared: List[Side]
) -> Dict[str, Any]:
    """What --json prints; blocks and heads count from 1, as everywhere outside."""
    sides = [
        {
            "name": side.backbone.name,
            "heads": list(side.backbone.shape.heads),
            "engine": side.engine,
            "gate": side.gate,
            "latency_s": side.latency_s,
            "energy_j": side.energy.value_j,
            "energy_source": side.energy.source,
            "energy_reason": side.energy.reason,
        }
        for side in compared
    ]
    return {
        "base": base.name,
        "name": made.name if made is not None else None,
        "path": str(made.path) if made is not None else None,
        "sha256": made.sha256 if made is not None else None,
        "score": wish.score,
        "repaired": wish.repaired,
        "epochs": wish.epochs,
        "images": {"shown": len(taught[0].pixels), "held": len(taught[1].pixels)},
        "worth": [row.tolist() for row in outcome.worth],
        "removed": [[block + 1, head + 1] for block, head in outcome.removed],
        "steps": [{"heads": len(step.removed), "accuracy_percent": step.accuracy} for step in outcome.steps],
        "accuracy_percent": {"before": outcome.before, "after": outcome.after},
        "compared": sides,
    }


def _progress(quiet: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("images"))
    return Progress(*columns, console=console(stderr=True), transient=True, disable=quiet or not sys.stderr.isatty())
