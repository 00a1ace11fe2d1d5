"""A daemon's parts for tests of the service: a frozen stage and a learner without a model, around the real journal, ledger and decoder."""

from __future__ import annotations

import asyncio
import functools
import io
import threading
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple, cast

import httpx
import numpy as np
from fastapi import FastAPI
from numpy.typing import NDArray
from PIL import Image

from latentd.config import Config, HttpConfig
from latentd.energy.ledger import EnergyLedger
from latentd.engines.choose import Attempt, Choice
from latentd.engines.stage import Encoded, StageSpec
from latentd.learning.accuracy import AccuracyReport, ClassAccuracy, Score
from latentd.learning.drift import Drift
from latentd.learning.learner import Learner
from latentd.learning.status import LearnerStatus, MemoryStatus
from latentd.learning.unknown import UnknownReport
from latentd.replay.journal import Journal
from latentd.replay.latents import make_latent_codec
from latentd.replay.limits import JournalLimits
from latentd.service.app import create_app
from latentd.service.batcher import Batcher
from latentd.service.bodies import PendingBytes
from latentd.service.metrics import Metrics
from latentd.service.parts import Parts
from latentd.service.pipeline import Pipeline
from latentd.service.readiness import Readiness
from latentd.vision.checkpoints import Backbone
from latentd.vision.images import ImageLimits, decode
from latentd.vision.shape import VitShape

SIZE = 16
SPEC = StageSpec("fake", "f" * 64, image_size=SIZE, split=2, class_tokens=2, width=4, tokens=5)
BACKBONE = Backbone("fake", Path(), "f" * 64, VitShape(width=4, heads=(1, 1), mlp_width=(8, 8), patch=8, grid=2), "made up")
WAIT_S = 10.0  # nothing here takes that long; it bounds a test that fails
BASE = "http://127.0.0.1:8420"


