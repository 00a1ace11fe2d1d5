"""Learning on a GPU: what goes through which stream, what is complete when, and what happens where the GPU has no memory."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path
from typing import Any, Callable, Iterator, List, Optional

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import tiny
from fake_cuda import FakeCuda
from latentd.engines.torch_queue import ANSWERING, LEARNING, TorchQueue
from latentd.errors import ConfigError
from latentd.learning import place as place_module
from latentd.learning.adapted import Adapted
from latentd.learning.adaptive import AdaptiveHead
from latentd.learning.analytic import LinearHead
from latentd.learning.blocks import UpperBlocks
from latentd.learning.place import Place, answering
from latentd.learning.snapshot import AdaptedHead, Snapshot
from sleepers import CODEC, POOL, SETTINGS, D, code, filled, held, run

FULL = "CUDA out of memory. Tried to allocate 20.00 MiB"
BRIEF = dataclasses.replace(SETTINGS, epochs=1.0)  # two mini-batches of 20 latents


Limit = Callable[[int], List[int]]


@pytest.fixture
def room_for(fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> Limit:
    """room_for(n): the GPU has memory for n latents at once. The sizes of what is tried on it are in what it gives."""
    forward = UpperBlocks.forward

    def limit(most: int) -> List[int]:
        tried: List[int] = []

        def limited(self: UpperBlocks, tokens: torch.Tensor, basis: Optional[torch.Tensor] = None) -> torch.Tensor:
            if fake_cuda.current is not None:
                tried.append(len(tokens))
                if len(tokens) > most:
                    raise RuntimeError(FULL)
            return forward(self, tokens, basis)

        monkeypatch.setattr(UpperBlocks, "forward", limited)
        return tried

    return limit


def asleep(adapted: Adapted) -> Adapted:
    run(adapted.sleep(filled(20), held(4), 20))
    return adapted


def assert_same(one: Adapted, other: Adapted) -> None:
    first, second = one.state()[0], other.state()[0]
    assert first.keys() == second.keys() and first
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


# --- the blocks ---


def test_a_sleep_on_a_gpu_learns_what_one_on_the_cpu_learns(base: UpperBlocks, on_gpu: Place) -> None:
    assert_same(asleep(Adapted(base, CODEC, BRIEF, on_gpu)), asleep(Adapted(base, CODEC, BRIEF)))


def test_all_of_a_sleep_goes_through_the_learners_stream_and_every_step_is_complete_at_its_end(
    base: UpperBlocks, on_gpu: Place, fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, computed = UpperBlocks.forward, []

    def seen(self: UpperBlocks, tokens: torch.Tensor, basis: Optional[torch.Tensor] = None) -> torch.Tensor:
        computed.append(fake_cuda.current)
        return forward(self, tokens, basis)

    monkeypatch.setattr(UpperBlocks, "forward", seen)
    adapted = Adapted(base, CODEC, BRIEF, on_gpu)
    (stream,) = fake_cuda.streams
    for _ in adapted.sleep(filled(20), held(4), 20):
        assert (fake_cuda.current, stream.unfinished) == (None, 0), "classify requests come in between"
    assert set(computed) == {stream}
    assert stream.priority == LEARNING
    assert fake_cuda.freed == 1, "what training held is given back"


def test_a_sleep_that_is_broken_off_gives_its_memory_back_and_leaves_no_gradient_to_the_next(
    base: UpperBlocks, on_gpu: Place, fake_cuda: FakeCuda
) -> None:
    adapted, other = Adapted(base, CODEC, BRIEF, on_gpu), Adapted(base, CODEC, BRIEF)
    sleep = adapted.sleep(filled(20), {}, 20)
    next(sleep), next(sleep)  # a micro-batch has left its gradient
    adapted.move("s00000001", code(0, 0), 0, 1)
    run(sleep)
    assert fake_cuda.freed == 1
    assert_same(asleep(adapted), asleep(other))


class MetaQueue(TorchQueue):
    """A device without numbers. An operator that is given one tensor from it and one from the CPU fails, as on a GPU."""

    def __init__(self, cuda: FakeCuda) -> None:
        super().__init__("cuda", LEARNING, cuda)
        self.device = torch.device("meta")

    def download(self, tensor: torch.Tensor) -> NDArray[np.float32]:
        assert tensor.device == self.device, "it was computed elsewhere"
        return np.zeros(tuple(tensor.shape), np.float32)


@pytest.mark.parametrize("split", [1, 2])
def test_nothing_that_a_sleep_computes_with_is_left_on_the_cpu(tmp_path: Path, fake_cuda: FakeCuda, split: int) -> None:
    base = UpperBlocks.load(tiny.backbone(tmp_path), split)
    adapted = Adapted(base, CODEC, BRIEF, Place(MetaQueue(fake_cuda)))
    run(adapted.sleep(filled(20), held(4), 20))
    assert adapted.sleeps == 1
    assert adapted.serving is not None
    assert {parameter.device.type for parameter in adapted.serving.parameters()} == {"meta"}
    assert {parameter.device.type for parameter in base.parameters()} == {"cpu"}, "the base given stays where it is"
    with pytest.raises(RuntimeError):
        base(torch.zeros(1, POOL.tokens, D, device="meta"))  # else this test could not fail


def test_a_version_from_a_gpu_is_loaded_on_the_cpu_and_answers_alike(base: UpperBlocks, on_gpu: Place) -> None:
    adapted, asked = asleep(Adapted(base, CODEC, BRIEF, on_gpu)), held(4)
    again = Adapted(base, CODEC, BRIEF)
    again.restore(*adapted.state(), asked)
    np.testing.assert_allclose(
        again.opinion(again.head(), list(asked)).scores, adapted.opinion(adapted.head(), list(asked)).scores, rtol=1e-4, atol=1e-3
    )


# --- without memory ---


@pytest.mark.parametrize("most", [1, 2, 3])
def test_micro_batches_that_are_too_large_are_halved_and_nothing_else_changes(
    base: UpperBlocks, on_gpu: Place, room_for: Limit, most: int
) -> None:
    plain = asleep(Adapted(base, CODEC, BRIEF))
    tried = room_for(most)
    adapted = asleep(Adapted(base, CODEC, BRIEF, on_gpu))
    assert (on_gpu.name, on_gpu.reason, adapted.sleeps) == ("cuda", None, 1)
    assert max(tried) == SETTINGS.microbatch
    for name, array in plain.blocks.state().items():
        assert np.abs(array - adapted.blocks.state()[name]).mean() < 1e-4, name  # AdamW makes steps of what rounding leaves of nothing


def test_where_one_latent_is_too_much_the_cpu_goes_on_and_says_why(base: UpperBlocks, on_gpu: Place, room_for: Limit) -> None:
    adapted, tried = Adapted(base, CODEC, BRIEF, on_gpu), room_for(0)
    run(adapted.sleep(filled(20), held(4), 20))
    assert tried == [4, 2, 1]
    assert (adapted.sleeps, adapted.serving) == (0, None), "the sleep in which it happened is void"
    assert adapted.is_due(20, filled(20))
    assert (on_gpu.name, on_gpu.reason) == ("cpu", f"the GPU had no memory: {FULL}")
    asleep(adapted)
    assert (adapted.sleeps, tried) == (1, [4, 2, 1])


def test_what_answers_goes_on_with_the_learner_to_the_cpu_and_computes_the_same(base: UpperBlocks, on_gpu: Place, room_for: Limit) -> None:
    adapted, tokens = asleep(Adapted(base, CODEC, BRIEF, on_gpu)), np.ones((1, POOL.tokens, D), np.float32)
    before = adapted.serving
    assert before is not None
    expected = before.features(tokens)
    room_for(0)
    adapted.hold_out("h00000099", code(0, 99))
    assert on_gpu.name == "cpu"
    assert adapted.serving is not None and adapted.serving is not before, "the version that is published keeps its own"
    np.testing.assert_array_equal(adapted.serving.features(tokens), expected)
    assert adapted.opinion(adapted.head(), ["h00000099"]).scores.shape == (1, 2)


def test_blocks_that_a_caller_still_holds_from_the_gpu_are_taken_along_to_the_cpu(base: UpperBlocks, fake_cuda: FakeCuda) -> None:
    place = Place(MetaQueue(fake_cuda))
    adapted, hosted = Adapted(base, CODEC, BRIEF, place), Adapted(base, CODEC, BRIEF).blocks
    taken: List[UpperBlocks] = []

    def host(blocks: UpperBlocks) -> UpperBlocks:
        taken.append(blocks)
        return hosted

    adapted._hosted = host  # type: ignore[method-assign, assignment]
    old = adapted.blocks
    place.queue = TorchQueue()
    codes = np.frombuffer(code(0, 0), np.uint8)[None]
    np.testing.assert_allclose(adapted._through(old, codes), hosted.features(CODEC.decode_tokens(codes)), atol=1e-5)
    assert taken == [old]


def test_a_gpu_without_room_for_the_pretrained_blocks_is_left_at_once(
    base: UpperBlocks, on_gpu: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Any:
        raise RuntimeError(FULL)

    monkeypatch.setattr(UpperBlocks, "to", full)
    adapted = Adapted(base, CODEC, BRIEF, on_gpu)
    assert on_gpu.name == "cpu"
    assert_same(asleep(adapted), asleep(Adapted(base, CODEC, BRIEF)))


def test_another_failure_of_a_step_is_not_taken_for_a_shortage(base: UpperBlocks, on_gpu: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*_: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(UpperBlocks, "forward", lost)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        run(Adapted(base, CODEC, BRIEF, on_gpu).sleep(filled(20), {}, 20))
    assert on_gpu.name == "cuda"


def test_a_cpu_without_memory_for_one_latent_is_told_to_the_learner_which_waits(base: UpperBlocks, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(UpperBlocks, "forward", full)
    with pytest.raises(MemoryError):
        run(Adapted(base, CODEC, BRIEF).sleep(filled(20), {}, 20))


# --- the head ---


def head(place: Place, steps: int = 3) -> AdaptiveHead:
    made = AdaptiveHead(np.zeros(6, np.float32), np.ones(6, np.float32), learning_rate=1e-2, label_smoothing=0.1, seed=0, place=place)
    made.grow([0, 1])
    rng = np.random.default_rng(0)
    for _ in range(steps):
        made.train_step(rng.standard_normal((8, 6)).astype(np.float32), [0, 1] * 4, rng)
    return made


def test_the_head_learns_on_a_gpu_what_it_learns_on_the_cpu(on_gpu: Place, fake_cuda: FakeCuda) -> None:
    one, other = head(on_gpu), head(Place())
    assert fake_cuda.waits > 3
    for name, value in other.state().items():
        np.testing.assert_array_equal(one.state()[name], value, err_msg=name)
    again = head(Place(), 0)
    again.restore(one.state(), one.steps)
    np.testing.assert_array_equal(again.frozen().w1, other.frozen().w1)


def test_a_head_without_memory_goes_on_on_the_cpu_with_the_same_step(on_gpu: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    step, tried = AdaptiveHead._step, []

    def full(self: AdaptiveHead, *arguments: Any) -> float:
        tried.append(self._place.name)
        if self._place.name == "cuda":
            raise RuntimeError(FULL)
        return step(self, *arguments)

    expected = head(Place()).state()
    monkeypatch.setattr(AdaptiveHead, "_step", full)
    found = head(on_gpu).state()
    assert tried == ["cuda", "cpu", "cpu", "cpu"]
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_no_tensor_of_the_head_is_left_on_the_cpu(fake_cuda: FakeCuda) -> None:
    made = head(Place(MetaQueue(fake_cuda)), 0)
    with pytest.raises(RuntimeError, match="meta"):  # the loss has no number to give; all before it was computed
        made.train_step(np.zeros((8, 6), np.float32), [0, 1] * 4, np.random.default_rng(0))
    assert made.steps == 1
    assert {tensor.device.type for tensor in made._weights.values()} == {"meta"}


# --- answers ---


def snapshot(blocks: UpperBlocks, base: UpperBlocks) -> Snapshot:
    floor = LinearHead((0, 1), np.eye(2, dtype=np.float32), np.zeros(2, np.float32))
    own = LinearHead((0, 1), np.ones((base.features_width, 2), np.float32) * np.array([0, 1], np.float32), np.zeros(2, np.float32))
    return Snapshot(1, (0, 1), ("cat", "dog"), floor, None, 0.5, 1.0, None, 0.0, adapted=AdaptedHead(blocks, own, 1.0))


def test_each_thread_answers_through_a_stream_of_its_own_that_goes_before_the_learners(base: UpperBlocks, fake_cuda: FakeCuda) -> None:
    found: List[TorchQueue] = []

    def ask() -> None:
        found.extend(answering(base, lambda device, priority: fake_cuda.queue("cuda", priority)) for _ in range(2))

    for _ in range(2):
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
    assert found[0] is found[1] and found[2] is found[3] and found[0] is not found[2]
    assert [stream.priority for stream in fake_cuda.streams] == [ANSWERING, ANSWERING]


@pytest.fixture
def answers_on_gpu(fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(place_module._own, "queues", {"cpu": fake_cuda.queue("cuda", ANSWERING)})
    return iter(())


FEATURES, TOKENS = np.array([[1.0, 0.0], [0.0, 1.0]], np.float32), np.ones((2, POOL.tokens, D), np.float32)


def test_answers_that_need_too_much_memory_together_are_computed_one_by_one(
    base: UpperBlocks, room_for: Limit, answers_on_gpu: None
) -> None:
    asked = snapshot(base, base)
    expected = asked.predict(FEATURES, TOKENS)
    tried = room_for(1)
    np.testing.assert_allclose(asked.predict(FEATURES, TOKENS), expected, rtol=1e-5)
    assert tried == [2, 1, 1]


@pytest.mark.parametrize("text", [FULL, "CUDA error: unspecified launch failure"])
def test_where_the_device_fails_the_floor_answers_alone(base: UpperBlocks, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    def failing(*_: Any) -> Any:
        raise RuntimeError(text)

    asked = snapshot(base, base)
    floor = asked.predict(FEATURES)
    monkeypatch.setattr(UpperBlocks, "forward", failing)
    np.testing.assert_array_equal(asked.predict(FEATURES, TOKENS), floor)


def test_a_bug_in_the_blocks_is_no_trouble_of_the_device(base: UpperBlocks) -> None:
    with pytest.raises(RuntimeError):
        snapshot(base, base).predict(FEATURES, TOKENS[:, :, :5].copy())


# --- the choice ---


def test_without_a_gpu_auto_is_the_cpu_and_cuda_is_an_error_that_names_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(place_module, "has_gpu", lambda: False)
    for wanted in ("auto", "cpu"):
        assert (Place.of(wanted).name, Place.of(wanted).reason) == ("cpu", None)
    with pytest.raises(ConfigError, match=r"learn.device = cuda"):
        Place.of("cuda")


def test_a_gpu_that_is_lost_to_this_process_is_left_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*_: Any) -> TorchQueue:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(place_module, "has_gpu", lambda: True)
    monkeypatch.setattr(place_module, "TorchQueue", lambda *given: lost() if given else TorchQueue())
    place = Place.of("auto")
    assert place.name == "cpu"
    assert "illegal memory access" in str(place.reason)


def test_cpu_is_the_cpu_also_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(place_module, "has_gpu", lambda: True)
    assert Place.of("cpu").name == "cpu"
