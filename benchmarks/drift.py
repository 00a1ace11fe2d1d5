"""Drift: how often a class is said to look different when it does not, and how soon when it does, on Objects-50.

Streamed through the daemon's own Trainer, the closed-form head alone, four frames of a video a lesson, in random order. First six sessions
are taught, then the validation sessions 5 and 9, new rooms: every alarm up to here is false. Then, beside more of the same, ten classes
change: a new camera (the object small, turned and noisy: the stream `far`), or another object under the old name.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Sequence

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

import harness
import latents50
import objects50
from latentd import config
from latentd.learning.drift import MIN_LESSONS
from latentd.vision import checkpoints
from methods.daemon import Latentd
from methods.protocol import Lesson

FRAMES = 4  # a lesson
CHANGED = 10  # classes
console = Console()
Features = NDArray[np.float32]  # (50, 11, FRAMES, F)


class Clip(NamedTuple):
    """A few frames of a video. told: the object that the teacher says it is."""

    told: int
    thing: int
    session: int
    start: int


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="out/drift.json")
    parser.add_argument("--orders", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    settings = config.load(os.environ, {})
    checkpoints.pull(settings.cache_dir, progress=console.print)
    usual, far = (latents50.features(settings, stream) for stream in (objects50.STANDARD, objects50.FAR))
    runs = []
    for order in track(arguments.orders, "orders", console=console):
        runs += [{"order": order, "change": change, **_run(usual, far, order, change, settings)} for change in ("camera", "object")]
    summary = _summary(runs)
    harness.save_json(Path(arguments.out), {"machine": harness.machine(), "runs": runs, "summary": summary})
    for key, value in summary.items():
        console.print(f"{key.replace('_', ' '):44} {value}")
    return 0


class Teacher:
    """Teaches clips, and counts the alarms of each class: how many began, and how many lessons of how many classes could have begun one."""

    def __init__(self, features: Features, settings: config.Config) -> None:
        self.features = features
        self.alarms: Dict[int, int] = {}  # class -> lessons until its alarm, of those taught since `begin`
        self.judged = self.began = 0
        self._learner = Latentd(len(features), settings.learn, features.shape[-1], settings.backbone.class_tokens, floor_only=True)
        self._taught: Dict[int, int] = {}
        self._drifting: Dict[int, bool] = {}
        self._number = 0

    def begin(self) -> None:
        self.judged = self.began = 0
        self.alarms, self._taught = {}, {}

    def teach(self, clip: Clip, features: Features) -> None:
        frames = np.ascontiguousarray(features[clip.thing, clip.session - 1, clip.start : clip.start + FRAMES])
        self._learner.learn(Lesson(self._number, frames, np.full(len(frames), clip.told)))
        self._number += 1
        self._taught[clip.told] = self._taught.get(clip.told, 0) + 1
        found = self._learner.trainer.foresight.drift.of(clip.told)
        self.judged += found is not None
        now = found is not None and found.drifting
        if now and not self._drifting.get(clip.told, False):
            self.began += 1
            self.alarms.setdefault(clip.told, self._taught[clip.told])
        self._drifting[clip.told] = now


def _run(usual: Features, far: Features, order: int, change: str, settings: config.Config) -> Dict[str, Any]:
    rng = np.random.Generator(np.random.PCG64([order, 20]))
    things, teacher = list(range(len(usual))), Teacher(usual, settings)
    open_sessions = [s for s in objects50.SESSIONS if s not in objects50.TEST_SESSIONS]
    known = [s for s in open_sessions if s not in objects50.VALIDATION_SESSIONS]
    _teach(teacher, _clips(usual, things, known, rng), usual)
    first = {"lessons": teacher.judged, "false_alarms": teacher.began}
    teacher.begin()
    _teach(teacher, _clips(usual, things, objects50.VALIDATION_SESSIONS, rng), usual)
    rooms = {"lessons_in_new_rooms": teacher.judged, "false_alarms_in_new_rooms": teacher.began}
    teacher.begin()
    chosen = rng.permutation(things)[:CHANGED].tolist()
    clips = _clips(far, chosen, open_sessions, rng)
    if change == "object":
        other = dict(zip(chosen, chosen[1:] + chosen[:1]))
        clips = [clip._replace(thing=other[clip.told]) for clip in clips]
    _teach(teacher, clips, far if change == "camera" else usual)
    delays = [teacher.alarms[thing] for thing in chosen if thing in teacher.alarms]
    return {**first, **rooms, "changed": CHANGED, "found": len(delays), "lessons_until_found": delays}


def _clips(features: Features, things: Sequence[int], sessions: Sequence[int], rng: np.random.Generator) -> List[Clip]:
    starts = range(0, features.shape[2], FRAMES)
    clips = [Clip(thing, thing, session, start) for thing in things for session in sessions for start in starts]
    return [clips[i] for i in rng.permutation(len(clips))]


def _teach(teacher: Teacher, clips: Sequence[Clip], features: Features) -> None:
    for clip in clips:
        teacher.teach(clip, features)


def _summary(runs: Sequence[Dict[str, Any]]) -> Dict[str, Any]:
    once = [run for run in runs if run["change"] == runs[0]["change"]]  # what comes before the change is the same for both
    summary: Dict[str, Any] = {"lessons_that_wait": MIN_LESSONS}
    for key in ("lessons", "false_alarms", "lessons_in_new_rooms", "false_alarms_in_new_rooms"):
        summary[key] = sum(run[key] for run in once)
    for change in ("camera", "object"):
        those = [run for run in runs if run["change"] == change]
        delays = [delay for run in those for delay in run["lessons_until_found"]]
        summary[f"found_{change}"] = f"{len(delays)} of {sum(run['changed'] for run in those)}"
        summary[f"median_lessons_until_found_{change}"] = float(np.median(delays)) if delays else None
    return summary


if __name__ == "__main__":
    sys.exit(main())
