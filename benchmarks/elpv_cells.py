"""The ELPV photographs: 2,624 electroluminescence images of solar cells, with the probability that a cell is defective.

Deitsch et al. 2019, "Automatic classification of defective photovoltaic module cells in electroluminescence images" (CC BY-NC-SA 4.0:
read from the package `elpv-dataset`, never part of this repository). Published with 25 % held out: SVM 82.44 %, fine-tuned VGG19 88.42 %.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import List, NamedTuple, Sequence, Tuple

import numpy as np

REQUIREMENT = "elpv-dataset==1.0.0.post1"
WHEEL_SHA256 = "85e31c1126ee9b48e62d3a0232c58f58b2d189b0814a45c13642fa0415af4a4c"
HELD_OUT = 0.25


class Cell(NamedTuple):
    """One photograph: PNG bytes, module ("mono" or "poly"), and whether the probability of a defect is above one half."""

    png: bytes
    module: str
    defective: bool

    @property
    def kind(self) -> str:
        return "defective" if self.defective else "functional"


def load(cache_dir: Path) -> List[Cell]:
    """All cells, in the package's order; downloads the package (91 MB) once, and checks its hash."""
    folder = cache_dir / "datasets" / "elpv"
    wheels = sorted(folder.glob("*.whl"))
    if not wheels or _sha256(wheels[0]) != WHEEL_SHA256:
        wheels = [_download(folder)]
    with zipfile.ZipFile(wheels[0]) as wheel:
        lines = wheel.read("elpv_dataset/data/labels.csv").decode().splitlines()
        rows = [line.split() for line in lines if line.strip()]
        return [Cell(wheel.read("elpv_dataset/data/" + path), module, float(probability) > 0.5) for path, probability, module in rows]


def split(cells: Sequence[Cell], seed: int) -> Tuple[List[int], List[int]]:
    """Indices to teach and to hold out: a quarter of each module and kind, both shuffled by the seed."""
    rng = np.random.Generator(np.random.PCG64(seed))
    taught: List[int] = []
    held: List[int] = []
    for module in ("mono", "poly"):
        for defective in (False, True):
            group = rng.permutation([i for i, cell in enumerate(cells) if cell.module == module and cell.defective == defective])
            cut = round(len(group) * HELD_OUT)
            held += [int(i) for i in group[:cut]]
            taught += [int(i) for i in group[cut:]]
    return [int(i) for i in rng.permutation(taught)], held


def _download(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, REQUIREMENT]
        done = subprocess.run(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, check=False)
        found = sorted(Path(scratch).glob("*.whl"))
        if done.returncode or not found:
            raise SystemExit(f"The ELPV photographs could not be downloaded: {done.stderr.decode(errors='replace')[-500:]}")
        if _sha256(found[0]) != WHEEL_SHA256:
            raise SystemExit(f"{found[0].name} is not the file it should be (sha256 {_sha256(found[0])}); nothing was used of it.")
        target = folder / found[0].name
        found[0].replace(target)
        return target


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()
