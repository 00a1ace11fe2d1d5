"""The codec table: accuracy against bits, with equally many latents in the replay memory and with equally many bytes.

The plan knows nothing of what a latent is: whoever stores other latents (token matrices) gives the shape of them and runs the same cases.
Pure, apart from `run`, which streams one order.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Optional, Sequence

import numpy as np
import torch

from joules import LearningEnergy
from latentd.config import Config
from latentd.replay.codec import calibrated
from latentd.replay.latents import LatentCodec, make_latent_codec
from latentd.replay.memory import ReplayMemory
from methods.daemon import Latentd
from nicv2_run import mean_std, right, teach
from streams import Source

RULES = ("equal count", "equal bytes")
BITS = (8, 6, 5, 4, 3, 2)
KINDS = ("scattered", "rotated", "token", "tensor")
COUNT = 1000  # latents at equal count
BUDGET_BYTES = 1 << 20  # replay memory at equal bytes

MakeCodec = Callable[[str, str], LatentCodec]  # name, kind -> codec


@dataclass(frozen=True)
class Case:
    """One row: a codec and the replay memory that it gets. rule: "equal count" or "equal bytes"."""

    name: str
    kind: str
    rule: str
    replay_bytes: int
    latents: int  # that fit
    latent_bytes: int  # of one code


def cases(
    make: MakeCodec, count: int = COUNT, budget: int = BUDGET_BYTES, rules: Sequence[str] = RULES, kinds: Sequence[str] = KINDS
) -> List[Case]:
    """fp32 and each of these kinds at every number of bits, by each of these rules."""
    names = [("fp32", "token")] + [(f"int{bits}", kind) for kind in kinds for bits in BITS]
    found = []
    for name, kind in names:
        codec = make(name, kind)
        for rule in rules:
            size = count * slot_bytes(codec) if rule == "equal count" else budget
            fits = size // slot_bytes(codec)
            found.append(Case(name, "float" if name.startswith("fp") else kind, rule, size, fits, codec.code_bytes))
    return found


def slot_bytes(codec: LatentCodec) -> int:
    """What one latent takes in the replay memory with all that is kept about it."""
    memory = ReplayMemory(str(codec), codec.code_bytes, codec.code_bytes + 4096, seed=0)
    memory.admit("s00000000", 0, bytes(codec.code_bytes))
    return memory.used_bytes


def features_codec(tokens: int, width: int, seed: int, calibration: Optional[np.ndarray[Any, np.dtype[np.float32]]] = None) -> MakeCodec:
    """Codecs for class tokens (tokens, width). calibration: (M, tokens, width), for kinds that are calibrated; without it, stand-ins give
    codes of the same length.
    """
    known = np.zeros((2, tokens, width), np.float32) if calibration is None else calibration
    if calibration is None:
        known[0, 0, 0] = 1.0

    def make(name: str, kind: str) -> LatentCodec:
        return make_latent_codec(
            name, kind, (tokens, width), seed=seed, parameters=lambda spec: calibrated(spec, None if spec.kind == "rotated" else known)
        )

    return make


def run(case: Case, order: int, protocol: int, validation: bool, closed_form: bool, source: Source, settings: Config) -> Dict[str, Any]:
    """latentd's head over one order with this codec: percent of all questions. The tensor kind's range comes from batch 0, the scattered
    kind's mean from drawn images.

    closed_form: the floor alone, which is a hundred times faster and sees no replay memory: every latent that was taught is in its sums.
    """
    torch.set_num_threads(1)
    course = source.course(protocol, order, validation)
    tokens, width = source.tokens, course.features.shape[1]
    seen = source.drawn(settings) if case.kind == "scattered" else np.ascontiguousarray(course.features[course.batches[0]])
    kind = "token" if case.kind == "float" else case.kind
    codec = features_codec(tokens, width // tokens, settings.learn.seed, seen.reshape(-1, tokens, width // tokens))(case.name, kind)
    learn = dataclasses.replace(settings.learn, replay_bytes=case.replay_bytes)
    method = Latentd(len(source.classes), learn, width, tokens, codec, floor_only=closed_form)
    with LearningEnergy(settings.energy) as energy:
        teach(method, course, len(source.classes), energy, asked_after=())
    return {"accuracy": 100 * float(right(method, course, course.asked).mean()), "trained_head_weight": method.snapshot.weight}


def table(planned: Sequence[Case], runs: Sequence[Sequence[Dict[str, Any]]]) -> List[Dict[str, Any]]:
    """A row a case from its runs, with the points lost against fp32 by the same rule."""
    means = [mean_std([found["accuracy"] for found in ran]) for ran in runs]
    floats = {case.rule: mean["mean"] for case, mean in zip(planned, means) if case.kind == "float"}
    return [
        {
            **dataclasses.asdict(case),
            "accuracy": mean,
            "against_fp32": mean["mean"] - floats[case.rule],
            "trained_head_weight": float(np.mean([found["trained_head_weight"] for found in ran])),
        }
        for case, mean, ran in zip(planned, means, runs)
    ]
