"""What to measure: plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import List, NamedTuple, Tuple

from latentd.learning.tuning.candidates import Limits
from latentd.vision.checkpoints import Backbone


class Cell(NamedTuple):
    """One split with one way of keeping tokens. tokens: kept of a latent, 0 where the head alone learns."""

    split: int
    token_grid: int
    tokens: int

    def __str__(self) -> str:
        return f"split {self.split}, {self.tokens} tokens" if self.tokens else f"split {self.split}"


@dataclass(frozen=True)
class Plan:
    """What to measure. grids: token grids of splits below the depth. codecs: (name, kind). slots: wanted in the replay memory."""

    splits: Tuple[int, ...]
    grids: Tuple[int, ...]
    codecs: Tuple[Tuple[str, str], ...]
    slots: int
    sleep_s: float
    limits: Limits

    def cells(self, backbone: Backbone, image_size: int) -> List[Cell]:
        """Deepest split first. A grid that does not divide the patches' own, or is as fine, is left out."""
        shape, found = backbone.shape, []
        for split in sorted(set(self.splits), reverse=True):
            if split == shape.depth:
                found.append(Cell(split, 0, 0))
                continue
            for grid in self.grids:
                if not grid:
                    found.append(Cell(split, 0, shape.tokens(image_size)))
                elif grid < shape.side(image_size) and shape.side(image_size) % grid == 0:
                    found.append(Cell(split, grid, 1 + shape.registers + grid * grid))
        return found
