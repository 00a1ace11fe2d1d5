"""A stream of latents to learn from and the frames to ask afterwards: Objects-50, or CORe50 where its files are given.

A Source is made once in the main process (that may take as long as the frozen stage does) and is cheap to hand to a worker: it maps the
latents where it is used.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Dict, List, Sequence, Tuple

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Protocol

import core50
import core50_latents
import latents50
import objects50
import orders
from latentd.config import Config
from latentd.vision import checkpoints

CLASSES = 50
QUICK_FRAMES = 2

Places = NDArray[np.int64]  # rows of a Course's features


@dataclass(frozen=True)
class Course:
    """One order of a stream. features (n, F) and labels (n,) of all frames; batches: the frames of each lesson, in order.

    told: labels as the teacher says them (n,); the same as labels unless the teacher errs.
    asked: frames whose answers count at the end; watched: those asked after every lesson (asked itself, or a part of it where it is large).
    """

    features: NDArray[np.float32]
    labels: NDArray[np.int64]
    told: NDArray[np.int64]
    batches: List[Places]
    asked: Places
    watched: Places


class Source(Protocol):
    """Where courses come from; picklable. tokens: class tokens in a feature vector."""

    @property
    def name(self) -> str: ...

    @property
    def tokens(self) -> int: ...

    @property
    def classes(self) -> Tuple[str, ...]: ...

    def course(self, protocol: int, order: int, validation: bool) -> Course:
        """One order of NICv2-79, -196 or -391. validation: two training sessions are held out and asked, no test session is."""

    def held(self, validation: bool) -> Tuple[int, ...]:
        """The sessions that are asked."""

    def drawn(self, settings: Config) -> NDArray[np.float32]:
        """Features (n, F) of drawn images, for codecs that are calibrated on them."""


@dataclass(frozen=True)
class Objects50:
    """Courses of Objects-50, cut from the cached latents. a_video: frames used of each video, evenly spaced.

    late: classes arrive one at a time over most of the stream, as in CORe50's lists.
    """

    settings: Config
    stream: objects50.Stream = objects50.STANDARD
    a_video: int = objects50.FRAMES
    late: bool = False

    @property
    def name(self) -> str:
        return f"Objects-50 {self.stream.name}"

    @property
    def tokens(self) -> int:
        return self.settings.backbone.class_tokens

    @property
    def classes(self) -> Tuple[str, ...]:
        return tuple(name.rpartition("/")[2] for name in objects50.OBJECTS)

    def course(self, protocol: int, order: int, validation: bool) -> Course:
        held = self.held(validation)
        taught = [session for session in objects50.SESSIONS if session not in (*held, *objects50.TEST_SESSIONS)]
        found = latents50.features(self.settings, self.stream)
        cut = np.ascontiguousarray(found[:, :, :: found.shape[2] // self.a_video][:, :, : self.a_video])
        labels = np.repeat(np.arange(CLASSES), len(objects50.SESSIONS) * self.a_video)
        batches = [self.places(batch) for batch in orders.stream(protocol, order, taught, self.late)]
        asked = self.places([(thing, session) for thing in range(CLASSES) for session in held])
        return Course(cut.reshape(-1, cut.shape[-1]), labels, labels, batches, asked, asked)

    def held(self, validation: bool) -> Tuple[int, ...]:
        return tuple(objects50.VALIDATION_SESSIONS if validation else objects50.TEST_SESSIONS)

    def drawn(self, settings: Config) -> NDArray[np.float32]:
        return latents50.drawn(settings)

    def places(self, videos: Sequence[orders.Video]) -> Places:
        """Rows of all frames of these videos, in their order."""
        starts = np.array([(thing * len(objects50.SESSIONS) + session - 1) * self.a_video for thing, session in videos], np.int64)
        return (starts[:, None] + np.arange(self.a_video)).reshape(-1)


@dataclass(frozen=True)
class Core50:
    """Courses of CORe50 by the official lists. frames: every frame of training and test, in the order of the latents."""

    path: Path
    filelists: Path
    tokens: int
    frames: Tuple[core50.Frame, ...] = field(repr=False)
    name: str = "CORe50"
    classes: Tuple[str, ...] = tuple(f"o{number}" for number in range(1, CLASSES + 1))

    def course(self, protocol: int, order: int, validation: bool) -> Course:
        lists = core50.read_lists(self.filelists, protocol, order)
        watched = core50.one_in_twenty(self.filelists, lists.test)
        if validation:
            lists = core50.without(lists, self.held(True))
            watched = np.arange(0, len(lists.test), 20)
        place: Dict[str, int] = {frame.path: index for index, frame in enumerate(self.frames)}

        def places(frames: Sequence[core50.Frame]) -> Places:
            return np.array([place[frame.path] for frame in frames], np.int64)

        asked = places(lists.test)
        labels = np.array([frame.label for frame in self.frames], np.int64)
        batches = [places(batch) for batch in lists.batches]
        return Course(np.load(self.path, mmap_mode="r"), labels, labels, batches, asked, asked[watched])

    def held(self, validation: bool) -> Tuple[int, ...]:
        return core50.VALIDATION_SESSIONS if validation else core50.TEST_SESSIONS

    def drawn(self, settings: Config) -> NDArray[np.float32]:
        return latents50.drawn(settings)


def open_objects50(settings: Config, stream: objects50.Stream, quick: bool) -> Objects50:
    """The built-in stream; renders and encodes it where that was not done before."""
    _fetch_backbone(settings)
    latents50.features(settings, stream)
    return Objects50(settings, stream, QUICK_FRAMES if quick else objects50.FRAMES)


def open_core50(settings: Config, root: Path, filelists: Path, protocol: int, runs: Sequence[int]) -> Core50:
    """CORe50, checked; encodes its frames where that was not done before. Raises core50.Incomplete."""
    frames: Dict[str, core50.Frame] = {}
    for run in runs:
        lists = core50.read_lists(filelists, protocol, run)
        frames.update({frame.path: frame for batch in (*lists.batches, lists.test) for frame in batch})
    core50.check_frames(root, frames.values())
    _fetch_backbone(settings)
    ordered = tuple(frames[path] for path in sorted(frames))
    path = core50_latents.features(settings, root, [frame.path for frame in ordered])
    return Core50(path, filelists, settings.backbone.class_tokens, ordered)


def _fetch_backbone(settings: Config) -> None:
    """The default backbone; another one must be there."""
    if settings.backbone.name == checkpoints.DEFAULT:
        checkpoints.pull(settings.cache_dir, progress=core50_latents.say)