def picture(seed: int = 0, format: str = "PNG", size: Tuple[int, int] = (20, 15), mode: str = "RGB") -> bytes:
    """An encoded picture of blotches; another seed is another picture."""
    dice = np.random.default_rng(seed)
    pixels = dice.integers(0, 256, (3, 4, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST).convert(mode).save(file, format)
    return file.getvalue()


class FakeStage:
    """Features are the pixels of a few fixed places. `gate` holds runs up while it is cleared; `entered` is set when one began."""

    name = "fake"
    spec = SPEC

    def __init__(self, lanes: int = 1) -> None:
        self.lanes = lanes
        self.batches: List[int] = []
        self.shared: List[bool] = []
        self.thread_names: List[str] = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.error: Optional[BaseException] = None
        self.poison: Optional[int] = None  # rows with this value in the first pixel give NaN
        self.closed = False

    def encode(self, pixels: NDArray[np.uint8], tokens: bool = False, shared: bool = False) -> Encoded:
        self.batches.append(len(pixels))
        self.shared.append(shared)
        self.thread_names.append(threading.current_thread().name)
        self.entered.set()
        assert self.gate.wait(WAIT_S), "the test never opened the gate"
        if self.error is not None:
            raise self.error
        flat = pixels.reshape(len(pixels), -1).astype(np.float32) / 255.0
        features = flat[:, :: flat.shape[1] // SPEC.features_width][:, : SPEC.features_width].copy()
        if self.poison is not None:
            features[pixels[:, 0, 0, 0] == self.poison] = np.nan
        rows = flat[:, : SPEC.tokens * SPEC.width].reshape(len(pixels), SPEC.tokens, SPEC.width) if tokens else None
        return Encoded(features, rows)

    def close(self) -> None:
        self.closed = True


@dataclass
class FakeSnapshot:
    """Uniform over the labels, but sure of the first one."""

    version: int = 7
    labels: Tuple[str, ...] = ("cat", "dog", "owl")
    refuses: bool = False
    wants_tokens: bool = False

    def predict(self, features: NDArray[np.float32], tokens: Optional[NDArray[np.float32]] = None) -> NDArray[np.float64]:
        C = len(self.labels)
        row = np.full(C, 0.5 / (C - 1)) if C > 1 else np.ones(C)
        row[:1] = 0.5 if C > 1 else 1.0
        return np.tile(row, (len(features), 1))

    def decide(self, features: NDArray[np.float32], probabilities: NDArray[np.float64]) -> List[str]:
        if self.refuses or not self.labels:
            return ["unknown"] * len(features)
        return [self.labels[int(best)] for best in probabilities.argmax(axis=1)]


class FakeLearner:
    """Learns at once, unless `learns` is False; then `learned` futures wait for `finish`."""

    def __init__(self, journal: Journal) -> None:
        self.snapshot = FakeSnapshot()
        self.learns = True
        self.doubted: Tuple[str, ...] = ()
        self.lag_samples = 0
        self.state = "idle"
        self._journal = journal
        self._waiting: List[Tuple[int, Future[None]]] = []

    def learned(self, seq: int) -> Future[None]:
        future: Future[None] = Future()
        self._waiting.append((seq, future))
        if self.learns:
            self.finish()
        return future

    def finish(self) -> None:
        for seq, future in self._waiting:
            self._journal.learned_seq = max(self._journal.learned_seq, seq)
            future.set_result(None)
        self._waiting = []

    def status(self) -> LearnerStatus:
        return LearnerStatus(self.state, None, self._journal.learned_seq, self.lag_samples, 0.5, 3, 0.01, 0, None, {"reason": "none yet"})

    def memory(self) -> MemoryStatus:
        stored = {record.class_id: 1 for record in self._journal.classes()}
        return MemoryStatus(100, 1, 40, 4000, 0, "int8 token", 0, stored, self.doubted)

    def accuracy(self) -> AccuracyReport:
        drifts = {"dog": Drift(1.25, "s00000002", drifting=True), "cat": Drift(0.0, None, drifting=False)}
        per_class = tuple(
            ClassAccuracy(record.name, Score(1, 2), Score(0, 0), drifts.get(record.name)) for record in self._journal.classes()
        )
        unknown = UnknownReport(0.05, 0.4, None, 80, 1, 20)
        return AccuracyReport(Score(3, 4), Score(3, 4), Score(0, 0), per_class, {"cat": {"dog": 1}}, unknown)


@dataclass
class World:
    """One daemon without a model, and its application."""

    parts: Parts
    app: FastAPI
    stage: FakeStage
    learner: FakeLearner
    deaths: List[BaseException] = field(default_factory=list)

    def call(self, method: str, url: str, **request: Any) -> httpx.Response:
        """One request through the whole application."""
        return asyncio.run(self.acall(method, url, **request))

    async def acall(self, method: str, url: str, **request: Any) -> httpx.Response:
        transport = httpx.ASGITransport(app=cast(Any, self.app))
        async with httpx.AsyncClient(transport=transport, base_url=BASE) as client:
            return await client.request(method, url, **request)

    def classify(self, *images: bytes, **request: Any) -> httpx.Response:
        return self.call("POST", "/v1/classify", files=[("image", image) for image in images], **request)

    def learn(self, *taught: Tuple[bytes, str], **request: Any) -> httpx.Response:
        files = [("image", image) for image, _ in taught]
        return self.call("POST", "/v1/learn", files=files, data={"label": [label for _, label in taught]}, **request)


def make_world(folder: Path, stop: Callable[[Callable[[], object]], object], config: Optional[Config] = None, **http: Any) -> World:
    """A running world. `stop` gets each act that ends a part of it, in the order of making."""
    config = config or Config()
    config = replace(config, http=replace(config.http, **http) if http else config.http)
    metrics, ledger, codec, stage = (
        Metrics(),
        EnergyLedger(),
        make_latent_codec("int8", "token", (SPEC.class_tokens, SPEC.width)),
        FakeStage(),
    )
    journal = Journal(folder / "journal.sqlite", codec=codec, feature_width=SPEC.features_width, limits=_limits(config.http))
    stop(journal.close)
    journal.start()
    deaths: List[BaseException] = []
    batcher = Batcher(
        stage, ledger, metrics, max_batch=config.engine.max_batch, capacity=config.engine.queue_images, on_death=deaths.append
    )
    stop(functools.partial(batcher.stop, WAIT_S))
    stop(stage.gate.set)
    batcher.start()
    limits = ImageLimits(config.http.max_image_bytes, config.http.max_pixels, config.http.max_frames)
    pipeline = Pipeline(batcher, functools.partial(decode, size=SIZE, limits=limits), config.engine.decode_threads, metrics)
    stop(pipeline.close)
    learner = FakeLearner(journal)
    parts = Parts(
        config=config,
        choice=Choice(stage, (Attempt("better", "unavailable", "not installed"), Attempt("fake", "serving", "it is the only one", 1.0))),
        pipeline=pipeline,
        journal=journal,
        learner=cast(Learner, learner),
        ledger=ledger,
        codec=codec,
        metrics=metrics,
        readiness=Readiness(batcher, np.zeros((SIZE, SIZE, 3), np.uint8)),
        pending=PendingBytes(config.http.max_pending_bytes),
        temperatures_c=lambda: {"CPU-therm": 41.5, "GPU-therm": None},
    )
    return World(parts, create_app(parts), stage, learner, deaths)


def _limits(http: HttpConfig) -> JournalLimits:
    return JournalLimits(1 << 28, duplicate_cosine=1.5, holdout_every=0, holdout_per_class=10, max_label_chars=http.max_label_chars)


def assert_problem(answer: httpx.Response, status: int, code: str) -> Dict[str, Any]:
    """The answer is this problem, in the one shape of all errors; gives the document."""
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json"), answer.text
    problem: Dict[str, Any] = answer.json()
    assert problem["code"] == code, problem
    assert problem["status"] == status
    assert set(problem) == {"type", "title", "status", "code", "detail", "hint", "request_id"}
    assert all(problem.values())
    return problem
