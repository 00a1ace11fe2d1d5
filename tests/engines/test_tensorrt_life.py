"""A plan's life on every version of TensorRT, on the stand-in: built in a process, cached, run, not used where it does not fit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Dict, List, Tuple

import numpy as np
import pytest

import tiny
from engines.conftest import Bench
from latentd.engines import plans, tensorrt_build
from latentd.engines.choose import Choice
from latentd.engines.plans import NotBuilt, PlanCache
from latentd.engines.tensorrt_build import BuildOrder
from latentd.errors import EngineError
from latentd.files import file_sha256
from standin.building import MAGIC
from standin.strict import VERSIONS
from standin.use import install

WEAKLY_TYPED = ("8.5", "8.6", "10")
NEXT = {"8.5": "8.6", "8.6": "10", "10": "11", "11": "8.5"}


def states(choice: Choice) -> List[Tuple[str, str]]:
    return [(attempt.engine, attempt.state) for attempt in choice.attempts]


def head(path: Path) -> Any:
    return json.loads(path.read_bytes()[len(MAGIC) :].split(b"\n", 1)[0])


def test_a_first_start_serves_without_waiting_and_the_next_one_from_the_plan(
    bench: Bench, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = bench.choose()
    assert first.stage.name == "onnxruntime-cpu"
    assert states(first)[:2] == [("tensorrt-fp16", "waiting"), ("tensorrt-fp32", "waiting")]
    first.pending[0].build(lambda _: None, threading.Event())
    stage, attempt = first.pending[0].attempt()
    assert stage is not None
    assert attempt.state == "serving"
    assert attempt.cosine is not None
    assert attempt.cosine > 0.9999
    monkeypatch.setattr(subprocess, "Popen", None)  # nothing is built any more
    second = bench.choose()
    assert (second.stage.name, second.pending) == ("tensorrt-fp16", ())


def test_with_no_other_engine_in_the_order_the_error_asks_for_one(bench: Bench, trt10: None) -> None:
    with pytest.raises(EngineError, match="no plan is built yet") as refused:
        bench.choose(engine__order="tensorrt")
    assert "behind tensorrt" in refused.value.hint


def test_nothing_of_tensorrt_is_loaded_before_a_plan_was_built(bench: Bench, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STANDIN_FAULT", "no gpu")
    monkeypatch.setenv("STANDIN_MEMORY", "none")
    choice = bench.choose()
    assert choice.attempts[0].reason == "no plan is built yet"
    with pytest.raises(EngineError, match="torch finds no GPU"):
        choice.pending[0].build(lambda _: None, threading.Event())


def test_the_build_says_what_it_does_and_how_far_it_is_where_tensorrt_tells(bench: Bench, version: str) -> None:
    said = bench.build(engine__tensorrt_workspace_bytes=1 << 21, engine__max_batch=3)
    assert {"reading the graph", "building", "storing the plan"} <= {each.phase for each in said}
    ratios = [each.ratio for each in said if each.phase == "Building Engine"]
    assert ratios == ([] if version.startswith("8") else [0.0, 0.25, 0.5, 0.75, 1.0])
    found = head(bench.plan())
    assert found["workspace"] == 1 << 21
    assert found["profile"]["pixels"] == [[1, 3, 24, 24], [1, 3, 24, 24], [3, 3, 24, 24]]


def test_fp16_leaves_norms_and_softmax_in_fp32(built: Bench, version: str) -> None:
    found = head(built.plan())
    assert not found["overflow"]
    assert (found["fp16"], found["pinned"] > 0) == ((True, True) if version in WEAKLY_TYPED else (False, False))
    assert (b"/half" in built.plan().read_bytes()) == (version not in WEAKLY_TYPED)
    assert np.isfinite(built.engine().open().encode(tiny.pixels(2)).features).all()


def test_fp32_is_built_without_any_fp16(bench: Bench, version: str) -> None:
    bench.build("fp32")
    assert not head(bench.plan())["fp16"]
    assert b"/half" not in bench.plan().read_bytes()


@pytest.mark.parametrize("weak", WEAKLY_TYPED)
def test_norms_that_are_not_pinned_would_not_pass_the_gate(bench: Bench, monkeypatch: pytest.MonkeyPatch, weak: str) -> None:
    install(monkeypatch, weak)
    monkeypatch.setattr(tensorrt_build, "stays_fp32", lambda name: "Softmax" in name)
    engine = bench.engine()
    _, key = engine._identified()
    plan = tensorrt_build.build(BuildOrder(key, str(engine._artefacts.graph()), str(bench.cache), fresh=True))
    PlanCache(bench.cache).store(key, plan)
    choice = bench.choose()
    assert states(choice)[0] == ("tensorrt-fp16", "passed over")
    assert "infinite" in choice.attempts[0].reason
    assert [each.name for each in choice.pending] == ["tensorrt-fp32"]


@pytest.mark.parametrize("weak", WEAKLY_TYPED)
def test_where_no_plan_obeys_every_pin_they_become_wishes(bench: Bench, monkeypatch: pytest.MonkeyPatch, weak: str) -> None:
    install(monkeypatch, weak)
    monkeypatch.setenv("STANDIN_FAULT", "can't obey")
    bench.build()
    assert head(bench.plan())["fp16"]
    assert not head(bench.plan())["overflow"]


def test_a_plan_of_another_version_is_not_used_and_another_is_built(built: Bench, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert built.engine().open().name == "tensorrt-fp16"
    install(monkeypatch, NEXT[version])
    with pytest.raises(NotBuilt, match="fits this TensorRT"):
        built.engine().open()
    built.build()
    assert built.engine().open().name == "tensorrt-fp16"
    assert len(list(built.cache.glob("*.plan"))) == 2


@pytest.mark.parametrize("change", ["gpu", "batch", "workspace", "graph", "rules"])
def test_whatever_the_plan_depends_on_makes_another_plan(built10: Bench, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    changes: Dict[str, Dict[str, Any]] = {"batch": {"engine__max_batch": 2}, "workspace": {"engine__tensorrt_workspace_bytes": 1 << 22}}
    flags = changes.get(change, {})
    if change == "gpu":
        monkeypatch.setenv("STANDIN_GPU", "Another sm_87")
    elif change == "rules":
        monkeypatch.setattr(plans.PlanKey.__init__, "__defaults__", (plans.BUILD_RULES + 1,))
    elif change == "graph":
        graph = built10.engine()._artefacts.graph()
        graph.write_bytes(graph.read_bytes() + b"\x7a\x00")  # an empty field more
        graph.with_name(f"{graph.name}.sha256").write_text(f"{file_sha256(graph)}  {graph.name}\n")
    with pytest.raises(NotBuilt):
        built10.engine(**flags).open()
    assert built10.choose(**flags).stage.name == "onnxruntime-cpu"


@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "about gone", "about cut", "about of another"])
def test_a_plan_that_is_not_whole_counts_as_absent(built10: Bench, damage: str) -> None:
    plan, about = built10.plan(), built10.plan().with_suffix(".json")
    whole = plan.read_bytes()
    if damage in ("cut", "changed", "empty"):
        plan.write_bytes({"cut": whole[: len(whole) // 2], "changed": whole[:-1] + b"?", "empty": b""}[damage])
    elif damage == "about of another":
        about.write_text(about.read_text().replace("Imitated", "Another"))
    else:
        about.write_text(about.read_text()[:20]) if damage == "about cut" else about.unlink()
    with pytest.raises(NotBuilt):
        built10.engine().open()


def test_half_a_plan_is_built_again(built: Bench, version: str) -> None:
    whole = built.plan().read_bytes()
    built.plan().write_bytes(whole[: len(whole) // 2])
    choice = built.choose()
    assert (choice.stage.name, states(choice)[0]) == ("onnxruntime-cpu", ("tensorrt-fp16", "waiting"))
    built.build()
    assert built.choose().stage.name == "tensorrt-fp16"


def test_a_foreign_plan_under_the_right_name_is_refused_removed_and_built_again(built: Bench, version: str) -> None:
    _, key = built.engine()._identified()
    PlanCache(built.cache).store(key, built.plan().read_bytes().replace(VERSIONS[version].encode(), b"9.9.9"))
    with pytest.raises(NotBuilt, match="Version tag does not match"):
        built.engine().open()
    assert not list(built.cache.glob("*.plan"))
    built.build()
    assert built.engine().open().name == "tensorrt-fp16"
    assert not list(built.cache.glob("*.tries.json"))


def test_the_building_process_needs_no_torch(trt10: None) -> None:
    script = "import sys, latentd.engines.tensorrt_build; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", script], env=os.environ, check=False).returncode == 0


def test_measured_timings_are_kept_and_used_and_those_of_another_gpu_are_not(built: Bench, version: str) -> None:
    assert head(built.plan())["timings"] == ""
    (timings,) = built.cache.glob("timing-*.cache")
    assert timings.read_bytes() == f"{VERSIONS[version]} Imitated sm_72 measured".encode()
    built.build("fp32")
    assert head(next(built.cache.glob("fp32*.plan")))["timings"] == timings.read_text()
    timings.write_bytes(b"of another GPU")
    built.build("fp32", engine__max_batch=2)
    assert sum(head(path)["timings"] == "" for path in built.cache.glob("*.plan")) == 2


def test_only_the_newest_plans_are_kept(tmp_path: Path) -> None:
    cache = PlanCache(tmp_path / "tensorrt")
    keys = [plans.PlanKey("0" * 64, "8.5.2", "GPU", "fp16", 24, batch, 1) for batch in range(1, 9)]
    for age, key in enumerate(keys):
        cache.store(key, b"plan")
        os.utime(cache._path(key, ".plan"), (age, age))
    assert [cache.load(key) for key in keys] == [None] * 2 + [b"plan"] * 6
