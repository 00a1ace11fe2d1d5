"""The learner on the GPU: what it learns, what a version of it is worth elsewhere, and what classify notices of it."""

from __future__ import annotations

import json
import os
import statistics
import threading
import time
from pathlib import Path
from typing import Any, Callable, Dict, List

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import tiny
from device.gpu import LARGE, SPLIT, Model, large_memory
from latentd.engines.eager import EagerStage
from latentd.engines.torch_queue import ANSWERING, TorchQueue
from latentd.learning.adapted import Adapted
from latentd.learning.adaptive import AdaptiveHead
from latentd.learning.blocks import UpperBlocks
from latentd.learning.place import Place, answering
from latentd.learning.sleep import SleepSettings
from sleepers import CODEC, POOL, SETTINGS, D, filled, held, run

pytestmark = pytest.mark.device
ROUNDS, WARM_UP = 200, 20


@pytest.fixture
def base(tmp_path: Path) -> UpperBlocks:
    return UpperBlocks.load(tiny.backbone(tmp_path), 1)


def right(adapted: Adapted) -> float:
    asked = held(100)
    opinion = adapted.opinion(adapted.head(), list(asked))
    answers = np.array(opinion.class_ids)[opinion.scores.argmax(axis=1)]
    return float((answers == np.array([class_id for class_id, _ in asked.values()])).mean())


def test_a_sleep_learns_as_much_as_on_the_cpu_and_its_version_is_loaded_there(base: UpperBlocks) -> None:
    memory, asked = filled(200), held(100)
    there, here = Adapted(base, CODEC, SETTINGS, Place.of("cuda")), Adapted(base, CODEC, SETTINGS)
    for adapted in (there, here):
        run(adapted.sleep(memory, asked, 200))
    assert there.serving is not None
    assert {parameter.device.type for parameter in there.serving.parameters()} == {"cuda"}
    assert abs(right(there) - right(here)) < 0.08
    again = Adapted(base, CODEC, SETTINGS)
    again.restore(*there.state(), asked)
    assert right(again) == pytest.approx(right(there), abs=0.02)


def test_other_threads_answer_with_the_blocks_while_the_next_sleep_runs(base: UpperBlocks) -> None:
    memory, tokens = filled(100), np.random.default_rng(0).standard_normal((8, POOL.tokens, D)).astype(np.float32)
    adapted = Adapted(base, CODEC, SETTINGS, Place.of("cuda"))
    run(adapted.sleep(memory, {}, 100))
    serving = adapted.serving
    assert serving is not None
    expected = serving.features(tokens, answering(serving))
    found: List[NDArray[np.float32]] = []

    def ask() -> None:
        found.extend(serving.features(tokens, answering(serving)) for _ in range(100))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    run(adapted.sleep(memory, {}, 200))
    for thread in threads:
        thread.join()
    assert len(found) == 300
    for each in found:
        np.testing.assert_allclose(each, expected, rtol=1e-4, atol=1e-4)


def test_the_head_learns_as_on_the_cpu() -> None:
    heads: List[AdaptiveHead] = []
    for place in (Place.of("cuda"), Place()):
        rng = np.random.default_rng(0)
        head = AdaptiveHead(np.zeros(64, np.float32), np.ones(64, np.float32), learning_rate=1e-3, label_smoothing=0.1, seed=0, place=place)
        head.grow([0, 1, 2])
        for _ in range(50):
            head.train_step(rng.standard_normal((32, 64)).astype(np.float32), rng.integers(0, 3, 32).tolist(), rng)
        heads.append(head)
    for name, value in heads[1].state().items():
        np.testing.assert_allclose(heads[0].state()[name], value, rtol=0.02, atol=2e-3, err_msg=name)


# --- beside classify ---


def latencies_s(encode: Callable[[], Any]) -> List[float]:
    found: List[float] = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        encode()
        found.append(time.perf_counter() - began)
    return found


def beside(work: Adapted, encode: Callable[[], Any]) -> List[float]:
    """Latencies while this sleeps without a pause: the learner's own courtesy between steps is not in them."""
    memory, stop, slept = large_memory(), threading.Event(), threading.Event()

    def learn() -> None:
        while not stop.is_set():
            for number, _ in enumerate(work.sleep(memory, {}, 256)):
                if number > WARM_UP:
                    slept.set()
                if stop.is_set():
                    return

    thread = threading.Thread(target=learn)
    thread.start()
    try:
        assert slept.wait(120.0), "the learner did not get going"
        return latencies_s(encode)
    finally:
        stop.set()
        thread.join()


def priority(queue: TorchQueue) -> int:
    """As CUDA has it: lower goes first."""
    return int(queue._stream.priority)


def test_classify_goes_before_a_busy_learner_and_is_right(model: Model, gpu: str, record_property: Callable[[str, Any], None]) -> None:
    """How much slower it gets, before the learner's stream and level with it, is only reported: Python's lock decides most of it."""
    stage, pixels = EagerStage(model.spec, model.vit, "cuda"), model.pixels(1)
    settings = SleepSettings(128, 0.5, 50.0, 128, 8, 16, 1e-3, 0.1, 0)
    base, places = UpperBlocks.load(model.backbone, SPLIT), [Place.of("cuda"), Place(TorchQueue("cuda", ANSWERING))]
    assert priority(stage._queue) < priority(places[0].queue)
    assert priority(stage._queue) == priority(places[1].queue)
    answers: List[NDArray[np.float32]] = []

    def encode() -> None:
        answers.append(stage.encode(pixels).features)

    for _ in range(WARM_UP):
        encode()
    idle = latencies_s(encode)
    behind, level = (beside(Adapted(base, LARGE, settings, place), encode) for place in places)
    assert len(answers) == WARM_UP + 3 * ROUNDS
    for each in answers:
        np.testing.assert_allclose(each, answers[0], rtol=1e-3, atol=1e-3, err_msg="not what it gave while the learner was idle")
    found: Dict[str, Any] = {"gpu": gpu, "idle_ms": 1e3 * statistics.median(idle)}
    for name, busy in (("learner_behind", behind), ("learner_level", level)):
        found[f"{name}_median_ratio"] = statistics.median(busy) / statistics.median(idle)
        found[f"{name}_p95_ratio"] = statistics.quantiles(busy, n=20)[-1] / statistics.quantiles(idle, n=20)[-1]
    for key, value in found.items():
        record_property(key, value)
    report(found)


def report(found: Dict[str, Any]) -> None:
    """Where LATENTD_DEVICE_REPORT names a file, figures are added to it, one JSON object a line."""
    path = os.environ.get("LATENTD_DEVICE_REPORT")
    if path:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")


def test_a_sleep_gives_back_what_it_took(model: Model) -> None:
    settings = SleepSettings(128, 0.5, 0.5, 128, 8, 16, 1e-3, 0.1, 0)
    adapted, memory = Adapted(UpperBlocks.load(model.backbone, SPLIT), LARGE, settings, Place.of("cuda")), large_memory()
    run(adapted.sleep(memory, {}, 256))
    torch.cuda.empty_cache()
    before, peak = torch.cuda.memory_reserved(), 0
    for _ in adapted.sleep(memory, {}, 512):
        peak = max(peak, torch.cuda.memory_reserved())
    assert peak > before
    assert torch.cuda.memory_reserved() <= before + (8 << 20)
