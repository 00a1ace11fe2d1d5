"""Measures every candidate on this device: the frozen stage of each split, the step above it, its codecs; asks accuracy where it can.

Runs in its caller's thread for minutes; owns the engine it measures, one at a time. Nothing else should load the device meanwhile.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Callable, Dict, List, NamedTuple, Optional, Tuple

import numpy as np
from numpy.typing import NDArray

from latentd.config import FEATURE_KINDS, TOKEN_KINDS, Config
from latentd.engines.choose import choose
from latentd.engines.stage import FrozenStage
from latentd.learning.blocks import UpperBlocks
from latentd.learning.sleep import microbatch
from latentd.learning.tuning.candidates import Candidate, HoldOut, faults, slots_within, whole_slot_bytes
from latentd.learning.tuning.examiner import Examiner, Slept
from latentd.learning.tuning.plan import Cell, Plan
from latentd.learning.tuning.samples import Latents, Samples, Tokens
from latentd.learning.tuning.steps import RidgeCost, StepCost, block_step, decoding, filled, head_step, ridge_cost
from latentd.learning.tuning.stopwatch import Stopwatch, Timing
from latentd.learning.tuning.trial import spans
from latentd.replay.codec import CodecSpec, calibrated
from latentd.replay.latents import LatentCodec, TokenPool, make_latent_codec
from latentd.replay.memory import slot_bytes
from latentd.vision.checkpoints import Backbone
from latentd.vision.probe import probe_images

OUTSIDE = "outside the limits, so not asked"
UNKNOWN_CLASSES = 50  # what is allowed for where nobody says how many classes will be taught


class StageCost(NamedTuple):
    """The frozen stage with what a split needs of it: one image alone, and a batch of `images`. waiting: better engines, not built yet."""

    engine: str
    one: Timing
    batch: Timing
    images: int
    waiting: Tuple[str, ...]


@dataclass
class Survey:
    """Everything that was measured; grows while it runs. why_no_accuracy: what kept a cell from being asked."""

    classes: int
    candidates: List[Candidate] = field(default_factory=list)
    stages: Dict[int, StageCost] = field(default_factory=dict)
    steps: Dict[Cell, StepCost] = field(default_factory=dict)
    decode_s: Dict[Tuple[int, int, str, str], float] = field(default_factory=dict)  # split, grid, codec, kind -> seconds a latent
    ridge: Dict[int, RidgeCost] = field(default_factory=dict)
    sleeps: Dict[Cell, Slept] = field(default_factory=dict)
    why_no_accuracy: Dict[Cell, str] = field(default_factory=dict)


class Surveyor:
    """One run of measuring. samples None: accuracy stays unknown, for the reason in `why_no_samples`."""

    def __init__(
        self,
        config: Config,
        backbone: Backbone,
        plan: Plan,
        stopwatch: Stopwatch,
        *,
        samples: Optional[Samples] = None,
        why_no_samples: str = "",
        progress: Callable[[str], None] = lambda doing: None,
    ) -> None:
        """progress: told what begins, as often as `rounds` says."""
        self._config, self._backbone, self._plan, self._stopwatch = config, backbone, plan, stopwatch
        self._samples, self._why, self._progress = samples, why_no_samples, progress
        self._widths: Dict[Cell, List[int]] = {}  # of the features that each closed-form head reads
        self.cells = plan.cells(backbone, config.backbone.image_size)
        self.survey = Survey(UNKNOWN_CLASSES if samples is None else max(2, len(np.unique(samples.class_ids))))

    @property
    def rounds(self) -> int:
        return 2 * len(self.cells) + len({cell.split for cell in self.cells})

    def run(self) -> Survey:
        """Everything. Raises what choosing an engine raises."""
        examiner = self._examiner()
        for split in sorted({cell.split for cell in self.cells}, reverse=True):
            self._progress(f"frozen stage, split {split}")
            probe, latents = self._measure_stage(split)
            base = UpperBlocks.load(self._backbone, split) if split < self._backbone.shape.depth else None
            for cell in [cell for cell in self.cells if cell.split == split]:
                self._progress(f"training step, {cell}")
                made = self._measure_cell(cell, base, probe)
                self._progress(f"accuracy, {cell}")
                self.survey.candidates += self._asked(examiner, cell, base, made, latents)
        return self.survey

    def _examiner(self) -> Optional[Examiner]:
        if self._samples is None:
            return None
        examiner = Examiner(self._samples.class_ids, self._config.learn, self._plan.sleep_s)
        if examiner.division.classes < 2:
            self._why = "accuracy needs two classes of at least 10 samples each"
            return None
        return examiner

    def _measure_stage(self, split: int) -> Tuple[Latents, Optional[Latents]]:
        """Times the stage of a split; gives its latents of the probe images and, where there are any, of the samples."""
        config = replace(self._config, backbone=replace(self._config.backbone, split=split))
        choice = choose(config, self._backbone)
        stage, waiting = choice.stage, tuple(pending.name for pending in choice.pending)
        try:
            below, most = split < self._backbone.shape.depth, config.engine.max_batch
            probes = probe_images(stage.spec.image_size)
            images = np.resize(probes, (most, *probes.shape[1:]))
            one = self._stopwatch.time(lambda: stage.encode(images[:1], tokens=below))
            batch = self._stopwatch.time(lambda: stage.encode(images, tokens=below))
            self.survey.stages[split] = StageCost(stage.name, one, batch, most, waiting)
            samples = None if self._samples is None else self._samples.latents(stage, below, most)
            return _probed(stage, probes), samples
        finally:
            stage.close()

    def _measure_cell(self, cell: Cell, base: Optional[UpperBlocks], probe: Latents) -> List[Tuple[Candidate, LatentCodec]]:
        """The candidates of a cell: the step is timed on latents as the first codec stores them.

        Where nothing keeps the limit of memory, once more with fewer latents at a time, and in the end with one: activations are most of a
        step's memory.
        """
        learn = self._config.learn
        if base is None:
            tokens = probe.features.reshape(len(probe.features), -1, self._backbone.shape.width)
        else:
            kept = _of_cell(probe.tokens, cell, self._pool(cell))
            assert kept is not None, "the stage gives all tokens"
            tokens = kept.astype(np.float32)
        codecs = self._codecs(cell, tokens)
        self._widths[cell] = [probe.features.shape[1], *([] if base is None else [base.features_width])]
        for width in self._widths[cell]:
            if width not in self.survey.ridge:
                self.survey.ridge[width] = ridge_cost(width, self.survey.classes)
        if base is None:
            return self._priced(
                cell, head_step(probe.features, self.survey.classes, learn, self._stopwatch), codecs, tokens, learn.microbatch
            )
        if not codecs:
            return []
        memory = filled(codecs[0][2], probe.features, tokens, self.survey.classes, learn.minibatch)
        at_once = microbatch(learn, len(base.blocks))
        while True:
            step = block_step(base, codecs[0][2], memory, tokens, replace(learn, microbatch=at_once), self._stopwatch)
            made = self._priced(cell, step, codecs, tokens, at_once)
            if at_once == 1 or any(self._fits(candidate) for candidate, _ in made):
                return made
            at_once = max(1, at_once // 4)

    def _fits(self, candidate: Candidate) -> bool:
        limit = self._plan.limits.memory_bytes
        return limit is None or candidate.bytes_with(max(candidate.slots, self._config.learn.minibatch)) <= limit

    def _priced(
        self, cell: Cell, step: StepCost, codecs: List[Tuple[str, str, LatentCodec]], tokens: NDArray[np.float32], microbatch: int
    ) -> List[Tuple[Candidate, LatentCodec]]:
        """The candidates of a cell with this step, each with its own decoding in it; tokens: (M, N, D) as the codecs take them."""
        self.survey.steps[cell] = step
        decode_s = [decoding(codec.tokens or codec.features, tokens, self._stopwatch) for _, _, codec in codecs]
        counted_s = decode_s[0] if cell.tokens else 0.0  # is in the step already
        made = []
        for (name, kind, codec), seconds in zip(codecs, decode_s):
            self.survey.decode_s[cell.split, cell.token_grid, name, kind] = seconds
            step_s = max(0.0, step.step.seconds + self._minibatch(cell) * (seconds - counted_s))
            made.append((self._candidate(cell, name, kind, codec, microbatch, step_s), codec))
        return made

    def _minibatch(self, cell: Cell) -> int:
        return self._config.learn.sleep_minibatch if cell.tokens else self._config.learn.minibatch

    def _codecs(self, cell: Cell, tokens: NDArray[np.float32]) -> List[Tuple[str, str, LatentCodec]]:
        """Those of the plan that can store such latents, calibrated on probe images as the daemon does it; tokens: (M, N, D)."""
        learn, width = self._config.learn, self._backbone.shape.width
        features, pool = (self._config.backbone.class_tokens, width), self._pool(cell) if cell.tokens else None

        def parameters(spec: CodecSpec) -> NDArray[np.float32]:
            return calibrated(spec, tokens if spec.kind == "tensor" else None)

        found = []
        for name, kind in self._plan.codecs:
            fitting = TOKEN_KINDS if cell.tokens else FEATURE_KINDS
            if kind in fitting or name.startswith("fp"):
                stored = (cell.tokens, width) if cell.tokens else None
                found.append((name, kind, make_latent_codec(name, kind, features, stored, learn.seed, parameters, pool)))
        return found

    def _pool(self, cell: Cell) -> TokenPool:
        shape = self._backbone.shape
        return TokenPool(1 + shape.registers, shape.side(self._config.backbone.image_size), cell.token_grid)

    def _candidate(self, cell: Cell, name: str, kind: str, codec: LatentCodec, microbatch: int, step_s: float) -> Candidate:
        learn, stage, step = self._config.learn, self.survey.stages[cell.split], self.survey.steps[cell]
        powers = [timing.power_w for timing in (stage.one, step.step, step.forward) if timing is not None]
        known = [power for power in powers if power is not None]
        held_bytes = codec.features_bytes + 4 * sum(self._widths[cell][1:])  # and what the blocks give for it
        slot = slot_bytes(codec.code_bytes) if not cell.tokens else whole_slot_bytes(codec.code_bytes, codec.features_bytes)
        candidate = Candidate(
            split=cell.split,
            token_grid=cell.token_grid,
            tokens=cell.tokens,
            codec=name,
            codec_kind=kind,
            latent_bytes=codec.code_bytes,
            features_bytes=codec.features_bytes,
            slot_bytes=slot,
            fixed_bytes=self._fixed_bytes(cell),
            slots=self._plan.slots,
            holdout=HoldOut(learn.holdout_every, learn.holdout_per_class * self.survey.classes, held_bytes),
            microbatch=microbatch,
            latency_s=stage.one.seconds + (step.forward.seconds if step.forward is not None else 0.0),
            step_s=step_s,
            power_w=max(known) if len(known) == len(powers) else None,
            image_j=_sum_j(stage.one, step.forward),
            step_j=None if step.step.power_w is None else step.step.power_w * step_s,
        )
        return replace(candidate, slots=slots_within(self._plan.limits.memory_bytes, self._plan.slots, candidate.bytes_with))

    def _fixed_bytes(self, cell: Cell) -> int:
        """What is held all the time, and the larger of what a step and what solving takes for a moment: one thread does both."""
        step = self.survey.steps[cell]
        sums = [self.survey.ridge[width] for width in self._widths[cell]]
        # A sleep ends with sums of its own beside the old ones.
        refit_bytes = sums[-1].kept_bytes if cell.tokens else 0
        momentary = max(step.transient_bytes, refit_bytes, *(cost.transient_bytes for cost in sums))
        return sum(cost.kept_bytes for cost in sums) + step.kept_bytes + momentary

    def _asked(
        self,
        examiner: Optional[Examiner],
        cell: Cell,
        base: Optional[UpperBlocks],
        made: List[Tuple[Candidate, LatentCodec]],
        latents: Optional[Latents],
    ) -> List[Candidate]:
        """The candidates, those inside the limits with their accuracy where it can be asked; else the survey gets the reason."""
        inside = [place for place, (one, _) in enumerate(made) if not faults(one, self._plan.limits, self._config.learn.minibatch)]
        found = [candidate for candidate, _ in made]
        tokens = None if latents is None or not cell.tokens else _of_cell(latents.tokens, cell, self._pool(cell))
        if examiner is None:
            self.survey.why_no_accuracy[cell] = self._why
        elif latents is None or (cell.tokens and tokens is None):
            self.survey.why_no_accuracy[cell] = "the stored latents are of another split or other tokens"
        elif not inside:
            self.survey.why_no_accuracy[cell] = OUTSIDE
        else:
            codecs = [made[place][1] for place in inside]
            if base is None:
                given = examiner.ask_head(codecs, latents.features)
            else:
                step_s = self.survey.steps[cell].step.seconds
                given, self.survey.sleeps[cell] = examiner.ask_blocks(codecs, Latents(latents.features, tokens), base, step_s)
            for place, answer in zip(inside, given):
                found[place] = replace(found[place], accuracy=answer.score, right=answer.right)
        return found


def _of_cell(tokens: Optional[Tokens], cell: Cell, pool: TokenPool) -> Optional[Tokens]:
    """Tokens (M, N, D) as the cell keeps them: already so, or pooled from all; None where they are others."""
    if tokens is None or tokens.shape[1] == cell.tokens:
        return tokens
    if tokens.shape[1] != pool.whole:
        return None
    return np.concatenate([pool(tokens[span].astype(np.float32)).astype(np.float16) for span in spans(len(tokens), 8)])


def _probed(stage: FrozenStage, images: NDArray[np.uint8]) -> Latents:
    found = stage.encode(images, tokens=True)
    assert found.tokens is not None, "tokens were asked for"
    return Latents(found.features, found.tokens.astype(np.float16))


def _sum_j(*timings: Optional[Timing]) -> Optional[float]:
    """Joules of all timings together; None where one is unknown."""
    parts = [timing.energy_j for timing in timings if timing is not None]
    known = [part for part in parts if part is not None]
    return sum(known) if len(known) == len(parts) else None
