"""Attention heads taken out of a backbone for real: smaller matrices, no masks. Plain numpy, any thread; milliseconds, and disk to install.

Which heads to take is decided elsewhere (learning.pruning). A head is (block, head), counted from 0 in the backbone at hand. Every block
keeps at least one head: a matrix without rows is something that exporters and engines disagree about.
"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Collection, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import numpy as np
from numpy.typing import NDArray

from latentd.vision import checkpoints
from latentd.vision.checkpoints import Backbone
from latentd.vision.names import canonical_shapes
from latentd.vision.shape import VitShape

Head = Tuple[int, int]
Arrays = Mapping[str, NDArray[np.float32]]


class Pruned(NamedTuple):
    """Canonical weights and the shape that they make."""

    weights: Dict[str, NDArray[np.float32]]
    shape: VitShape


def without_heads(weights: Arrays, shape: VitShape, heads: Collection[Head], means: Sequence[NDArray[np.float32]] = ()) -> Pruned:
    """The same backbone without these heads: their rows of qkv and their columns of proj are gone, everything else is as it was.

    means: for each block, what its heads give on average, (H*E,): the part of the removed ones goes on as a constant in the bias of proj,
    so that what stays is not shifted. Empty: the bias stays as it is. Asserts that the heads exist and that each block keeps one.
    """
    gone = set(heads)
    assert all(0 <= block < shape.depth and 0 <= head < shape.heads[block] for block, head in gone), "there is no such head"
    left = {name: np.array(value, dtype=np.float32) for name, value in weights.items()}
    counts = list(shape.heads)
    for block in sorted({block for block, _ in gone}):
        kept = [head for head in range(shape.heads[block]) if (block, head) not in gone]
        assert kept, f"block {block} would lose all its heads"
        counts[block] = len(kept)
        _cut(left, f"blocks.{block}", columns_of(kept, shape.head_width), means[block] if len(means) else None)
    return Pruned(left, dataclasses.replace(shape, heads=tuple(counts)))


def columns_of(heads: Sequence[int], head_width: int) -> NDArray[np.int64]:
    """Where the heads of one block lie among the columns of its proj."""
    return np.concatenate([np.arange(head * head_width, (head + 1) * head_width) for head in heads])


def _cut(weights: Dict[str, NDArray[np.float32]], block: str, kept: NDArray[np.int64], mean: Optional[NDArray[np.float32]]) -> None:
    """One block, in place; kept: columns of proj, and rows of each third of qkv, that stay."""
    proj = weights[f"{block}.proj.weight"]  # (D, H*E)
    inner = proj.shape[1]
    if mean is not None:
        gone = np.setdiff1d(np.arange(inner), kept)
        weights[f"{block}.proj.bias"] = weights[f"{block}.proj.bias"] + proj[:, gone] @ mean[gone]
    weights[f"{block}.proj.weight"] = np.ascontiguousarray(proj[:, kept])
    for part in ("weight", "bias"):
        thirds = np.split(weights[f"{block}.qkv.{part}"], 3)  # query, key, value: (H*E, …) each
        weights[f"{block}.qkv.{part}"] = np.concatenate([third[kept] for third in thirds])


def heads_in(shape: VitShape) -> List[Head]:
    """Every head, block by block."""
    return [(block, head) for block, count in enumerate(shape.heads) for head in range(count)]


def parameters(shape: VitShape) -> int:
    """How many numbers the backbone's weights are."""
    return sum(int(np.prod(size)) for size in canonical_shapes(shape).values())


def default_name(base: str, removed: int, total: int) -> str:
    """`<base>-pruned-<percent>`: the share of the heads of `base` that is gone, rounded to whole percent."""
    return f"{base}-pruned-{round(100 * removed / total)}"


def install(cache_dir: Path, base: Backbone, pruned: Pruned, heads: Collection[Head], name: str, *, numbered: bool = False) -> Backbone:
    """The pruned weights in the cache; `source` says what they were made from and which heads are gone. Raises CheckpointError.

    numbered: where the name is taken by other weights, take name-2, name-3 and so on instead of refusing.
    """
    listed = " ".join(f"{block + 1}.{head + 1}" for block, head in sorted(heads))
    source = f"pruned from {base.name} (sha256 {base.sha256}), without heads {listed} (block.head, from 1)"
    if numbered:
        name = _free(name, pruned, {backbone.name: backbone for backbone in checkpoints.installed(cache_dir)})
    return checkpoints.add(cache_dir, name, pruned.weights, pruned.shape, source)


def _free(name: str, pruned: Pruned, taken: Mapping[str, Backbone]) -> str:
    """The first of name, name-2, … that is free, or that holds these very weights."""
    for candidate in itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2))):
        present = taken.get(candidate)
        if present is None or (present.shape == pruned.shape and _equal(checkpoints.read_weights(present), pruned.weights)):
            return candidate
    raise AssertionError("counting ended")


def _equal(one: Arrays, other: Arrays) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)
