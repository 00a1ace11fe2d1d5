"""Finding and reading image files: folders, odd names, files that can't be read.

Reads from disk in the verb's thread. One file that can't be used never stops the others; it comes back with its problem in its place.
"""

from __future__ import annotations

import os
import stat
import sys
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

from latentd.cli.terminal import plain, problem
from latentd.errors import FileUnusable, LatentdError, TooLarge

SUFFIXES = frozenset((".jpg", ".jpeg", ".jpe", ".png", ".webp", ".bmp"))


class Picture(NamedTuple):
    """One file to send; `path` "-" is stdin; `label` is None where nothing is taught."""

    path: str
    label: Optional[str] = None


class Outcome(NamedTuple):
    """What became of one file: the daemon's result, or {"problem": …}. `local` says that the daemon never saw it."""

    picture: Picture
    result: Dict[str, Any]
    local: bool = False


@dataclass
class Found:
    """Files to send, files and folders that can't be, and how many files were passed over because their names are not those of images."""

    pictures: List[Picture] = field(default_factory=list)
    unusable: List[Outcome] = field(default_factory=list)
    passed_over: int = 0

    def add_folder(self, folder: str, label: Optional[str]) -> None:
        """Every image below `folder`, in name order; hidden files and folders are left alone."""
        for root, folders, names in os.walk(folder, onerror=lambda error: self._unreadable(label, error)):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(name for name in names if not name.startswith(".")):
                if Path(name).suffix.lower() in SUFFIXES:
                    self.pictures.append(Picture(str(Path(root, name)), label))
                else:
                    self.passed_over += 1

    def add_class(self, folder: Path) -> None:
        """A folder whose name is the class of the images in it."""
        try:
            folder.name.encode("utf-8")
        except UnicodeEncodeError:
            reason = FileUnusable(
                f"{plain(folder)}: the name of this folder is not UTF-8.", hint="Rename the folder, or teach it with --label."
            )
            self.unusable.append(failed(Picture(str(folder)), reason))
        else:
            self.add_folder(str(folder), folder.name)

    def _unreadable(self, label: Optional[str], error: OSError) -> None:
        self.unusable.append(failed(Picture(str(error.filename), label), _unusable(str(error.filename), error)))


def failed(picture: Picture, error: LatentdError) -> Outcome:
    return Outcome(picture, {"problem": problem(error)}, local=True)


def find(paths: Sequence[str], label: Optional[str] = None) -> Found:
    """The images that `paths` name: files as they are, folders with all that is in them."""
    found = Found()
    for path in paths:
        if path != "-" and Path(path).is_dir():
            found.add_folder(path, label)
        else:
            found.pictures.append(Picture(path, label))
    return found


def find_by_class(folder: str) -> Found:
    """The images of a folder that holds one folder a class; nested folders belong to their class, loose files to none."""
    found = Found()
    try:
        entries = sorted(entry for entry in Path(folder).iterdir() if not entry.name.startswith("."))
    except OSError as cause:
        raise _unusable(folder, cause) from cause
    for entry in entries:
        if entry.is_dir():
            found.add_class(entry)
        else:
            found.passed_over += 1
    found.pictures = _alternating(found.pictures)
    return found


def _alternating(pictures: Sequence[Picture]) -> List[Picture]:
    """One of each class in turn, so that every mini-batch shows all classes and a stop leaves none out."""
    by_class: Dict[Optional[str], List[Picture]] = {}
    for picture in pictures:
        by_class.setdefault(picture.label, []).append(picture)
    rounds = zip_longest(*by_class.values())
    return [picture for each in rounds for picture in each if picture is not None]


def read(path: str, most_bytes: int) -> bytes:
    """The content of a file, or of stdin for "-". Raises FileUnusable, and TooLarge before more than `most_bytes` are in memory."""
    if path == "-":
        return _small_enough(path, sys.stdin.buffer.read(most_bytes + 1), most_bytes)
    try:
        if not stat.S_ISREG(Path(path).stat().st_mode):
            raise FileUnusable(f"{plain(path)} is not a regular file.")
        with Path(path).open("rb") as file:
            return _small_enough(path, file.read(most_bytes + 1), most_bytes)
    except OSError as cause:
        raise _unusable(path, cause) from cause


def _small_enough(path: str, data: bytes, most_bytes: int) -> bytes:
    if len(data) > most_bytes:
        raise TooLarge(f"{plain(path)} is larger than {most_bytes} bytes, the most that the daemon takes.")
    return data


def _unusable(path: str, cause: OSError) -> FileUnusable:
    return FileUnusable(f"{plain(path)}: {cause.strerror or cause}.")
