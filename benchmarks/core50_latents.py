"""What the frozen stage makes of CORe50's frames: computed once, cached under all it depends on.

Runs in the benchmark's main process. 165,000 frames take hours on a small computer; a run that was cut short goes on where it stopped.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Sequence

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import core50
import latents50
from latentd.config import Config
from latentd.engines.choose import choose
from latentd.engines.stage import FrozenStage, StageSpec, stage_spec
from latentd.vision import checkpoints

_console = Console()
_BATCH = 8
_MARK_EVERY = 64  # batches between two notes of how far it came


def features(settings: Config, root: Path, paths: Sequence[str]) -> Path:
    """The file of the features (len(paths), m*D) float32 of these frames under `root`, in their order."""
    backbone = checkpoints.find(settings.cache_dir, settings.backbone.name)
    spec = stage_spec(settings, backbone)
    path = path_of(settings, spec, paths)
    if not path.exists():
        stage = choose(settings, backbone).stage
        encode(stage, root, paths, path)
        stage.close()
    return path


def path_of(settings: Config, spec: StageSpec, paths: Sequence[str]) -> Path:
    key = hashlib.sha256(repr((spec, list(paths))).encode()).hexdigest()[:16]
    return settings.cache_dir / "datasets" / f"core50-features-{key}.npy"


def encode(stage: FrozenStage, root: Path, paths: Sequence[str], path: Path) -> None:
    """Writes `path` when all is done; until then what is done stands beside it."""
    part, mark = path.with_suffix(".part.npy"), path.with_suffix(".part.count")
    path.parent.mkdir(parents=True, exist_ok=True)
    done = int(mark.read_text()) if part.exists() and mark.exists() else 0
    store = np.lib.format.open_memmap(part, "r+" if done else "w+", np.float32, (len(paths), stage.spec.features_width))
    step = _BATCH * stage.lanes
    with bar() as progress, ThreadPoolExecutor(stage.lanes) as pool:
        task = progress.add_task("frozen stage", total=len(paths), completed=done)
        for turn, start in enumerate(range(done, len(paths), step), 1):
            starts = range(start, min(start + step, len(paths)), _BATCH)
            found = pool.map(lambda at: _encoded(stage, root, paths[at : at + _BATCH]), starts)
            for at, values in zip(starts, found):
                store[at : at + len(values)] = values
            progress.update(task, completed=min(start + step, len(paths)))
            if turn % _MARK_EVERY == 0:
                store.flush()
                mark.write_text(str(start + step))
    store.flush()
    if mark.exists():
        mark.unlink()
    part.replace(path)


def _encoded(stage: FrozenStage, root: Path, paths: Sequence[str]) -> NDArray[np.float32]:
    pictures = latents50.pixels(core50.read_frames(root, paths), stage.spec.image_size)
    return stage.encode(pictures, shared=stage.lanes > 1).features


def say(line: str) -> None:
    """What fetching the backbone has to tell."""
    _console.print(line)


def bar() -> Progress:
    """A progress bar on the terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=_console)
