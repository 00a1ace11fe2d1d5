"""Unknown: forty of the fifty objects of Objects-50 are taught, one video at a time, and all fifty are asked about.

Streamed through the daemon's own Trainer; the floor alone, since it is what tells the unknown. Reported for several choices of the ten
that are left out: AUROC of likeness between pictures of taught and of never taught objects, the share of each that is answered "unknown",
and how many of the right answers that costs, at the configured rate and at others. By default the validation sessions 5 and 9 are asked
about, and 1, 2, 4, 6, 8 and 11 taught.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from pathlib import Path
from typing import Any, Dict, List, Sequence

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

import harness
import latents50
import objects50
from latentd import config
from latentd.learning.snapshot import UNKNOWN, Snapshot
from latentd.learning.unknown import auroc, to_answer
from latentd.vision import checkpoints
from methods.daemon import Latentd
from methods.protocol import Lesson

LEFT_OUT = 10
RATES = (0.01, 0.02, 0.05, 0.1)  # of learn.unknown_rate, beside the configured one
console = Console()
Features = NDArray[np.float32]  # (50, 11, FRAMES, F)
Rows = NDArray[np.float32]  # (B, F)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="out/unknown.json")
    parser.add_argument("--choices", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="seeds: which ten are left out, and the order")
    parser.add_argument("--stream", choices=sorted(objects50.STREAMS), default="standard")
    parser.add_argument("--test", action="store_true", help="ask about the test sessions 3, 7 and 10 and teach all others")
    arguments = parser.parse_args()
    settings = config.load(os.environ, {})
    checkpoints.pull(settings.cache_dir, progress=console.print)
    features = latents50.features(settings, objects50.STREAMS[arguments.stream])
    asked = objects50.TEST_SESSIONS if arguments.test else objects50.VALIDATION_SESSIONS
    taught = [s for s in objects50.SESSIONS if s not in (*asked, *objects50.TEST_SESSIONS)]
    runs = [_run(features, seed, taught, asked, settings) for seed in track(arguments.choices, "choices", console=console)]
    means = {key: float(np.mean([run[key] for run in runs])) for key in runs[0] if isinstance(runs[0][key], float)}
    sessions = {"taught": taught, "asked": list(asked)}
    result = {"machine": harness.machine(), "stream": arguments.stream, "sessions": sessions, "runs": runs, "mean": means}
    harness.save_json(Path(arguments.out), result)
    for key, value in means.items():
        console.print(f"{key.replace('_', ' '):28} {value:.3f} ± {np.std([run[key] for run in runs]):.3f}")
    return 0


def _run(features: Features, seed: int, taught: Sequence[int], asked: Sequence[int], settings: config.Config) -> Dict[str, Any]:
    """One choice of objects and order of videos."""
    rng = np.random.Generator(np.random.PCG64(seed))
    things = rng.permutation(len(features)).tolist()
    novel, known = sorted(things[:LEFT_OUT]), sorted(things[LEFT_OUT:])
    videos = [(thing, session) for thing in known for session in taught]
    learner = Latentd(len(features), settings.learn, features.shape[-1], settings.backbone.class_tokens, floor_only=True)
    for number, (thing, session) in enumerate(videos[i] for i in rng.permutation(len(videos))):
        video = np.ascontiguousarray(features[thing, session - 1])
        learner.learn(Lesson(number, video, np.full(len(video), thing)))
    snapshot, report = learner.trainer.candidate({thing: str(thing) for thing in known}, 0.0)
    days = [session - 1 for session in asked]
    truth = np.repeat(known, len(days) * features.shape[2])
    known_rows, novel_rows = _rows(features[known][:, days]), _rows(features[novel][:, days])
    figures = _figures(snapshot, known_rows, truth, novel_rows)
    for rate in RATES:
        below, _ = learner.trainer.foresight.answers.threshold(rate)
        other = _figures(dataclasses.replace(snapshot, unknown_below=below), known_rows, truth, novel_rows)
        figures.update({f"{key}_at_{rate:g}": other[key] for key in ("novel_refused", "right_answers_refused")})
    return {"seed": seed, "left_out": novel, **figures, "unknown": dataclasses.asdict(report.unknown)}


def _figures(snapshot: Snapshot, known: Rows, truth: NDArray[np.int64], novel: Rows) -> Dict[str, float]:
    """Shares, of the pictures asked, of taught (`known`) and never taught (`novel`) objects."""
    columns, sureness = to_answer(snapshot.analytic, known)
    right = np.array(snapshot.class_ids)[columns] == truth
    strangeness = to_answer(snapshot.analytic, novel)[1]
    refused = _refused(snapshot, known)
    return {
        "auroc": auroc(sureness, strangeness),
        "auroc_of_right_answers": auroc(sureness[right], strangeness),
        "auroc_of_largest_probability": auroc(snapshot.predict(known).max(axis=1), snapshot.predict(novel).max(axis=1)),
        "accuracy": float(right.mean()),
        "novel_refused": float(_refused(snapshot, novel).mean()),
        "right_answers_refused": float(refused[right].mean()),
        "wrong_answers_refused": float(refused[~right].mean()) if not right.all() else 0.0,
    }


def _refused(snapshot: Snapshot, rows: Rows) -> NDArray[np.bool_]:
    refused: NDArray[np.bool_] = np.array(snapshot.decide(rows, snapshot.predict(rows))) == UNKNOWN
    return refused


def _rows(some: Features) -> Rows:
    rows: List[Rows] = [np.asarray(one).reshape(-1, some.shape[-1]) for one in some]
    return np.concatenate(rows)


if __name__ == "__main__":
    sys.exit(main())
