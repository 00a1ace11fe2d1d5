"""Every method by name, built for one order of a stream; and the settings among which validation chose.

Pure; nothing blocks.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Sequence, Tuple

from latentd.config import LearnConfig
from methods.daemon import JointDiscriminant, Latentd
from methods.gradient import GDumb, JointSoftmax, LatentReplay, Naive
from methods.protocol import Method
from methods.statistics import NearestMean, RanPac, Ridge, Slda


@dataclass(frozen=True)
class Setting:
    """What a method is made for. width: F of a feature vector of `tokens` class tokens; seed: the order's."""

    classes: int
    width: int
    tokens: int
    seed: int
    learn: LearnConfig


def _grid(**values: Sequence[Any]) -> List[Dict[str, Any]]:
    """Every combination of these settings."""
    return [dict(zip(values, chosen)) for chosen in itertools.product(*values.values())]


_MAKERS: Dict[str, Callable[..., Method]] = {
    "naive": lambda s, **more: Naive(s.classes, s.seed, **more),
    "nearest-mean": lambda s, **more: NearestMean(s.classes, **more),
    "slda": lambda s, **more: Slda(s.classes, **more),
    "ridge": lambda s, **more: Ridge(s.classes, **more),
    "ranpac": lambda s, **more: RanPac(s.classes, s.seed, **more),
    "gdumb": lambda s, **more: GDumb(s.classes, s.seed, **more),
    "latent-replay": lambda s, **more: LatentReplay(s.classes, s.seed, **more),
    "latentd": lambda s, **more: Latentd(s.classes, s.learn, s.width, s.tokens, **more),
    "latentd-floor": lambda s, **more: Latentd(s.classes, s.learn, s.width, s.tokens, floor_only=True, **more),
    "joint-discriminant": lambda s, **more: JointDiscriminant(s.classes, s.width, **more),
    "joint-softmax": lambda s, **more: JointSoftmax(s.classes, s.seed, **more),
}
NAMES: Tuple[str, ...] = tuple(_MAKERS)
BOUNDS = ("joint-discriminant", "joint-softmax")

TITLES = {
    "naive": "naive SGD, no replay",
    "nearest-mean": "nearest class mean",
    "slda": "streaming LDA",
    "ridge": "streaming ridge, one-hot",
    "ranpac": "random projection + ridge",
    "gdumb": "GDumb, 1500 latents",
    "latent-replay": "latent replay (papers' rule), 1500 latents",
    "latentd": "**latentd**, head only",
    "latentd-floor": "latentd, closed-form head alone",
    "joint-discriminant": "joint discriminant (bound)",
    "joint-softmax": "joint softmax (bound)",
}

# What `--choose` tries, on the validation sessions; the constructors' defaults are what it chose.
GRIDS: Dict[str, List[Dict[str, Any]]] = {
    "naive": _grid(rate=(1e-5, 3e-5, 1e-4, 3e-4, 1e-3), times=(1, 4)),
    "nearest-mean": _grid(kind=("euclid", "cosine")),
    "slda": _grid(shrinkage=(1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1)),
    "ridge": _grid(ridge=(1.0, 10.0, 100.0, 300.0, 1000.0, 3000.0)),
    "ranpac": _grid(values=(2000, 4000), ridge=(None, 0.1, 1.0, 10.0, 100.0, 1000.0)),
    "gdumb": _grid(rate=(3e-3, 1e-2, 3e-2, 1e-1), times=(30, 100), smoothing=(0.0, 0.1, 0.3)),
    "latent-replay": _grid(rate=(3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1), first_rate=(1e-3, 1e-2)),
    "joint-softmax": _grid(rate=(3e-3, 1e-2, 3e-2, 1e-1), times=(30, 100), smoothing=(0.0, 0.1, 0.3)),
}


def make(name: str, setting: Setting, **changes: Any) -> Method:
    """A fresh method. changes: instead of its own settings. Raises KeyError for an unknown name."""
    return _MAKERS[name](setting, **changes)
