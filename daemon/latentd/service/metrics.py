"""Prometheus metrics: what is counted as it happens, and what is read from the parts when somebody scrapes.

Counters and histograms are updated from any thread (the client library locks them); gauges are read on the event loop while /metrics is
answered. Labels are bounded: route templates, known methods, fixed words; never a class name or a raw path.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Callable, Dict, Iterable, Tuple

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import Scope

from latentd import __version__

if TYPE_CHECKING:
    from latentd.service.parts import Parts

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
STAGES = ("queue", "decode", "frozen", "adaptive")
LEARNER_STATES = ("idle", "learning", "yielding", "waiting", "sleeping", "failed", "stopped")
_METHODS = frozenset(("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"))
_FAST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """The registry of one daemon and everything that is counted as it happens.

    It is the observer of the batcher (stage, batch, refused), of the journal (fsync) and of the learner (step, published, rejected,
    evicted, waited).
    """

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second time series for each counter, which nobody asked for
        self.registry = registry = CollectorRegistry()
        self._requests = Counter("latentd_http_requests", "Requests answered.", ("route", "method", "code"), registry=registry)
        self._request_s = Histogram(
            "latentd_http_request_duration_seconds", "Time to answer.", ("route",), buckets=_FAST, registry=registry
        )
        stages = Histogram(
            "latentd_stage_duration_seconds", "Time of one image in one stage.", ("stage",), buckets=_FAST, registry=registry
        )
        self._stage_s = {stage: stages.labels(stage) for stage in STAGES}
        self._batch = Histogram("latentd_batch_images", "Images in one run of the frozen stage.", buckets=_BATCHES, registry=registry)
        self._refused = Counter("latentd_queue_rejected", "Items that a full queue refused.", ("queue",), registry=registry)
        self._learned = Counter("latentd_learn_samples", "Images sent to learn, by what became of them.", ("outcome",), registry=registry)
        self._steps = Counter("latentd_learn_steps", "Training steps.", registry=registry)
        self._step_s = Histogram("latentd_learn_step_duration_seconds", "Time of one training step.", buckets=_FAST, registry=registry)
        self._published = Counter("latentd_versions_published", "Versions published.", ("cause",), registry=registry)
        self._not_published = Counter("latentd_publish_rejected", "Versions that the gate refused.", ("reason",), registry=registry)
        self._evicted = Counter("latentd_replay_evictions", "Latents that gave way to others in the replay memory.", registry=registry)
        self._waited_s = Counter(
            "latentd_learner_waited_seconds", "Time that the learner waited, by what for.", ("cause",), registry=registry
        )
        self._fsync_s = Histogram("latentd_journal_fsync_duration_seconds", "Time of one durable commit.", buckets=_FAST, registry=registry)

    def request(self, scope: Scope, status: int, duration_s: float) -> None:
        """One answered request; unknown routes and methods share one label each."""
        route = getattr(scope.get("route"), "path", "unknown")
        method = scope["method"] if scope["method"] in _METHODS else "other"
        self._requests.labels(route, method, str(status)).inc()
        self._request_s.labels(route).observe(duration_s)

    def stage(self, stage: str, duration_s: float) -> None:
        self._stage_s[stage].observe(duration_s)

    def batch(self, images: int) -> None:
        self._batch.observe(images)

    def refused(self, queue: str, items: int) -> None:
        self._refused.labels(queue).inc(items)

    def learned(self, outcome: str) -> None:
        self._learned.labels(outcome).inc()

    def fsync(self, duration_s: float) -> None:
        self._fsync_s.observe(duration_s)

    def step(self, seconds: float) -> None:
        self._steps.inc()
        self._step_s.observe(seconds)

    def published(self, cause: str) -> None:
        self._published.labels(cause).inc()

    def rejected(self, reason: str) -> None:
        self._not_published.labels(reason).inc()

    def evicted(self, count: int) -> None:
        self._evicted.inc(count)

    def waited(self, cause: str, seconds: float) -> None:
        self._waited_s.labels(cause).inc(seconds)

    def watch(self, parts: Parts) -> None:
        """Adds the gauges that are read from the parts at every scrape."""
        self.registry.register(_Gauges(parts))

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _Gauges(Collector):
    """Reads every part once a scrape; a part that knows nothing leaves its sample out (never a false 0)."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def describe(self) -> Iterable[Metric]:
        return ()  # registering must not read the parts

    def collect(self) -> Iterable[Metric]:
        readers: Tuple[Callable[[Parts], Iterable[Metric]], ...] = (
            _build,
            _queues,
            _learner,
            _memory,
            _accuracy,
            _energy,
            _board,
            _journal,
        )
        for read in readers:
            yield from read(self._parts)


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"latentd_{name}", text, value=value)


