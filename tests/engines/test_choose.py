"""Which engine serves, why not the others, and the gate that a wrong engine does not pass."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, List, Tuple

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

import tiny
from latentd import config
from latentd.engines.artefacts import Reference
from latentd.engines.choose import Attempt, Choice, agreement, choose
from latentd.engines.onnx import OnnxStage, engine_name
from latentd.engines.stage import Encoded, FrozenStage, StageSpec
from latentd.errors import CheckpointError, ConfigError, EngineError
from latentd.vision import checkpoints
from latentd.vision.probe import probe_images


def chosen(tmp_path: Path, **flags: Any) -> Choice:
    return choose(tiny.settings(tmp_path, **{"engine__order": "onnxruntime,eager", **flags}), tiny.backbone(tmp_path))


def states(choice: Choice) -> List[Tuple[str, str]]:
    return [(attempt.engine, attempt.state) for attempt in choice.attempts]


def answer(stage: FrozenStage, pixels: NDArray[np.uint8]) -> Reference:
    features, tokens = stage.encode(pixels, tokens=True)
    assert tokens is not None
    return Reference(features, tokens)


def cosine(attempt: Attempt) -> float:
    assert attempt.cosine is not None, attempt
    return attempt.cosine


def test_the_first_engine_that_agrees_serves_and_every_engine_is_accounted_for(tmp_path: Path) -> None:
    choice = chosen(tmp_path)
    assert choice.stage.name == "onnxruntime-cpu"
    assert states(choice) == [("onnxruntime-cuda", "unavailable"), ("onnxruntime-cpu", "serving"), ("eager", "not tried")]
    cuda, cpu, eager = choice.attempts
    assert "no CUDAExecutionProvider" in cuda.reason
    assert cosine(cpu) > 0.999999
    assert cpu.seconds > 0
    assert "onnxruntime-cpu" in eager.reason


def test_by_default_tensorrt_comes_first_and_is_passed_where_it_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorrt" else real(name))
    choice = chosen(tmp_path, engine__order="tensorrt,onnxruntime,eager")
    assert choice.attempts[0] == Attempt("tensorrt", "unavailable", "tensorrt is not installed", None, choice.attempts[0].seconds)
    assert (choice.stage.name, choice.pending) == ("onnxruntime-cpu", ())
    assert config.EngineConfig().order == ("tensorrt", "onnxruntime", "eager")


def test_the_order_decides(tmp_path: Path) -> None:
    choice = chosen(tmp_path, engine__order="eager,onnxruntime", engine__providers="CPUExecutionProvider")
    assert choice.stage.name == "eager-cpu"
    assert states(choice) == [("eager", "serving"), ("onnxruntime-cpu", "not tried")]


def test_both_engines_answer_alike_and_give_tokens_only_when_asked(tmp_path: Path) -> None:
    onnx, eager = (chosen(tmp_path, engine__order=order).stage for order in ("onnxruntime", "eager"))
    assert onnx.spec == eager.spec
    pixels = tiny.pixels(3)
    for stage in (onnx, eager):
        assert stage.encode(pixels).tokens is None
    a, b = answer(onnx, pixels), answer(eager, pixels)
    assert a.features.dtype == b.features.dtype == np.float32
    np.testing.assert_allclose(a.features, b.features, atol=2e-4)
    np.testing.assert_allclose(a.tokens, b.tokens, atol=2e-4)


class Wrong:
    """An OnnxStage whose answers were tampered with."""

    name = "onnxruntime-cpu"
    lanes = 1

    def __init__(self, spec: StageSpec, *_: Any, **__: Any) -> None:
        self.spec = spec
        self.is_open = True
        opened.append(self)

    def encode(self, pixels: Any, tokens: bool = False, shared: bool = False) -> Encoded:
        right = reference_stage[0].encode(pixels, tokens)
        features, after = right.features.copy(), right.tokens.copy() if right.tokens is not None else None
        tamper[0](features, after)
        return Encoded(features, after)

    def close(self) -> None:
        self.is_open = False


opened: List[Wrong] = []
reference_stage: List[Any] = []
tamper: List[Any] = []


def one_token_turned(features: NDArray[np.float32], tokens: NDArray[np.float32]) -> None:
    tokens[0, 5] = tokens[0, 6]


def one_class_token_turned(features: NDArray[np.float32], tokens: NDArray[np.float32]) -> None:
    features[0, 128:] = features[0, 128:][::-1].copy()


def a_nan(features: NDArray[np.float32], tokens: NDArray[np.float32]) -> None:
    tokens[-1, 3, 3] = np.nan


def infinity(features: NDArray[np.float32], tokens: NDArray[np.float32]) -> None:
    features[-1, 3] = np.inf


def all_zero(features: NDArray[np.float32], tokens: NDArray[np.float32]) -> None:
    features[:] = 0


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (one_token_turned, "below 0.999"),
        (one_class_token_turned, "below 0.999"),
        (a_nan, "NaN"),
        (infinity, "infinite"),
        (all_zero, "cosine"),
    ],
)
def test_an_engine_that_answers_wrongly_is_passed_over_with_the_numbers_and_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: Any, reason: str
) -> None:
    reference_stage[:] = [chosen(tmp_path, engine__order="eager").stage]
    tamper[:] = [wrong]
    opened.clear()
    monkeypatch.setattr("latentd.engines.onnx.OnnxStage", Wrong)
    choice = chosen(tmp_path)
    assert choice.stage.name == "eager-cpu"
    assert states(choice)[1:] == [("onnxruntime-cpu", "passed over"), ("eager", "serving")]
    assert reason in choice.attempts[1].reason
    assert [stage.is_open for stage in opened] == [False]


def test_a_lower_bound_lets_a_less_exact_engine_serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference_stage[:] = [chosen(tmp_path, engine__order="eager").stage]
    tamper[:] = [lambda features, tokens: np.multiply(tokens, 1 + 0.2 * (np.arange(128) % 2), out=tokens)]
    monkeypatch.setattr("latentd.engines.onnx.OnnxStage", Wrong)
    assert chosen(tmp_path, engine__min_cosine=0.999).stage.name == "eager-cpu"
    choice = chosen(tmp_path, engine__min_cosine=0.99)
    assert choice.stage.name == "onnxruntime-cpu"
    assert 0.99 < cosine(choice.attempts[1]) < 0.999


def test_an_engine_that_is_wrong_only_for_a_full_batch_is_noticed(tmp_path: Path) -> None:
    right = chosen(tmp_path, engine__order="eager").stage
    probes = probe_images(tiny.SIZE)
    reference = answer(right, probes)

    class Batched(Wrong):
        def encode(self, pixels: Any, tokens: bool = False, shared: bool = False) -> Encoded:
            found = right.encode(pixels, tokens)
            return found if len(pixels) == 1 else Encoded(found.features[::-1].copy(), found.tokens)

    assert agreement(right, probes, reference, max_batch=8) == pytest.approx(1.0)
    assert agreement(Batched(right.spec), probes, reference, max_batch=8) < 0.99
    assert agreement(Batched(right.spec), probes, reference, max_batch=1) == pytest.approx(1.0)


def test_an_engine_that_is_wrong_only_for_a_single_image_is_noticed(tmp_path: Path) -> None:
    right = chosen(tmp_path, engine__order="eager").stage
    probes = probe_images(tiny.SIZE)
    reference = answer(right, probes)

    class Single(Wrong):
        def encode(self, pixels: Any, tokens: bool = False, shared: bool = False) -> Encoded:
            found = right.encode(pixels, tokens)
            return Encoded(-found.features, found.tokens) if len(pixels) == 1 else found

    assert agreement(Single(right.spec), probes, reference, max_batch=8) < 0


def test_an_answer_of_another_shape_does_not_pass(tmp_path: Path) -> None:
    right = chosen(tmp_path, engine__order="eager").stage
    probes = probe_images(tiny.SIZE)
    reference = answer(right, probes)
    short = Reference(reference.features[:, :128], reference.tokens)
    with pytest.raises(EngineError, match="shape"):
        agreement(right, probes, short, max_batch=8)


def test_a_graph_that_onnx_runtime_refuses_makes_it_unavailable_with_its_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("latentd.engines.artefacts.export", lambda vit, spec, path, whole: path.write_bytes(b"no graph" * 9))
    choice = chosen(tmp_path)
    assert choice.stage.name == "eager-cpu"
    assert choice.attempts[1].state == "unavailable"
    assert "INVALID_PROTOBUF" in choice.attempts[1].reason


def test_without_onnxruntime_eager_serves_and_the_reason_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else real(name))
    choice = chosen(tmp_path)
    assert states(choice) == [("onnxruntime", "unavailable"), ("eager", "serving")]
    assert choice.attempts[0].reason == "onnxruntime is not installed"


def test_a_provider_that_falls_back_quietly_is_reported_as_unavailable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA build on a machine without its libraries lists the provider, then serves from the CPU."""
    real = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(
        onnxruntime, "InferenceSession", lambda path, options, providers: real(path, options, providers=["CPUExecutionProvider"])
    )
    choice = chosen(tmp_path)
    assert states(choice)[:2] == [("onnxruntime-cuda", "unavailable"), ("onnxruntime-cpu", "serving")]
    assert "fell back to CPUExecutionProvider" in choice.attempts[0].reason


