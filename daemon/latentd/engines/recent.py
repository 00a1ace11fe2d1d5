"""The last images that were taught, for calibrating an INT8 plan on them and judging it by them. In memory only, and gone with the process;
never on the disk.

Filled by the decode pool, read by the thread that builds a plan; nothing blocks.
"""

from __future__ import annotations

from collections import deque
from typing import Deque, List

import numpy as np
from numpy.typing import NDArray

KEPT = 60  # 9 MB at 224 pixels
ENOUGH = 32  # to calibrate on: drawn images alone say little of how far the values of photographs reach


class RecentImages:
    """At most KEPT images (S, S, 3); the oldest make room."""

    def __init__(self) -> None:
        self._kept: Deque[NDArray[np.uint8]] = deque(maxlen=KEPT)

    def add(self, pixels: NDArray[np.uint8]) -> None:
        self._kept.append(pixels)

    def all(self) -> List[NDArray[np.uint8]]:
        """The oldest first."""
        return list(self._kept)
