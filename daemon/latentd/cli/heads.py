"""The picture of a backbone's heads: one cell a head, one row a block, darker the more it is worth; removed ones are crossed out."""

from __future__ import annotations

from pathlib import Path
from typing import Collection, List, Sequence, Tuple

from rich.text import Text

from latentd.errors import FileUnusable

Rows = Sequence[Sequence[float]]  # worth of each head, one row a block
_SHADES = "·░▒▓█"
_SIDE, _GAP, _LEFT, _TOP = 36, 4, 40, 28  # pixels


def shades(worth: Rows) -> List[List[float]]:
    """Each head's place among all heads, 0 (the least worth) to 1: the values themselves spread over decades."""
    order = sorted({value for row in worth for value in row})
    place = {value: index / max(1, len(order) - 1) for index, value in enumerate(order)}
    return [[place[value] for value in row] for row in worth]


def drawn(worth: Rows, removed: Collection[Tuple[int, int]]) -> Text:
    """For a terminal. removed: (block, head) from 0."""
    text = Text(f"        head 1 … {max(len(row) for row in worth)}, darker is worth more, x is removed\n", style="dim")
    for block, row in enumerate(shades(worth)):
        text.append(f"block {block + 1:>2} ", style="dim")
        for head, shade in enumerate(row):
            if (block, head) in removed:
                text.append("x ", style="red")
            else:
                text.append(_SHADES[round(shade * (len(_SHADES) - 1))] * 2 if shade else _SHADES[0] + " ", style="green")
        text.append("\n")
    text.rstrip()
    return text


def save(worth: Rows, removed: Collection[Tuple[int, int]], path: Path) -> None:
    """The same as a picture file, PNG unless the name says otherwise. Raises FileUnusable."""
    from PIL import Image, ImageDraw

    columns = max(len(row) for row in worth)
    image = Image.new("RGB", (_LEFT + columns * (_SIDE + _GAP), _TOP + len(worth) * (_SIDE + _GAP)), "white")
    pen = ImageDraw.Draw(image)
    for head in range(columns):
        pen.text((_LEFT + head * (_SIDE + _GAP) + _SIDE // 3, _TOP // 3), str(head + 1), fill="black")
    for block, row in enumerate(shades(worth)):
        top = _TOP + block * (_SIDE + _GAP)
        pen.text((_LEFT // 3, top + _SIDE // 3), str(block + 1), fill="black")
        for head, shade in enumerate(row):
            left = _LEFT + head * (_SIDE + _GAP)
            corners = (left, top, left + _SIDE, top + _SIDE)
            pen.rectangle(corners, fill=_colour(shade))
            if (block, head) in removed:
                pen.line(corners, fill="crimson", width=3)
                pen.line((left, top + _SIDE, left + _SIDE, top), fill="crimson", width=3)
    try:
        image.save(path)
    except (OSError, ValueError) as cause:
        raise FileUnusable(f"the picture can't be written to {path}: {cause}", hint="Name a file that ends with .png.") from cause


def _colour(shade: float) -> Tuple[int, int, int]:
    """From almost white to dark green."""
    return (round(235 - 215 * shade), round(243 - 155 * shade), round(235 - 180 * shade))
