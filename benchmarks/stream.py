"""An Objects-50 stream taught to a running daemon over HTTP, with the defaults it ships with: one video a request, as they come.

Asks all 50 objects in the sessions held out twice: as soon as everything was learned, while the blocks have not slept over the end of it,
and once the daemon has come to rest. --step N teaches and asks every Nth frame only. Writes a JSON.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import time
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import track

import harness
import objects50
from latentd import config
from latentd.vision import checkpoints

console = Console()
Video = Tuple[int, int]  # object, session


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="out/stream.json")
    parser.add_argument("--order", type=int, default=0)
    parser.add_argument("--stream", choices=sorted(objects50.STREAMS), default="standard")
    parser.add_argument("--step", type=int, default=1)
    parser.add_argument("--validation", action="store_true", help="hold out sessions 5 and 9 of the training, and leave the test alone")
    arguments = parser.parse_args()
    settings = config.load(os.environ, {})
    checkpoints.pull(settings.cache_dir, progress=console.print)
    frames = objects50.frames(settings.cache_dir, objects50.STREAMS[arguments.stream])[:, :, :: arguments.step]
    held = objects50.VALIDATION_SESSIONS if arguments.validation else objects50.TEST_SESSIONS
    taught = [session for session in objects50.SESSIONS if session not in (*held, *objects50.TEST_SESSIONS)]
    daemon = harness.DaemonProcess(harness.scratch_folder())
    try:
        result = {"machine": harness.machine(), **vars(arguments), **_lived(daemon, frames, taught, held, arguments.order)}
    finally:
        daemon.kill()
    harness.save_json(Path(arguments.out), result)
    console.print({name: value for name, value in result.items() if name != "machine"})
    return 0


def _lived(
    daemon: harness.DaemonProcess, frames: NDArray[np.uint8], taught: Sequence[int], held: Sequence[int], order: int
) -> Dict[str, Any]:
    """frames: (50, 11, F, 128, 128, 3)."""
    started = time.perf_counter()
    batches = objects50.nicv2(order, taught)
    for videos in track(batches, "teaching", console=console):
        for video in videos:
            photos = _photos(frames, video)
            daemon.teach(photos, [objects50.OBJECTS[video[0]]] * len(photos), wait_s=60)
    taught_s = time.perf_counter() - started
    asked: List[Video] = [(thing, session) for thing in range(len(objects50.OBJECTS)) for session in held]
    awake = _accuracy(daemon, frames, asked)
    rest_s = daemon.wait_until_rested()
    learner, memory = daemon.get("/v1/learner"), daemon.get("/v1/memory")
    return {
        "images": daemon.get("/v1/status")["journal"]["samples"],
        "taught_s": taught_s,
        "accuracy_as_learned": awake,
        "rest_s": rest_s,
        "accuracy_at_rest": _accuracy(daemon, frames, asked),
        "gate": learner["gate"].get("reason"),
        "memory": {name: memory[name] for name in ("used", "used_bytes", "tokens", "holdout_bytes")},
        "resident_bytes": daemon.rss_bytes()[0],
    }


def _photos(frames: NDArray[np.uint8], video: Video) -> List[bytes]:
    thing, session = video
    return [_png(frame) for frame in frames[thing, session - 1]]


def _png(frame: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _accuracy(daemon: harness.DaemonProcess, frames: NDArray[np.uint8], asked: Sequence[Video]) -> float:
    """Percent of all frames of these videos."""
    right: List[bool] = []
    for video in track(asked, "asking", console=console):
        right += [label == objects50.OBJECTS[video[0]] for label in daemon.ask(_photos(frames, video))]
    return 100 * float(np.mean(right))


if __name__ == "__main__":
    sys.exit(main())
