"""Domain values as the JSON objects of the answers: the shapes in schemas.py, made without validation. Pure functions."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Dict, Optional

from latentd import headroom
from latentd.energy import battery
from latentd.engines.enduring import EnduringStage, Shortage
from latentd.learning.trainer import NEW_SHARE
from latentd.service.answers import rfc3339

RATE_S = 1800.0  # the time whose mean power and samples are "this rate"

if TYPE_CHECKING:
    from latentd.engines.choose import Attempt, Choice
    from latentd.learning.accuracy import AccuracyReport, Score
    from latentd.learning.status import MemoryStatus
    from latentd.replay.records import ClassRecord, SampleRecord
    from latentd.service.parts import Parts


def sample(record: SampleRecord, known: MemoryStatus) -> Dict[str, Any]:
    """known: the replay memory, which knows whose label looks wrong."""
    return {
        "sample_id": record.sample_id,
        "seq": record.seq,
        "label": record.label,
        "state": record.state,
        "taught_at": rfc3339(record.taught_at),
        "sha256": record.sha256,
        "duplicate_of": record.duplicate_of,
        "holdout": record.holdout,
        "doubted": known.doubts(record.sample_id),
    }


def score(found: Score) -> Dict[str, Any]:
    return {"value": found.ratio, "correct": found.correct, "count": found.count, "low": found.low, "high": found.high}


def accuracy(report: AccuracyReport, confusion: bool = False) -> Dict[str, Any]:
    """The accuracy; the table of confusions only where it was asked for."""
    view: Dict[str, Any] = {
        "prequential": score(report.prequential),
        "prequential_recent": score(report.prequential_recent),
        "holdout": score(report.holdout),
        "per_class": [
            {
                "name": each.name,
                "prequential": score(each.prequential),
                "holdout": score(each.holdout),
                "drift": dataclasses.asdict(each.drift) if each.drift else None,
            }
            for each in report.per_class
        ],
        "unknown": dataclasses.asdict(report.unknown),
    }
    return {**view, "confusion": report.confusion} if confusion else view


def class_entry(record: ClassRecord, report: Optional[AccuracyReport] = None) -> Dict[str, Any]:
    view: Dict[str, Any] = {
        "name": record.name,
        "created_at": rfc3339(record.created_at),
        "samples": record.samples,
        "holdout": record.holdout,
        "stored": record.stored,
    }
    measured = next((each for each in report.per_class if each.name == record.name), None) if report else None
    return view if measured is None else {**view, "prequential": score(measured.prequential), "holdout_accuracy": score(measured.holdout)}


def engine(choice: Choice) -> Dict[str, Any]:
    """Which engine serves, what it computes, and why not the better ones."""
    spec = choice.stage.spec
    shortage = _shortage(choice)
    return {
        "name": choice.stage.name,
        "backbone": {"name": spec.backbone_name, "sha256": spec.backbone_sha256},
        "image_size": spec.image_size,
        "split": spec.split,
        "class_tokens": spec.class_tokens,
        "width": spec.width,
        "tokens": spec.tokens,
        "attempts": [dataclasses.asdict(_as_of_now(attempt, choice.stage.name, shortage)) for attempt in choice.attempts],
        "shortage": dataclasses.asdict(shortage),
    }


def _shortage(choice: Choice) -> Shortage:
    return choice.stage.shortage if isinstance(choice.stage, EnduringStage) else Shortage()


def _as_of_now(attempt: Attempt, serving: str, shortage: Shortage) -> Attempt:
    """What became of an engine, after the CPU took over from one without memory."""
    if shortage.moved_from is None:
        return attempt
    if attempt.state == "serving":
        return dataclasses.replace(attempt, state="replaced", reason=f"no memory for one image; {serving} serves since")
    if attempt.engine == serving:
        return dataclasses.replace(attempt, state="serving", reason=f"took over from {shortage.moved_from}")
    return attempt


def learner(parts: Parts) -> Dict[str, Any]:
    return {**dataclasses.asdict(parts.learner.status()), "version": parts.learner.snapshot.version}


def journal(parts: Parts) -> Dict[str, Any]:
    """The journal without its queue, which stands with the other queues."""
    view = dataclasses.asdict(parts.journal.status())
    del view["queue_depth"], view["queue_capacity"]
    return view


def energy(parts: Parts, since: Optional[float] = None) -> Dict[str, Any]:
    """Joules, all or from `since` (unix seconds) on; the power budget, and how long the battery lasts."""
    report = parts.ledger.report(since)
    budget_w = parts.config.energy.budget_w or None
    budget = {"budget_w": budget_w, "is_enforced": budget_w is not None and report.meter.power_w is not None}
    return {**dataclasses.asdict(report), "budget": budget, "battery": _battery(parts)}


def _battery(parts: Parts) -> Optional[Dict[str, Any]]:
    settings, learn = parts.config.energy, parts.config.learn
    if not settings.battery_wh:
        return None
    recent, life, new_samples = parts.ledger.recent(RATE_S), parts.ledger.report(), max(1, round(learn.minibatch * NEW_SHARE))
    found = battery.estimate(settings.battery_wh, parts.battery_charge(), recent, life, new_samples)
    return None if found is None else dataclasses.asdict(found)


def board(parts: Parts) -> Dict[str, Any]:
    """How fast the board may run now."""
    found = parts.board()
    return {
        **found._asdict(),
        "clocks": {unit: clock._asdict() for unit, clock in found.clocks.items()},
        "throttled": {cause: None if what is None else list(what) for cause, what in found.throttled.items()},
    }


def memory(parts: Parts) -> Dict[str, Any]:
    """The replay memory, with its samples by class name, and the plan of all memory beside what is used."""
    names = {record.class_id: record.name for record in parts.journal.classes()}
    found = parts.learner.memory()
    view = dataclasses.asdict(dataclasses.replace(found, doubted=()))  # thousands of ids would be copied to be counted
    view["classes"] = {names[class_id]: count for class_id, count in view["classes"].items() if class_id in names}
    view["doubted"] = len(found.doubted)
    used = {"replay memory": found.used_bytes, "hold-out": found.holdout_bytes, "request bodies": parts.pending.held}
    if found.tokens is not None:
        used["samples with tokens"] = found.tokens.used_bytes
    return {**view, "plan": _plan(parts, used)}


def _plan(parts: Parts, used: Dict[str, int]) -> Dict[str, Any]:
    """The memory plan part by part. Where it can be measured for a part alone, what that uses; of the whole always, and what is left.

    Whether it fits was decided at the start: on a board with one memory for all, what the process holds of the GPU's is no more available,
    but not resident either.
    """
    plan, left, room = parts.memory_plan, parts.headroom(), parts.room_at_start_bytes
    return {
        "parts": [{**dataclasses.asdict(part), "used_bytes": used.get(part.name)} for part in plan.parts],
        "planned_bytes": plan.planned_bytes,
        "resident_bytes": headroom.resident_bytes(),
        "available_bytes": left.available_bytes,
        "total_bytes": left.total_bytes,
        "bounded_by": left.bounded_by,
        "fits": None if room is None else plan.planned_bytes + plan.reserve_bytes <= room,
        "images_a_run": min(parts.batcher.max_batch, _shortage(parts.choice).largest_batch or parts.batcher.max_batch),
    }