def _gauges(name: str, text: str, label: str, values: Dict[str, float]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"latentd_{name}", text, labels=(label,))
    for key, value in values.items():
        family.add_metric((key,), value)
    return family


def _build(parts: Parts) -> Iterable[Metric]:
    info = {"version": __version__, "engine": parts.choice.stage.name, "backbone": parts.choice.stage.spec.backbone_name}
    yield InfoMetricFamily("latentd_build", "The program, its engine and its backbone.", value=info)


def _queues(parts: Parts) -> Iterable[Metric]:
    queues = parts.queues()
    yield _gauges("queue_depth", "Items that wait.", "queue", {name: depth for name, (depth, _) in queues.items()})
    yield _gauges("queue_capacity", "Items that may wait.", "queue", {name: capacity for name, (_, capacity) in queues.items()})


def _learner(parts: Parts) -> Iterable[Metric]:
    status = parts.learner.status()
    yield _gauge("learn_lag_seconds", "Age of the oldest sample that is not learned yet.", status.lag_s)
    yield _gauges(
        "learner_state", "1 for the state the learner is in.", "state", {state: float(state == status.state) for state in LEARNER_STATES}
    )
    yield _gauge("version_number", "The version that answers.", parts.learner.snapshot.version)


def _memory(parts: Parts) -> Iterable[Metric]:
    memory = parts.learner.memory()
    yield _gauge("replay_slots", "Latents that the replay memory can hold.", memory.slots)
    yield _gauge("replay_used", "Latents in the replay memory.", memory.used)
    yield _gauge("replay_bytes", "Bytes of the latents in the replay memory.", memory.used_bytes)
    if memory.tokens is not None:
        yield _gauge("replay_tokens_used", "Latents that still have their tokens.", memory.tokens.used)
    yield _gauge("replay_doubted", "Latents in the replay memory whose label looks wrong.", len(memory.doubted))
    available = parts.headroom().available_bytes
    if available is not None:
        yield _gauge("memory_available_bytes", "Memory that can still be had.", available)
    yield _gauge("memory_planned_bytes", "Memory that latentd takes at its worst moment.", parts.memory_plan.planned_bytes)


def _accuracy(parts: Parts) -> Iterable[Metric]:
    report = parts.learner.accuracy()
    kinds = {"prequential": report.prequential, "prequential_recent": report.prequential_recent, "holdout": report.holdout}
    known = {kind: score.ratio for kind, score in kinds.items() if score.ratio is not None}
    yield _gauges("accuracy_ratio", "Share of right answers; absent while nothing was measured.", "kind", known)
    yield _gauges("accuracy_samples", "Samples behind it.", "kind", {kind: score.count for kind, score in kinds.items()})
    drifting = sum(1 for each in report.per_class if each.drift is not None and each.drift.drifting)
    yield _gauge("drifting_classes", "Classes whose new images stop looking like them.", drifting)


def _energy(parts: Parts) -> Iterable[Metric]:
    report = parts.ledger.report()
    joules = CounterMetricFamily("latentd_energy_joules", "Joules by activity.", labels=("activity", "quality"))
    for name, activity in report.activities.items():
        if activity.energy_j is not None:
            joules.add_metric((name, report.quality), activity.energy_j)
    rails = CounterMetricFamily("latentd_energy_rail_joules", "Joules by rail; rails overlap.", labels=("rail",))
    for name, rail in report.rails.items():
        if rail.energy_j is not None:
            rails.add_metric((name,), rail.energy_j)
    yield joules
    yield rails
    up = {report.meter.last_source or "none": float(report.meter.reason is None)}
    yield _gauges("energy_meter_up", "Whether the meter reads; of the one that serves, or served last.", "source", up)
    yield CounterMetricFamily("latentd_energy_gap_seconds", "Time without a reading.", value=report.gap_s)
    known = {name: celsius for name, celsius in parts.temperatures_c().items() if celsius is not None}
    yield _gauges("temperature_celsius", "Temperatures of the board.", "sensor", known)


def _board(parts: Parts) -> Iterable[Metric]:
    board = parts.board()
    clocks = {unit: clock.now_hz for unit, clock in board.clocks.items() if clock.now_hz is not None}
    yield _gauges("clock_hertz", "Clocks now.", "unit", clocks)
    causes = {cause: float(bool(what)) for cause, what in board.throttled.items() if what is not None}
    yield _gauges("throttled", "1 while the board slows itself down.", "cause", causes)
    if board.power_mode is not None:
        yield InfoMetricFamily("latentd_power_mode", "The power mode of a Jetson.", value={"mode": board.power_mode})


def _journal(parts: Parts) -> Iterable[Metric]:
    yield _gauge("state_bytes", "Bytes of the journal on disk.", parts.journal.status().size_bytes)
