"""NICv2-391 on Objects-50, through latentd's own learner: ten objects first, then one video of one object at a time.

Frames pass the frozen stage once and are cached; each order is then streamed through the daemon's Trainer (ridge sums, replay memory,
trained head, gate), one video a mini-batch. Reported: accuracy on all 50 objects of the test sessions 3, 7, 10 after the last batch, mean
and standard deviation over the orders, and the accuracy of the floor alone beside it. With --validation the sessions 5 and 9 are held out
instead of learned: that is where settings are chosen.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

import harness
import latents50
import objects50
from latentd import config
from latentd.learning.trainer import Trainer, TrainerSettings
from latentd.replay.latents import make_latent_codec
from latentd.replay.records import Entry, sample_id_of
from latentd.vision import checkpoints

console = Console()
Features = NDArray[np.float32]  # (50, 11, FRAMES, F)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="out/nicv2.json")
    parser.add_argument("--orders", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--validation", action="store_true", help="hold out sessions 5 and 9 of the training, and leave the test alone")
    arguments = parser.parse_args()
    settings = config.load(os.environ, {})
    features = frozen_features(settings)
    held = objects50.VALIDATION_SESSIONS if arguments.validation else objects50.TEST_SESSIONS
    taught = [s for s in objects50.SESSIONS if s not in (*held, *objects50.TEST_SESSIONS)]
    runs = [_run(features, order, taught, held, settings) for order in track(arguments.orders, "orders", console=console)]
    result = {
        "machine": harness.machine(),
        "sessions": {"taught": taught, "asked": list(held)},
        "runs": runs,
        "mean": float(np.mean([run["accuracy"] for run in runs])),
        "std": float(np.std([run["accuracy"] for run in runs])),
        "floor_mean": float(np.mean([run["floor_accuracy"] for run in runs])),
    }
    harness.save_json(Path(arguments.out), result)
    console.print(f"{result['mean']:.2f} % ± {result['std']:.2f} (floor alone {result['floor_mean']:.2f} %) on sessions {list(held)}")
    return 0


def frozen_features(settings: config.Config) -> Features:
    """The frozen stage's features of every frame."""
    checkpoints.pull(settings.cache_dir, progress=console.print)
    return latents50.features(settings)


def _run(features: Features, order: int, taught: Sequence[int], held: Sequence[int], settings: config.Config) -> Dict[str, Any]:
    """One order of the stream, and what is known at its end."""
    learn, tokens = settings.learn, settings.backbone.class_tokens
    width = features.shape[-1]
    codec = make_latent_codec(learn.codec, learn.codec_kind, (tokens, width // tokens), seed=learn.seed)
    training = TrainerSettings(learn.replay_bytes, learn.minibatch, learn.epochs, learn.learning_rate, learn.label_smoothing, learn.seed)
    trainer = Trainer(codec, width, training)
    started = time.perf_counter()
    seen: Dict[int, int] = {}
    seq = 0
    for videos in objects50.nicv2(order, taught):
        frames = np.concatenate([features[thing, session - 1] for thing, session in videos])
        things = [thing for thing, _ in videos for _ in range(features.shape[2])]
        codes = codec.encode(frames)
        first, batch = seq + 1, []
        for thing, code in zip(things, codes):
            seq += 1
            count = seen[thing] = seen.get(thing, 0) + 1
            holdout = learn.holdout_every > 0 and count % learn.holdout_every == 0
            batch.append(Entry(seq, "sample", first, sample_id_of(seq), thing, None, holdout, code.tobytes(), 0.0))
        for _ in trainer.take(batch):
            pass
    seconds = time.perf_counter() - started
    snapshot, _ = trainer.candidate({thing: str(thing) for thing in seen}, 0.0)
    asked, truth = _asked(features, held)
    per_class = _right(snapshot.predict(asked), snapshot.class_ids, truth)
    floor = dataclasses.replace(snapshot, weight=0.0)
    return {
        "order": order,
        "accuracy": 100 * float(np.mean(per_class)),
        "floor_accuracy": 100 * float(np.mean(_right(floor.predict(asked), floor.class_ids, truth))),
        "trained_head_weight": snapshot.weight,
        "learn_s": seconds,
        "samples": seq,
        "replay_bytes": trainer.memory.used_bytes,
        "per_object": [100 * float(np.mean(per_class[truth == thing])) for thing in range(len(objects50.OBJECTS))],
    }


def _asked(features: Features, sessions: Sequence[int]) -> Tuple[NDArray[np.float32], NDArray[np.int64]]:
    chosen = features[:, [session - 1 for session in sessions]]
    things, _, _, width = chosen.shape
    return chosen.reshape(-1, width), np.repeat(np.arange(things), chosen.shape[1] * chosen.shape[2])


def _right(probabilities: NDArray[np.float64], class_ids: Sequence[int], truth: NDArray[np.int64]) -> NDArray[np.bool_]:
    answers: List[int] = [class_ids[int(column)] for column in probabilities.argmax(axis=1)]
    right: NDArray[np.bool_] = np.array(answers) == truth
    return right


if __name__ == "__main__":
    sys.exit(main())
