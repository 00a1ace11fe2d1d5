"""Small courses for tests: clouds of latents, a few classes, a few lessons; and a source that gives them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import List, Tuple

import numpy as np
from numpy.typing import NDArray

from latentd.config import Config
from streams import Course

CLASSES, SESSIONS, A_VIDEO, TOKENS, WIDTH = 6, 5, 20, 2, 32
ASKED_SESSION = SESSIONS - 1


def features() -> NDArray[np.float32]:
    """(CLASSES * SESSIONS * A_VIDEO, WIDTH): a cloud a class, moved a little in each session."""
    rng = np.random.default_rng(0)
    centres, moves = 3 * rng.standard_normal((CLASSES, 1, 1, WIDTH)), 0.5 * rng.standard_normal((1, SESSIONS, 1, WIDTH))
    clouds: NDArray[np.float32] = (centres + moves + rng.standard_normal((CLASSES, SESSIONS, A_VIDEO, WIDTH))).astype(np.float32)
    return clouds.reshape(-1, WIDTH)


def places(thing: int, session: int) -> NDArray[np.int64]:
    start = (thing * SESSIONS + session) * A_VIDEO
    return np.arange(start, start + A_VIDEO)


def course(order: int = 0, size: int = 1) -> Course:
    """Two classes in the first lesson, then `size` videos a lesson; the last session is asked."""
    labels = np.repeat(np.arange(CLASSES), SESSIONS * A_VIDEO)
    videos = [(thing, session) for thing in range(CLASSES) for session in range(ASKED_SESSION) if (thing, session) not in ((0, 0), (1, 0))]
    shuffled = [videos[index] for index in np.random.default_rng(order).permutation(len(videos))]
    batches: List[NDArray[np.int64]] = [np.concatenate([places(0, 0), places(1, 0)])]
    batches += [np.concatenate([places(*video) for video in shuffled[at : at + size]]) for at in range(0, len(shuffled), size)]
    asked = np.concatenate([places(thing, ASKED_SESSION) for thing in range(CLASSES)])
    return Course(features(), labels, labels, batches, asked, asked)


@dataclass(frozen=True)
class SmallSource:
    name: str = "clouds"
    tokens: int = TOKENS
    classes: Tuple[str, ...] = tuple("abcdef")

    def course(self, protocol: int, order: int, validation: bool) -> Course:
        return course(order, {391: 1, 196: 2, 79: 5}[protocol])

    def held(self, validation: bool) -> Tuple[int, ...]:
        return (5,) if validation else (3,)

    def drawn(self, settings: Config) -> NDArray[np.float32]:
        return np.random.default_rng(9).standard_normal((4, WIDTH)).astype(np.float32)
