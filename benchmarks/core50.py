"""CORe50 as NICv2 streams it: the official batch lists and the frames of core50_128x128, checked before anything is computed.

Frames are read from `DIR/s1/o1/C_01_01_000.png` …, lists from `FILELISTS/NIC_v2_391/run0/train_batch_00_filelist.txt` … and
`test_filelist.txt` beside them; both come from the data set's authors (core50_128x128.zip, batches_filelists_NICv2.zip). Nothing is fetched
here. Checking reads the lists and asks the size of every frame: seconds.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

CLASSES = 50
FRAMES = 119_894  # training frames of every NICv2 stream
TEST_FRAMES = 44_972
FIRST_BATCH = 2_999
# Frames of a later batch, least and most, over the ten runs.
BATCH_FRAMES: Dict[int, Tuple[int, int]] = {79: (1_492, 1_500), 196: (593, 600), 391: (293, 300)}
TEST_SESSIONS = (3, 7, 10)
VALIDATION_SESSIONS = (5, 9)  # training sessions on which settings are chosen
MOST_PROBLEMS = 40
_LINE = re.compile(r"(s(\d+)/o(\d+)/C_\d\d_\d\d_\d+\.png)\s+(\d+)")


class Frame(NamedTuple):
    """One frame of a list: path under core50_128x128, session and class (object, from 0)."""

    path: str
    session: int
    label: int


class Lists(NamedTuple):
    """One run's stream: frames of each batch, and the test frames."""

    batches: List[List[Frame]]
    test: List[Frame]


class Incomplete(Exception):
    """What is missing or short, one a line."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        shown = self.problems[:MOST_PROBLEMS]
        more = [f"… and {len(self.problems) - len(shown)} more"] if len(self.problems) > len(shown) else []
        super().__init__("CORe50 is not complete:\n" + "\n".join([*shown, *more]))


def read_lists(filelists: Path, protocol: int, run: int) -> Lists:
    """The official lists of one run. Raises Incomplete that names every file that is missing, short or malformed."""
    folder = filelists / f"NIC_v2_{protocol}" / f"run{run}"
    problems: List[str] = []
    batches = [
        _read_list(folder / f"train_batch_{index:02d}_filelist.txt", *_expected(protocol, index), problems) for index in range(protocol)
    ]
    test = _read_list(folder / "test_filelist.txt", TEST_FRAMES, TEST_FRAMES, problems)
    total = sum(len(batch) for batch in batches)
    if not problems and total != FRAMES:
        problems.append(f"{folder}: the batch lists name {total} frames, not {FRAMES}")
    if problems:
        raise Incomplete(problems)
    return Lists(batches, test)


def check_frames(root: Path, frames: Iterable[Frame]) -> None:
    """Raises Incomplete that names every frame that is missing or empty; a video of which none is there is named once."""
    problems: List[str] = []
    videos: Dict[str, List[str]] = {}
    for path in sorted({frame.path for frame in frames}):
        videos.setdefault(path.rpartition("/")[0], []).append(path)
    for video, paths in videos.items():
        missing = [path for path in paths if _size(root / path) == 0]
        if len(missing) == len(paths) and not (root / video).is_dir():
            problems.append(f"{root / video}: missing, with its {len(paths)} frames")
        else:
            problems += [f"{root / path}: missing or empty" for path in missing]
    if problems:
        raise Incomplete(problems)


def read_frames(root: Path, paths: Sequence[str]) -> NDArray[np.uint8]:
    """(B, 128, 128, 3) RGB."""
    pictures = []
    for path in paths:
        with Image.open(root / path) as picture:
            pictures.append(np.asarray(picture.convert("RGB")))
    return np.stack(pictures)


def without(lists: Lists, sessions: Sequence[int]) -> Lists:
    """The stream with these sessions held out: asked instead of the test, and taken out of the batches (an empty batch goes)."""
    held = [frame for batch in lists.batches for frame in batch if frame.session in sessions]
    kept = [[frame for frame in batch if frame.session not in sessions] for batch in lists.batches]
    return Lists([batch for batch in kept if batch], held)


def one_in_twenty(filelists: Path, test: Sequence[Frame]) -> NDArray[np.int64]:
    """Places in `test` of the papers' reduced test set: those of test_filelist_20.txt where it is given, else every twentieth by path."""
    given = next(iter(sorted(filelists.rglob("test_filelist_20.txt"))), None)
    place = {frame.path: index for index, frame in enumerate(test)}
    if given is None:
        return np.array([place[path] for path in sorted(place)[::20]], np.int64)
    problems: List[str] = []
    named = _read_list(given, 1, len(test), problems)
    problems += [f"{given}: {frame.path} is not in test_filelist.txt" for frame in named if frame.path not in place]
    if problems:
        raise Incomplete(problems)
    return np.array([place[frame.path] for frame in named], np.int64)


def _expected(protocol: int, index: int) -> Tuple[int, int]:
    """Least and most frames in the list of batch `index`."""
    return (FIRST_BATCH, FIRST_BATCH) if index == 0 else BATCH_FRAMES[protocol]


def _read_list(path: Path, least: int, most: int, problems: List[str]) -> List[Frame]:
    """The frames of one list; what is wrong with it is added to `problems`."""
    try:
        lines = path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError as cause:
        problems.append(f"{path}: {cause.strerror}")
        return []
    parsed = [(number, _frame(line)) for number, line in enumerate(lines, 1) if line.strip()]
    problems += [f"{path}:{number}: not a frame and its class" for number, frame in parsed if frame is None]
    frames = [frame for _, frame in parsed if frame is not None]
    if not least <= len(parsed) <= most:
        wanted = str(least) if least == most else f"{least} to {most}"
        problems.append(f"{path}: {len(parsed)} frames instead of {wanted}")
    twice = [name for name, count in Counter(frame.path for frame in frames).items() if count > 1]
    problems += [f"{path}: {name} is there twice" for name in twice]
    return frames


def _frame(line: str) -> Optional[Frame]:
    """None where the line is not `path class` with the class that belongs to the object in the path."""
    found = _LINE.fullmatch(line.strip())
    if found is None:
        return None
    path, session, thing, label = found.group(1), int(found.group(2)), int(found.group(3)), int(found.group(4))
    return Frame(path, session, label) if label == thing - 1 and 0 <= label < CLASSES else None


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