def test_where_no_engine_can_serve_the_error_gives_every_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("onnxruntime", "torch") else real(name))
    with pytest.raises(EngineError) as failed:
        chosen(tmp_path)
    assert "onnxruntime: onnxruntime is not installed" in failed.value.detail
    assert "eager: torch is not installed" in failed.value.detail


@pytest.mark.parametrize(
    ("flags", "named", "nearest"),
    [
        ({"engine__order": "onxruntime"}, "onxruntime", "Did you mean onnxruntime?"),
        ({"engine__order": "openvino"}, "openvino", "Known: tensorrt, onnxruntime, eager."),
        ({"engine__order": ""}, "no engine", "Known: tensorrt, onnxruntime, eager."),
        ({"engine__providers": "CudaExecutionProvider"}, "CudaExecutionProvider", "Did you mean CUDAExecutionProvider?"),
    ],
)
def test_an_unknown_engine_or_provider_is_a_configuration_error_with_the_nearest(
    tmp_path: Path, flags: Any, named: str, nearest: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        chosen(tmp_path, **flags)
    assert named in refused.value.detail
    assert refused.value.hint == nearest


def test_damaged_weights_stop_the_start_instead_of_being_blamed_on_an_engine(tmp_path: Path) -> None:
    backbone = tiny.backbone(tmp_path)
    content = bytearray(backbone.path.read_bytes())
    content[-1] ^= 1
    backbone.path.write_bytes(content)
    with pytest.raises(CheckpointError, match="changed since it was installed"):
        choose(tiny.settings(tmp_path), backbone)


def test_a_failure_while_serving_is_an_engine_error(tmp_path: Path) -> None:
    for order in ("onnxruntime", "eager"):
        stage = chosen(tmp_path, engine__order=order).stage
        with pytest.raises(EngineError, match=f"{stage.name} failed on 1 images"):
            stage.encode(tiny.pixels(1, size=28))
        stage.close()


def test_the_number_of_threads_reaches_onnx_runtime(tmp_path: Path) -> None:
    stage = chosen(tmp_path, engine__threads=1).stage
    assert isinstance(stage, OnnxStage)
    assert stage._session.get_session_options().intra_op_num_threads == 1


def test_an_image_in_a_lane_gets_the_answer_that_it_gets_alone(tmp_path: Path) -> None:
    stage = chosen(tmp_path, engine__threads=2).stage
    assert stage.lanes == 2
    alone, in_a_lane = (stage.encode(tiny.pixels(1), tokens=True, shared=shared) for shared in (False, True))
    np.testing.assert_allclose(alone.features, in_a_lane.features, atol=1e-5)
    assert chosen(tmp_path, engine__threads=1).stage.lanes == 1


def test_engines_are_named_after_their_devices() -> None:
    assert engine_name("CUDAExecutionProvider") == "onnxruntime-cuda"
    assert engine_name("TensorrtExecutionProvider") == "onnxruntime-tensorrt"


def test_the_real_backbone_passes_the_gate_in_onnx_runtime(backbone: checkpoints.Backbone, cache_dir: Path) -> None:
    settings = config.load(
        {}, {"state.cache_dir": str(cache_dir), "engine.order": "onnxruntime", "engine.providers": "CPUExecutionProvider"}
    )
    choice = choose(settings, backbone)
    assert choice.stage.name == "onnxruntime-cpu"
    assert cosine(choice.attempts[0]) > 0.99999
    assert choice.stage.encode(probe_images(224)[:1]).features.shape == (1, 4 * 384)
