"""What `latentd tune` found: as a table, as JSON, and as the configuration it recommends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Dict, List, Optional

from rich.text import Text

from latentd import config, configtext
from latentd.cli.figures import joules, percent, size
from latentd.cli.terminal import note, say, show, table
from latentd.energy.joulemeter import Joulemeter
from latentd.engines.stage import split_of
from latentd.learning.accuracy import Score
from latentd.learning.tuning.candidates import Candidate, Limits, Recommendation, faults, recommend, settings_of
from latentd.learning.tuning.plan import Cell, Plan
from latentd.learning.tuning.stopwatch import Timing
from latentd.learning.tuning.survey import OUTSIDE, Survey
from latentd.vision.checkpoints import Backbone

HEADINGS = ("", "split", "tokens", "codec", "latents", "memory", "answer", "step", "J/image", "J/step", "accuracy", "outside the limits")
FIGURES = (1, 2, 4, 5, 6, 7, 8, 9)


@dataclass(frozen=True)
class Outcome:
    """One finished survey with its recommendation. asked: what accuracy was asked on, or why it was not."""

    settings: config.Config
    backbone: Backbone
    limits: Limits
    survey: Survey
    recommendation: Recommendation
    energy: Dict[str, Any]
    asked: str

    @classmethod
    def of(cls, settings: config.Config, backbone: Backbone, plan: Plan, survey: Survey, joulemeter: Joulemeter, asked: str) -> Outcome:
        in_force = (split_of(settings.backbone.split, backbone.shape.depth), settings.learn.token_grid)
        choice = recommend(survey.candidates, plan.limits, settings.learn.minibatch, in_force)
        energy = {name: getattr(joulemeter, name) for name in ("source", "quality", "scope", "reason", "idle_power_w")}
        return cls(settings, backbone, plan.limits, survey, choice, energy, asked)

    def toml(self) -> Optional[str]:
        """The configuration file; None where nothing is recommended.

        It has the keys that differ from the defaults, and those whose value in force is another one.
        """
        choice = self.recommendation.choice
        if choice is None:
            return None
        wanted, in_force = settings_of(choice, self.backbone.shape.depth), config.as_table(self.settings)
        defaults = {row.key: row.default for row in config.rows()}
        values = {key: value for key, value in wanted.items() if value != defaults[key] or value != in_force[key]}
        return f"# latentd tune: {choice}, {choice.slots} latents\n{configtext.as_toml(values)}"

    # --- for people ---------------------------------------------------------------------------------------------------

    def show(self) -> None:
        rows = [self._row(candidate) for candidate in self.survey.candidates]
        show(table(HEADINGS, rows, right=FIGURES))
        for line in self._lines():
            note(line)
        if self.recommendation.choice is not None:
            say(f"Recommended: {self.recommendation.choice}: {self.recommendation.reason}")

    def _row(self, candidate: Candidate) -> List[Any]:
        outside = "; ".join(fault.reason for fault in self._faults(candidate))
        cells = [
            "*" if candidate is self.recommendation.choice else "",
            candidate.split,
            candidate.tokens or "-",
            str(candidate).split(", ")[-1],
            candidate.slots,
            size(candidate.learning_bytes),
            f"{1e3 * candidate.latency_s:.1f} ms",
            f"{1e3 * candidate.step_s:.0f} ms" if candidate.step_s < 1 else f"{candidate.step_s:.1f} s",
            joules(candidate.image_j),
            joules(candidate.step_j),
            _accuracy(candidate.accuracy),
            outside,
        ]
        return [Text(str(cell), style="bold") for cell in cells] if candidate is self.recommendation.choice else cells

    def _lines(self) -> List[str]:
        engines = {stage.engine for stage in self.survey.stages.values()}
        lines = [f"Measured on {', '.join(sorted(engines))}; accuracy: {self.asked}."]
        waiting = sorted({name for stage in self.survey.stages.values() for name in stage.waiting})
        if waiting:
            lines.append(f"{', '.join(waiting)} must be built first, which the daemon does: answers will be faster than here.")
        lines += sorted({f"Accuracy unknown, {cell}: {reason}." for cell, reason in self._reasons().items()})
        if self.energy["source"] is None:
            lines.append(f"Energy unavailable: {self.energy['reason']}.")
        else:
            lines.append(f"Energy from {self.energy['source']}: {self.energy['scope']}.")
        return lines

    def _reasons(self) -> Dict[Cell, str]:
        """Why accuracy is unknown, where that is not the same for all."""
        return {cell: reason for cell, reason in self.survey.why_no_accuracy.items() if reason != self.asked}

    def _faults(self, candidate: Candidate) -> List[Any]:
        return list(faults(candidate, self.limits, self.settings.learn.minibatch))

    # --- for programs -------------------------------------------------------------------------------------------------

    def document(self) -> Dict[str, Any]:
        """Everything that was measured, in seconds, bytes, joules and watts; null is unknown."""
        choice = self.recommendation.choice
        nearest = self.recommendation.nearest
        return {
            "backbone": {"name": self.backbone.name, "sha256": self.backbone.sha256, "depth": self.backbone.shape.depth},
            "limits": {"memory_bytes": self.limits.memory_bytes, "latency_s": self.limits.latency_s, "power_w": self.limits.power_w},
            "energy": self.energy,
            "accuracy_source": self.asked,
            "classes": self.survey.classes,
            "stages": [self._stage(split) for split in self.survey.stages],
            "steps": [self._step(cell) for cell in self.survey.steps],
            "second_moments": [{"width": width, **cost._asdict()} for width, cost in self.survey.ridge.items()],
            "candidates": [self._candidate(candidate) for candidate in self.survey.candidates],
            "recommended": None if choice is None else self.survey.candidates.index(choice),
            "nearest": None if nearest is None else self.survey.candidates.index(nearest),
            "reason": self.recommendation.reason,
            "toml": self.toml(),
        }

    def _stage(self, split: int) -> Dict[str, Any]:
        stage = self.survey.stages[split]
        timings = {"one": _timing(stage.one), "batch": _timing(stage.batch)}
        return {"split": split, "engine": stage.engine, **timings, "batch_images": stage.images, "waiting": list(stage.waiting)}

    def _step(self, cell: Cell) -> Dict[str, Any]:
        step, sleep = self.survey.steps[cell], self.survey.sleeps.get(cell)
        return {
            **cell._asdict(),
            "step": _timing(step.step),
            "forward": None if step.forward is None else _timing(step.forward),
            "weights_bytes": step.weights_bytes,
            "gradients_bytes": step.gradients_bytes,
            "optimizer_bytes": step.optimizer_bytes,
            "peak_bytes": step.peak_bytes,
            "sleep": None if sleep is None else sleep._asdict(),
        }

    def _candidate(self, candidate: Candidate) -> Dict[str, Any]:
        cell = next(cell for cell in self.survey.steps if cell[:2] == (candidate.split, candidate.token_grid))
        why = None if candidate.accuracy is not None else self.survey.why_no_accuracy.get(cell, OUTSIDE)
        return {
            "split": candidate.split,
            "token_grid": candidate.token_grid,
            "tokens": candidate.tokens,
            "codec": candidate.codec,
            "codec_kind": candidate.codec_kind,
            "latent_bytes": candidate.latent_bytes,
            "slots": candidate.slots,
            "microbatch": candidate.microbatch,
            "holdout_latents": candidate.holdout.latents(candidate.slots),
            "replay_bytes": candidate.replay_bytes,
            "fixed_bytes": candidate.fixed_bytes,
            "learning_bytes": candidate.learning_bytes,
            "latency_s": candidate.latency_s,
            "step_s": candidate.step_s,
            "decode_s": self.survey.decode_s[candidate.split, candidate.token_grid, candidate.codec, candidate.codec_kind],
            "power_w": candidate.power_w,
            "image_j": candidate.image_j,
            "step_j": candidate.step_j,
            "accuracy": _score(candidate.accuracy),
            "accuracy_reason": why,
            "outside": [fault.reason for fault in self._faults(candidate)],
        }


def _timing(timing: Timing) -> Dict[str, Any]:
    return {**timing._asdict(), "energy_j": timing.energy_j}


def _score(score: Optional[Score]) -> Optional[Dict[str, Any]]:
    return None if score is None else {"value": score.ratio, "low": score.low, "high": score.high, "count": score.count}


def _accuracy(score: Optional[Score]) -> str:
    if score is None or score.low is None or score.high is None:
        return "unknown"
    return f"{percent(score.ratio)} ({100 * score.low:.0f} to {100 * score.high:.0f}, of {score.count})"
