"""The shapes of the answers, for /openapi.json and /docs only.

Handlers build plain dicts; nothing here runs while a request is served. A test validates real answers against these models.
"""

from __future__ import annotations

from typing import Any, Dict, List, Optional

from pydantic import BaseModel, ConfigDict, Field


class Shape(BaseModel):
    """A closed object: an undocumented field in an answer is a defect."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class Problem(Shape):
    """RFC 9457 problem details, the one shape of every error."""

    type: str = Field(description="reference to this problem's entry in /docs")
    title: str
    status: int
    code: str = Field(description="stable, for programs")
    detail: str
    hint: str = Field(description="what to do next")
    request_id: Optional[str] = None


class Prediction(Shape):
    label: str
    probability: float


class Timing(Shape):
    """Seconds of one image."""

    queue: float = Field(description="waited for a decoder and for the frozen stage")
    decode: float
    frozen: float = Field(description="the run of the frozen stage that this image shared")
    adaptive: float


class EnergyOfImage(Shape):
    value: Optional[float] = Field(description="joules; null when nothing measures or estimates it")
    quality: str = Field(description="measured, estimated or unavailable")
    source: Optional[str]


class ClassifyResult(Shape):
    """One image: the predictions, or its problem alone."""

    predictions: Optional[List[Prediction]] = None
    decision: Optional[str] = Field(None, description='a label, or "unknown"')
    sample_id: Optional[str] = Field(None, description="set when ?keep= kept the latent")
    timing_s: Optional[Timing] = None
    energy_j: Optional[EnergyOfImage] = None
    problem: Optional[Problem] = None


class ClassifyAnswer(Shape):
    request_id: str
    version: int
    engine: str
    results: List[ClassifyResult] = Field(description="one an image, in order")


class LearnResult(Shape):
    """One image: what became of it, or its problem alone."""

    sample_id: Optional[str] = None
    label: Optional[str] = None
    state: Optional[str] = Field(None, description="queued, learned, duplicate, rejected, evicted, held or forgotten")
    duplicate_of: Optional[str] = None
    problem: Optional[Problem] = None


class LearnAnswer(Shape):
    request_id: str
    version: int
    results: List[LearnResult] = Field(description="one an image, in order")


class BackboneRef(Shape):
    name: str
    sha256: str


class LatentResult(Shape):
    latent: Optional[List[Any]] = Field(None, description="numbers, nested as `shape` says")
    problem: Optional[Problem] = None


class LatentsAnswer(Shape):
    request_id: str
    engine: str
    backbone: BackboneRef
    image_size: int
    split: int
    of: str
    shape: List[int] = Field(description="of one latent: [class_tokens, width] or [tokens, width]")
    results: List[LatentResult] = Field(description="one an image, in order")


class Sample(Shape):
    sample_id: str
    seq: int
    label: Optional[str]
    state: str
    taught_at: str = Field(description="RFC 3339, UTC")
    sha256: str = Field(description="of the encoded image")
    duplicate_of: Optional[str]
    holdout: bool
    doubted: bool = Field(description="its label looks wrong, and it is not learned from; PUT its label, even the same, and it is believed")


class SamplesPage(Shape):
    samples: List[Sample] = Field(description="newest last; with a label or a state there may be few or none, and more on the next page")
    next: Optional[str] = Field(description="pass it as ?cursor= for the next page; null at the end")


class LabelBody(Shape):
    label: str


class RenameBody(Shape):
    rename_to: Optional[str] = None


class Score(Shape):
    value: Optional[float] = Field(description="correct / count; null when count is 0")
    correct: int
    count: int
    low: Optional[float] = Field(description="95 % Wilson interval")
    high: Optional[float]


class ClassEntry(Shape):
    name: str
    created_at: str
    samples: int
    holdout: int
    stored: int = Field(description="samples whose latent is still kept")
    prequential: Optional[Score] = None
    holdout_accuracy: Optional[Score] = None


class ClassesAnswer(Shape):
    classes: List[ClassEntry]


class Drift(Shape):
    """Whether the last lessons of a class look less like it than those before."""

    score: float = Field(description="1 and more: drifting")
    since_sample: Optional[str] = Field(description="the sample with which it began; null at score 0")
    drifting: bool


class AccuracyOfClass(Shape):
    name: str
    prequential: Score
    holdout: Score
    drift: Optional[Drift] = Field(description="null while the class has had too few lessons")


class Unknown(Shape):
    """When an image is answered "unknown"."""

    rate: float = Field(description="share of right answers that may be refused: learn.unknown_rate")
    below: Optional[float] = Field(description="least likeness of a decision; null: nothing is refused")
    reason: Optional[str] = Field(description="why nothing is refused")
    answers: int = Field(description="right answers, given before their images were learned, that the threshold comes from")
    refused: int = Field(description="hold-out samples that are answered unknown now")
    holdout: int = Field(description="hold-out samples")


class Accuracy(Shape):
    """Unknown is null, never 0."""

    prequential: Score = Field(description="predicted first, then learned; since the first sample")
    prequential_recent: Score = Field(description="the same, over the last 500")
    holdout: Score = Field(description="taught samples that are kept out of training")
    per_class: List[AccuracyOfClass]
    unknown: Unknown
    confusion: Optional[Dict[str, Dict[str, int]]] = Field(None, description="hold-out, true -> predicted; with ?detail=confusion")


class EngineAttempt(Shape):
    engine: str
    state: str = Field(description="serving, passed over, unavailable, not tried, waiting, building or replaced")
    reason: str
    cosine: Optional[float]
    seconds: float
    progress: Optional[float] = Field(description="of the build, 0 to 1; null where it is not known")


class EngineShortage(Shape):
    """What memory did not suffice for since the start."""

    count: int = Field(description="runs that the device had no memory for; their images went again, fewer at once")
    largest_batch: Optional[int] = Field(description="images that one run takes since; null: as many as configured")
    reason: Optional[str] = Field(description="what the engine said last")
    moved_from: Optional[str] = Field(description="the engine that had no memory for one image; the CPU serves in its place")


class Engine(Shape):
    name: str
    backbone: BackboneRef
    image_size: int
    split: int
    class_tokens: int
    width: int
    tokens: int
    attempts: List[EngineAttempt] = Field(description="every engine of the configured order, and why it serves or not")
    shortage: EngineShortage


class Learner(Shape):
    state: str = Field(description="idle, learning, yielding, waiting, sleeping, failed or stopped")
    reason: Optional[str]
    version: int
    watermark_seq: int
    lag_samples: int
    lag_s: float
    steps: int
    last_step_s: Optional[float]
    deaths: int
    last_publish_rejected: Optional[str]
    gate: Dict[str, Any]
    waited_s: Dict[str, float] = Field(description="seconds that it waited for power, temperature, throttling, memory or building")
    device: str = Field(description="where it computes: cpu or cuda")
    device_reason: Optional[str] = Field(description="why not where it was wanted")


class MemoryPart(Shape):
    name: str
    planned_bytes: int
    when: str = Field(description="always, requests, learning, sleeping, building, or system: left to everything else")
    basis: str = Field(description="limit (of the configuration), counted, or estimate")
    used_bytes: Optional[int] = Field(description="null where it can't be told for this part alone")


class Plan(Shape):
    """What latentd takes of the memory at its worst moment, and how it stands now."""

    parts: List[MemoryPart]
    planned_bytes: int
    resident_bytes: Optional[int] = Field(description="of the process now, without the GPU's memory")
    available_bytes: Optional[int] = Field(description="MemAvailable, or what a control group's limit leaves")
    total_bytes: Optional[int]
    bounded_by: str
    fits: Optional[bool] = Field(description="whether there was as much at the start, with what is left to the system")
    images_a_run: int = Field(description="halved when the engine ran out of memory")


class WithTokens(Shape):
    slots: int
    used: int
    used_bytes: int
    budget_bytes: int


class Memory(Shape):
    slots: int
    used: int
    used_bytes: int
    budget_bytes: int
    evictions: int
    codec: str
    holdout_bytes: int = Field(description="latents kept beside it, to measure accuracy")
    classes: Dict[str, int] = Field(description="latents by class")
    doubted: int = Field(description="latents whose label looks wrong, and that are not learned from")
    tokens: Optional[WithTokens] = Field(description="those that still have their tokens; null where only the head learns")
    plan: Plan


class Journal(Shape):
    head_seq: int
    samples: int
    size_bytes: int
    budget_bytes: int
    last_fsync_s: Optional[float]
    failed: Optional[str]
    set_aside: int = Field(description="damaged rows that were taken out of the log; what became of each is in the daemon's log")


class Queue(Shape):
    depth: int
    capacity: int


class Readiness(Shape):
    ready: bool
    reason: Optional[str]
    last_success_s: Optional[float] = Field(description="seconds since an image passed the engine")


class Clock(Shape):
    now_hz: Optional[float]
    limit_hz: Optional[float] = Field(description="the most that mode and governor allow")


class Board(Shape):
    power_mode: Optional[str] = Field(description="of a Jetson")
    cores_online: Optional[int]
    clocks: Dict[str, Clock] = Field(description="cpu (its fastest core) and gpu")
    gpu_load_ratio: Optional[float]
    throttled: Dict[str, Optional[List[str]]] = Field(
        description="thermal and over-current: what is held back; empty while nothing is, null where nothing tells"
    )
    over_current_events: Optional[int] = Field(description="since boot")


class Status(Shape):
    """One page of everything."""

    latentd: str = Field(description="version of the program")
    version: int = Field(description="version of what was learned")
    started_at: str
    uptime_s: float
    readiness: Readiness
    classes: int
    samples: int
    engine: Engine
    learner: Learner
    accuracy: Accuracy
    energy: Dict[str, Any] = Field(description="as /v1/energy")
    memory: Memory
    journal: Journal
    queues: Dict[str, Queue]
    temperatures_c: Dict[str, Optional[float]]
    board: Board
    needs_restart: List[str] = Field(description="keys that were changed in the configuration files since the start")


class Limits(Shape):
    max_body_bytes: int
    max_images: int
    max_image_bytes: int
    max_pixels: int
    max_frames: int
    max_label_chars: int
    max_connections: int


class Setting(Shape):
    value: Any
    origin: str
    unit: str
    help: str


class Info(Shape):
    latentd: str
    python: str
    machine: str
    board: Optional[str]
    power_mode: Optional[str]
    media_types: List[str]
    limits: Limits
    engine: Engine
    config: Dict[str, Setting]


class Health(Shape):
    status: str
