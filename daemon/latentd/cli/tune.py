"""`latentd tune`: measures split, tokens, codec and replay size on this device and writes the configuration for stated limits.

Needs no daemon. Loads the frozen stage and torch, and keeps the processor busy for minutes: a daemon beside it disturbs the figures.
"""

from __future__ import annotations

import os
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Optional

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from latentd import config
from latentd.cli.amounts import bytes_of, codecs_of, numbers_of
from latentd.cli.configuration import FOLDER, chosen
from latentd.cli.serve import CACHE_DIR, STATE_DIR
from latentd.cli.terminal import JSON, complain, console, exit_code, note, plain, print_json, verb
from latentd.errors import FileUnusable, LimitsUnreachable, MeterUnavailable

if TYPE_CHECKING:
    from latentd.cli.questions import Asked
    from latentd.cli.tuned import Outcome
    from latentd.learning.tuning.plan import Plan
    from latentd.learning.tuning.stopwatch import Stopwatch
    from latentd.learning.tuning.survey import Survey
    from latentd.vision.checkpoints import Backbone

BELOW = 3  # splits below the depth that are measured unless told

IMAGES = typer.Option(None, help="Folder that holds one folder a class: accuracy is asked on these images.", show_default="what was taught")
MEMORY = typer.Option(None, help="Limit of all the memory that learning takes: 64MB, 64MiB or bytes.", show_default="none")
LATENCY = typer.Option(None, "--latency-ms", min=0.01, help="Limit of one answer, in milliseconds.", show_default="none")
POWER = typer.Option(None, "--power-w", min=0.01, help="Limit of the mean power while it answers or learns, in watts.", show_default="none")
SPLITS = typer.Option(None, help="Splits to measure, such as 12,11.", show_default="the depth and the three before it")
GRIDS = typer.Option("0,8", "--token-grids", help="Ways of keeping tokens: 0 all of them, 8 averaged to 8 by 8.")
CODECS = typer.Option("int8:token,int4:rotated,int4:scattered,int3:spatial,int2:spatial", "--codecs", help="Codecs to measure.")
SLOTS = typer.Option(1500, min=1, help="Latents that the replay memory should hold, if they fit.")
MOST = typer.Option(1000, "--most-images", min=20, help="Images or taught latents that accuracy is asked on, at most.")
BOX = typer.Option(1.5, "--box-s", min=0.01, help="Seconds that one measurement takes, or three repetitions if they take longer.")
SLEEP = typer.Option(60.0, "--sleep-s", min=0.1, help="Seconds that blocks may train before the accuracy of their split is asked.")
WRITE = typer.Option(None, "--write", help="File for the configuration.", show_default="print it")
FORCE = typer.Option(False, "--force", help="Overwrite that file.")


@verb
def tune(
    images: Optional[Path] = IMAGES,
    memory: Optional[str] = MEMORY,
    latency_ms: Optional[float] = LATENCY,
    power_w: Optional[float] = POWER,
    splits: Optional[str] = SPLITS,
    token_grids: str = GRIDS,
    codecs: str = CODECS,
    slots: int = SLOTS,
    most_images: int = MOST,
    box_s: float = BOX,
    sleep_s: float = SLEEP,
    write: Optional[Path] = WRITE,
    force: bool = FORCE,
    state_dir: Optional[str] = STATE_DIR,
    cache_dir: Optional[str] = CACHE_DIR,
    folder: Optional[Path] = FOLDER,
    as_json: bool = JSON,
) -> None:
    """Measure what split, codec and replay size cost and give on this device, and choose for stated limits."""
    settings = config.load(os.environ, {"state.dir": state_dir, "state.cache_dir": cache_dir}, system=chosen(folder))
    if write is not None and write.exists() and not force:
        raise FileUnusable(f"{plain(write)} is there already.", hint="Add --force to overwrite it, or name another file.")
    if slots < settings.learn.minibatch:
        raise typer.BadParameter(f"a mini-batch alone has {settings.learn.minibatch} latents (learn.minibatch)", param_hint="--slots")
    from latentd.cli.questions import images_in, taught
    from latentd.cli.tuned import Outcome  # here, because it loads torch, which takes seconds
    from latentd.energy.joulemeter import Joulemeter
    from latentd.learning.tuning.candidates import Limits
    from latentd.learning.tuning.plan import Plan
    from latentd.learning.tuning.stopwatch import Stopwatch
    from latentd.vision import checkpoints

    backbone = checkpoints.find(settings.cache_dir, settings.backbone.name)
    depth = backbone.shape.depth
    plan = Plan(
        splits=numbers_of(splits, 1, depth, "--splits") if splits else tuple(range(max(1, depth - BELOW), depth + 1)),
        grids=numbers_of(token_grids, 0, 64, "--token-grids"),
        codecs=codecs_of(codecs, "--codecs"),
        slots=slots,
        sleep_s=sleep_s,
        limits=Limits(bytes_of(memory, "--memory") if memory else None, latency_ms / 1e3 if latency_ms else None, power_w),
    )
    with closing(Joulemeter.from_config(settings.energy)) as joulemeter:
        if power_w is not None and joulemeter.source is None:
            detail = f"a limit of power can't be kept where no meter reads: {joulemeter.reason}"
            raise MeterUnavailable(detail, hint="Leave --power-w out, or make a meter readable (energy.meters).")
        joulemeter.measure_idle()
        asked = images_in(images, settings, most_images) if images is not None else taught(settings, backbone, most_images)
        survey = _measured(settings, backbone, plan, Stopwatch(box_s, joulemeter), asked, as_json)
        outcome = Outcome.of(settings, backbone, plan, survey, joulemeter, asked.source)
    _tell(outcome, write, as_json)


def _measured(settings: config.Config, backbone: Backbone, plan: Plan, stopwatch: Stopwatch, asked: Asked, quiet: bool) -> Survey:
    from latentd.learning.tuning.survey import Surveyor

    with _progress(quiet) as progress:
        task = progress.add_task("loading", total=None)
        begun = -1

        def tell(doing: str) -> None:
            nonlocal begun
            begun += 1
            progress.update(task, description=doing, completed=begun, total=surveyor.rounds)

        surveyor = Surveyor(settings, backbone, plan, stopwatch, samples=asked.samples, why_no_samples=asked.source, progress=tell)
        return surveyor.run()


def _tell(outcome: Outcome, write: Optional[Path], as_json: bool) -> None:
    """Prints the answer and writes the file; ends with 1 where nothing keeps the limits."""
    text = outcome.toml()
    if write is not None and text is not None:
        _write(write, text)
    if as_json:
        print_json(outcome.document())
    else:
        outcome.show()
    if text is None:
        error = LimitsUnreachable(outcome.recommendation.reason)
        complain(error)
        raise typer.Exit(exit_code(error))
    if write is not None:
        note(f"The configuration is in {write}; latentd reads it from {config.SYSTEM_CONFIG / 'conf.d'} at its next start.")
    elif not as_json:
        print(text, end="")


def _write(path: Path, text: str) -> None:
    from latentd.files import replacing

    try:
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as cause:
        raise FileUnusable(f"{plain(path)} can't be written: {cause.strerror or cause}.") from cause


def _progress(quiet: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console(stderr=True), transient=True, disable=quiet or not sys.stderr.isatty())
