"""INT8 on ONNX Runtime: measured, chosen, gated, cached; and why it does not serve where it does not."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any, Dict, List

import numpy as np
import pytest

import tiny
from engines.conftest import Bench
from latentd.engines import artefacts, int8, quantize_cpu
from latentd.engines.choose import Attempt
from latentd.engines.int8 import Timings
from latentd.engines.quantize import QUANTIZER_VERSION
from latentd.errors import EngineError

FAST = {"float": 3.0, "dynamic": 1.0, "static": 2.0, "scored": 2.5}
INT8 = {"engine__precision": "int8", "engine__order": "onnxruntime", "engine__int8_min_cosine": 0.9}


@pytest.fixture
def speeds(monkeypatch: pytest.MonkeyPatch) -> Dict[str, float]:
    """Seconds that each stage is found to take; every measurement is counted under "measured"."""
    found = {**FAST, "measured": 0}

    def interleaved(stages: List[Any], pixels: Any, rounds: int) -> List[List[float]]:
        found["measured"] += 1
        return [[found[stage.name.rsplit("-", 1)[1] if "int8" in stage.name else "float"]] * rounds for stage in stages]

    monkeypatch.setattr(int8, "interleaved", interleaved)
    return found


def attempt(bench: Bench, **flags: Any) -> Attempt:
    (found,) = (each for each in bench.choose(**{**INT8, **flags}).attempts if each.engine == "onnxruntime-cpu-int8")
    return found


def test_it_serves_where_it_is_asked_for_and_only_there(bench: Bench, speeds: Dict[str, float]) -> None:
    assert bench.choose(engine__order="onnxruntime").stage.name == "onnxruntime-cpu"
    assert speeds["measured"] == 0
    choice = bench.choose(**INT8)
    assert choice.stage.name == "onnxruntime-cpu-int8-dynamic"
    assert [(each.engine, each.state) for each in choice.attempts if "cpu" in each.engine] == [
        ("onnxruntime-cpu-int8", "serving"),
        ("onnxruntime-cpu", "not tried"),
    ]


def test_the_spelling_that_is_faster_on_this_machine_serves(bench: Bench, speeds: Dict[str, float]) -> None:
    speeds.update(static=0.5)
    assert bench.choose(**INT8).stage.name == "onnxruntime-cpu-int8-static"


def test_a_measurement_from_before_a_spelling_was_there_is_made_again(bench: Bench, speeds: Dict[str, float]) -> None:
    bench.choose(**INT8)
    (note,) = (bench.folder / "cache" / "onnx").glob("*.json")
    kept = json.loads(note.read_text())
    del kept["seconds"]["scored"]
    note.write_text(json.dumps(kept))
    speeds.update(scored=0.5)
    assert bench.choose(**INT8).stage.name == "onnxruntime-cpu-int8-scored"


def test_what_was_measured_is_not_measured_again(bench: Bench, speeds: Dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    bench.choose(**INT8)
    bench.choose(**INT8)
    assert speeds["measured"] == 1
    bench.choose(**INT8, engine__threads=1)
    assert speeds["measured"] == 2
    monkeypatch.setattr(int8, "_processor", lambda: "another")
    bench.choose(**INT8, engine__threads=1)
    assert speeds["measured"] == 3


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"machine": 1, "seconds": {}}'])
def test_a_damaged_measurement_is_made_again(bench: Bench, speeds: Dict[str, float], damage: str) -> None:
    bench.choose(**INT8)
    (note,) = (bench.folder / "cache" / "onnx").glob("*.json")
    note.write_text(damage)
    assert bench.choose(**INT8).stage.name == "onnxruntime-cpu-int8-dynamic"
    assert speeds["measured"] == 2
    assert json.loads(note.read_text())["seconds"] == FAST


def test_one_that_turns_the_features_too_far_is_refused_with_both_numbers(bench: Bench, speeds: Dict[str, float]) -> None:
    found = attempt(bench, engine__int8_min_cosine=1.0)
    assert found.state == "unavailable"
    for spelling in ("dynamic", "static", "scored"):
        assert f"{spelling}: cosine with eager PyTorch 0.9" in found.reason
    assert "below 1 (engine.int8_min_cosine)" in found.reason
    assert bench.choose(**{**INT8, "engine__int8_min_cosine": 1.0}).stage.name == "onnxruntime-cpu"


def test_the_slower_spelling_serves_where_the_faster_one_is_not_exact_enough(
    bench: Bench, speeds: Dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    def bad(graph: bytes, taps: Any, tokens: bool) -> bytes:
        narrow = {layer: tap._replace(lows=tap.lows / 50, highs=tap.highs / 50) for layer, tap in taps.items()}
        return quantize_cpu.static(graph, narrow, tokens)

    monkeypatch.setattr(int8, "SPELLINGS", {"dynamic": bad, "static": quantize_cpu.static})
    assert bench.choose(**INT8).stage.name == "onnxruntime-cpu-int8-static"


def test_one_that_is_hardly_faster_than_float_is_refused(bench: Bench, speeds: Dict[str, float]) -> None:
    speeds.update(dynamic=2.9, static=3.5, scored=3.0)
    found = attempt(bench)
    assert found.reason == (
        "dynamic: 1.03 times as fast as float on this machine, 1.1 are needed; "
        "static: 0.86 times as fast as float on this machine, 1.1 are needed; "
        "scored: 1.00 times as fast as float on this machine, 1.1 are needed"
    )


def test_a_spelling_that_this_onnx_runtime_does_not_take_leaves_the_others(
    bench: Bench, speeds: Dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8, "SPELLINGS", {**int8.SPELLINGS, "scored": lambda graph, taps, tokens: b"no graph"})
    speeds.update(static=0.5)
    assert bench.choose(**INT8).stage.name == "onnxruntime-cpu-int8-static"
    assert not list((bench.folder / "cache" / "onnx").glob("*.json"))  # it is asked again at the next start
    reason = attempt(bench, engine__int8_min_cosine=1.0).reason
    assert reason.startswith("scored: it can't be opened: see the log; static: cosine")


def test_the_fastest_comes_first_and_what_is_not_worth_it_does_not_come() -> None:
    assert Timings({"float": 3.0, "dynamic": 2.0, "static": 1.0, "scored": 1.5}).fastest_first() == ["static", "scored", "dynamic"]
    assert Timings({"float": 3.0, "dynamic": 2.9, "static": 1.0, "scored": 2.9}).fastest_first() == ["static"]


@pytest.mark.parametrize("damage", ["cut", "no checksum"])
def test_a_half_written_graph_is_made_again(bench: Bench, speeds: Dict[str, float], damage: str) -> None:
    bench.choose(**INT8)
    (graph,) = (bench.folder / "cache" / "onnx").glob("*int8-dynamic*.onnx")
    whole = graph.read_bytes()
    if damage == "cut":
        graph.write_bytes(whole[: len(whole) // 2])
    else:
        graph.with_name(f"{graph.name}.sha256").unlink()
    assert bench.choose(**INT8).stage.name == "onnxruntime-cpu-int8-dynamic"
    assert graph.read_bytes() == whole


def test_a_full_disk_leaves_the_float_stage_serving_and_says_so(
    bench: Bench, speeds: Dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(artefacts, "_fill", full)
    found = attempt(bench)
    assert found.state == "unavailable"
    assert "No space left on device" in found.reason
    assert bench.choose(**INT8).stage.name == "onnxruntime-cpu"


def test_timings_that_cannot_be_kept_are_used_all_the_same(bench: Bench, speeds: Dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(int8, "replacing", full)
    assert bench.choose(**INT8).stage.name == "onnxruntime-cpu-int8-dynamic"


@pytest.mark.parametrize("fastest", ["dynamic", "static", "scored"])
def test_what_an_image_is_encoded_as_does_not_depend_on_its_neighbours(bench: Bench, speeds: Dict[str, float], fastest: str) -> None:
    speeds.update({fastest: 0.5})
    stage = bench.choose(**INT8).stage
    pixels = tiny.pixels(3)
    pixels[1] //= 8  # another range than its neighbours'
    together = stage.encode(pixels, tokens=True)
    for index in range(3):
        alone = stage.encode(pixels[index : index + 1], tokens=True)
        np.testing.assert_allclose(together.features[index], alone.features[0], atol=1e-4)
        assert together.tokens is not None
        assert alone.tokens is not None
        np.testing.assert_allclose(together.tokens[index], alone.tokens[0], atol=1e-4)


@pytest.mark.parametrize("split", [0, 2])
def test_tokens_of_the_last_block_come_from_a_second_graph_that_is_made_when_they_are_asked_for(
    bench: Bench, speeds: Dict[str, float], split: int
) -> None:
    def graphs() -> List[str]:
        return sorted(path.name.split(".")[1] for path in (bench.folder / "cache" / "onnx").glob("*int8-dynamic*.onnx"))

    stage = bench.choose(**INT8, backbone__split=split).stage
    before = stage.encode(tiny.pixels(2))
    first = f"int8-dynamic-{QUANTIZER_VERSION}"
    assert graphs() == [first]
    answer = stage.encode(tiny.pixels(2), tokens=True)
    assert graphs() == ([first] if split else [first, f"int8-dynamic-tokens-{QUANTIZER_VERSION}"])
    assert answer.tokens is not None
    assert answer.tokens.shape == (2, stage.spec.tokens, stage.spec.width)
    np.testing.assert_allclose(answer.features, before.features, atol=0.2)
    stage.close()


def test_its_lanes_are_those_of_the_float_stage(bench: Bench, speeds: Dict[str, float]) -> None:
    stage = bench.choose(**INT8, engine__threads=2).stage
    assert stage.lanes == 2
    pixels = tiny.pixels(2)
    np.testing.assert_allclose(stage.encode(pixels, shared=True).features, stage.encode(pixels).features, atol=1e-4)


def test_patch_tokens_count_only_where_they_are_learned_from(bench: Bench, speeds: Dict[str, float]) -> None:
    def least(**flags: Any) -> float:
        cosine = attempt(bench, **flags).cosine
        assert cosine is not None
        return cosine

    assert least(backbone__split=3) < least()


def test_without_onnxruntime_calibrating_is_an_engine_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(EngineError, match="needs the onnxruntime package"):
        int8._session(b"")


def test_a_graph_that_onnx_runtime_does_not_take_is_an_engine_error() -> None:
    with pytest.raises(EngineError, match="does not take the graph"):
        int8._session(b"no graph")


def test_turns_are_interleaved_and_the_first_round_does_not_count() -> None:
    calls: List[str] = []

    class Stage:
        def __init__(self, name: str) -> None:
            self.name = name

        def encode(self, pixels: Any) -> None:
            calls.append(self.name)

    stages: Any = [Stage("a"), Stage("b")]
    seconds = int8.interleaved(stages, tiny.pixels(1), 2)
    assert calls == ["a", "b"] * 3
    assert [len(each) for each in seconds] == [2, 2]
