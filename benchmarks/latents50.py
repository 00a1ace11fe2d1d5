"""The latents of an Objects-50 stream: what the frozen stage gives for every frame, computed once and cached under all they depend on."""

from __future__ import annotations

import dataclasses
import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Iterator, Optional, Tuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.progress import track

import objects50
from latentd import config
from latentd.engines.choose import choose
from latentd.engines.stage import Encoded, FrozenStage, StageSpec, stage_spec
from latentd.vision import checkpoints
from latentd.vision.drawn import DRAWN_VERSION, drawn_images
from latentd.vision.vit import Vit

_BATCH = 8
_CLASS_TOKENS = 4  # blocks whose class tokens are kept
_UPPER = 3  # blocks before whose tokens all later ones are computed from stored ones


def features(settings: config.Config, stream: objects50.Stream = objects50.STANDARD) -> NDArray[np.float32]:
    """(50, 11, FRAMES, m*D) float32: class tokens of the last m blocks, whatever the split. Kept once, of four blocks or more: those of
    fewer are their end.
    """
    kept = dataclasses.replace(settings.backbone, class_tokens=max(settings.backbone.class_tokens, _CLASS_TOKENS))
    every = dataclasses.replace(settings, backbone=kept)
    path = _path(every, _spec(every, None), stream, "features")
    if not path.exists():
        _compute(every, stream, None)
    found: NDArray[np.float32] = np.load(path, mmap_mode="r")
    width = found.shape[-1] // kept.class_tokens * settings.backbone.class_tokens
    return found[..., found.shape[-1] - width :]


def tokens(settings: config.Config, split: int, stream: objects50.Stream = objects50.STANDARD) -> NDArray[np.float16]:
    """(50, 11, FRAMES, N, D) float16, memory-mapped: all tokens after block `split`. 1.3 GB for a ViT-S/14 at 224 pixels.

    Those of the last blocks are computed from the stored ones of three blocks before the end: a sixth of the time of a whole pass.
    """
    every = dataclasses.replace(settings, backbone=dataclasses.replace(settings.backbone, class_tokens=_CLASS_TOKENS))
    path = _path(every, _spec(every, split), stream, "tokens")
    if not path.exists():
        first = checkpoints.find(settings.cache_dir, settings.backbone.name).shape.depth - _UPPER
        if split > first:
            _go_on(every, stream, first, split, path)
        else:
            _compute(every, stream, split)
    found: NDArray[np.float16] = np.load(path, mmap_mode="r")
    return found


def drawn(settings: config.Config) -> NDArray[np.float32]:
    """(n, m*D) features of the images on which the daemon calibrates the scattered kind."""
    spec = _spec(settings, None)
    key = hashlib.sha256(repr((spec, DRAWN_VERSION)).encode()).hexdigest()[:16]
    path = settings.cache_dir / "datasets" / f"drawn-features-{key}.npy"
    if not path.exists():
        whole = dataclasses.replace(settings, backbone=dataclasses.replace(settings.backbone, split=0))
        stage = choose(whole, checkpoints.find(settings.cache_dir, settings.backbone.name)).stage
        images = drawn_images(spec.image_size)
        found = np.concatenate([stage.encode(images[start : start + _BATCH]).features for start in range(0, len(images), _BATCH)])
        stage.close()
        store = _Store(path, np.float32, found.shape[1:], (len(found),))
        store.flat[:] = found
        store.finish()
    known: NDArray[np.float32] = np.load(path)
    return known


def _go_on(settings: config.Config, stream: objects50.Stream, first: int, split: int, path: Path) -> None:
    """Runs the stored tokens after block `first` through the blocks up to `split`."""
    vit = Vit.load(checkpoints.find(settings.cache_dir, settings.backbone.name), settings.backbone.image_size)
    known = tokens(settings, first, stream)
    flat = known.reshape(-1, *known.shape[3:])
    store = _Store(path, np.float16, known.shape[3:], known.shape[:3])
    with torch.inference_mode():
        for start in track(range(0, len(flat), _BATCH), f"blocks {first + 1} to {split}"):
            batch = torch.from_numpy(flat[start : start + _BATCH].astype(np.float32))
            store.flat[start : start + _BATCH] = vit.run(batch, first, split).numpy()
    store.finish()


def _compute(settings: config.Config, stream: objects50.Stream, split: Optional[int]) -> None:
    """Runs every frame through the frozen stage; writes the features, and the tokens where a split is given."""
    backbone = checkpoints.find(settings.cache_dir, settings.backbone.name)
    settings = dataclasses.replace(settings, backbone=dataclasses.replace(settings.backbone, split=split or 0))
    stage = choose(settings, backbone).stage
    frames = objects50.frames(settings.cache_dir, stream)
    shape = frames.shape[:3]
    flat = frames.reshape(-1, *frames.shape[3:])
    spec = stage.spec
    stores = [_Store(_path(settings, _spec(settings, None), stream, "features"), np.float32, (spec.features_width,), shape)]
    if split is not None:
        stores.append(_Store(_path(settings, spec, stream, "tokens"), np.float16, (spec.tokens, spec.width), shape))
    batches = range(0, len(flat), _BATCH)
    for start, encoded in zip(batches, _encoded(stage, flat, split is not None)):
        for store, values in zip(stores, (encoded.features, encoded.tokens)):
            store.flat[start : start + _BATCH] = values
    stage.close()
    for store in stores:
        store.finish()


def _encoded(stage: FrozenStage, frames: NDArray[np.uint8], with_tokens: bool) -> Iterator[Encoded]:
    """Batch after batch, on every lane of the stage."""

    def encode(start: int) -> Encoded:
        return stage.encode(pixels(frames[start : start + _BATCH], stage.spec.image_size), tokens=with_tokens, shared=stage.lanes > 1)

    with ThreadPoolExecutor(stage.lanes) as pool:
        starts = range(0, len(frames), _BATCH * stage.lanes)
        for start in track(starts, "frozen stage"):
            yield from pool.map(encode, range(start, min(start + _BATCH * stage.lanes, len(frames)), _BATCH))


def pixels(frames: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """(B, 128, 128, 3) -> (B, size, size, 3), bicubic, as the daemon's decoder does it."""
    return np.stack([np.asarray(Image.fromarray(frame).resize((size, size), Image.Resampling.BICUBIC)) for frame in frames])


class _Store:
    """One array on its way to the disk; it has its name only when it is whole. flat: the frames in one row."""

    def __init__(self, path: Path, kind: Any, shape: Tuple[int, ...], leading: Tuple[int, ...]) -> None:
        self._path, self._temporary = path, path.with_suffix(".tmp.npy")
        self._array = np.lib.format.open_memmap(self._temporary, "w+", kind, (*leading, *shape))
        self.flat = self._array.reshape(-1, *shape)

    def finish(self) -> None:
        self._array.flush()
        self._temporary.replace(self._path)


def _spec(settings: config.Config, split: Optional[int]) -> StageSpec:
    backbone = checkpoints.find(settings.cache_dir, settings.backbone.name)
    chosen = dataclasses.replace(settings, backbone=dataclasses.replace(settings.backbone, split=split or 0))
    return stage_spec(chosen, backbone)


def _path(settings: config.Config, spec: StageSpec, stream: objects50.Stream, what: str) -> Path:
    key = hashlib.sha256(repr((spec, objects50.recipe(stream))).encode()).hexdigest()[:16]
    return settings.cache_dir / "datasets" / f"objects50-{stream.name}-{what}-{key}.npy"
