"""The orders of NICv2-79, -196 and -391 on Objects-50: which (object, session) videos come together, and when.

Batch 0 is always the first object of each category in session 1; the other videos then come 5, 2 or 1 at a time. The three protocols of
one run are the same sequence cut differently, so that they differ in nothing but the size of a batch. Pure functions of the run.
"""

from __future__ import annotations

from typing import Dict, List, Sequence, Tuple

import numpy as np

import objects50

Video = Tuple[int, int]  # (object from 0, session from 1)

VIDEOS_A_BATCH: Dict[int, int] = {79: 5, 196: 2, 391: 1}
LAST_ARRIVAL = 0.85  # of the stream: where the official lists bring the 50th class (batches 66-68, 151-165 and 321-340)


def stream(protocol: int, run: int, sessions: Sequence[int], late: bool = False) -> List[List[Video]]:
    """The batches of one run over these sessions; all videos come once. protocol: 79, 196 or 391, the batches of the full stream.

    late: classes arrive one at a time over most of the stream, as in the official lists of CORe50; otherwise the videos are shuffled, and
    nearly every class is known after a third of it.
    """
    first, *rest = objects50.nicv2(run, sessions)
    videos = [video for batch in rest for video in batch]
    if late:
        videos = _late(first, videos, run)
    return [list(first), *chunks(videos, VIDEOS_A_BATCH[protocol])]


def chunks(videos: Sequence[Video], size: int) -> List[List[Video]]:
    return [list(videos[start : start + size]) for start in range(0, len(videos), size)]


def _late(first: Sequence[Video], videos: Sequence[Video], run: int) -> List[Video]:
    """The same videos: the first one of each new object at evenly spaced places, between them a random one of what is known by then."""
    rng = np.random.Generator(np.random.PCG64([run, 1]))
    known = {thing for thing, _ in first}
    new = list(dict.fromkeys(thing for thing, _ in videos if thing not in known))
    arrivals = {round(LAST_ARRIVAL * len(videos) * (place + 1) / len(new)) - 1: thing for place, thing in enumerate(new)}
    waiting = {thing: [video for video in videos if video[0] == thing] for thing in new}
    pool = [video for video in videos if video[0] in known]
    found: List[Video] = []
    for place in range(len(videos)):
        if place in arrivals:
            arriving, *later = waiting[arrivals[place]]
            found.append(arriving)
            pool += later
        else:
            found.append(pool.pop(int(rng.integers(len(pool)))))
    return found
