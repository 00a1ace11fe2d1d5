"""Builds and first runs that end badly: each ends with a reason, none for ever, and none is held against the plan without cause."""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from engines.conftest import Bench
from latentd.engines import plans, tensorrt_build
from latentd.engines.compiling import Progress, Stopped
from latentd.engines.plans import PlanCache
from latentd.engines.tensorrt_build import BuildOrder
from latentd.errors import EngineError
from standin.building import MAGIC
from standin.use import install

FAULTS = {
    "parse": "can't read the graph",
    "build none": "no implementation of a node fits",
    "no gpu": r"TensorRT 10.3.0 can't use the GPU: .*CUDA initialization failure with error: 999",
    "no network": "makes no network",
    "no config": "makes no configuration",
    "no profile": "no profile of 1 to 8 images",
    "crash": "killed by signal 11",
}


def tries(bench: Bench) -> plans.Tries:
    return PlanCache(bench.cache).tries(bench.engine()._identified()[1])


@pytest.mark.parametrize("fault", FAULTS)
def test_a_build_that_fails_says_why_and_three_of_them_are_enough(
    bench: Bench, trt10: None, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    _, key = bench.engine()._identified()
    for _ in range(plans.TRIES - 1):
        PlanCache(bench.cache).begin(key, "failed before")
    monkeypatch.setenv("STANDIN_FAULT", fault)
    with pytest.raises(EngineError, match=FAULTS[fault]):
        bench.build()
    monkeypatch.setattr(subprocess, "Popen", None)  # no process is started any more
    with pytest.raises(EngineError, match=f"given up after 3 tries.*{FAULTS[fault]}") as refused:
        bench.build()
    (record,) = bench.cache.glob("*.tries.json")
    assert refused.value.detail.endswith(f"to let it try again delete {record}")


def test_every_version_says_no_by_none(bench: Bench, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STANDIN_FAULT", "build none")
    with pytest.raises(EngineError, match=r"builds no plan: .*no implementation of a node fits"):
        bench.build()
    assert tries(bench).bad == 1


def test_what_was_given_up_is_tried_again_when_the_configuration_changes(bench: Bench, trt10: None) -> None:
    _, key = bench.engine()._identified()
    for _ in range(plans.TRIES):
        PlanCache(bench.cache).begin(key, "failed before")
    with pytest.raises(EngineError, match="given up"):
        bench.build()
    bench.build(engine__max_batch=4)
    assert bench.engine(engine__max_batch=4).open().name == "tensorrt-fp16"


def test_a_graph_with_an_operator_that_8_5_does_not_know_is_refused_by_name(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "8.5")
    monkeypatch.setattr("standin.parsing.operators", lambda table: frozenset({"Add", "MatMul"}))
    engine = bench.engine()
    order = BuildOrder(engine._identified()[1], str(engine._artefacts.graph()), str(bench.cache), fresh=True)
    with pytest.raises(EngineError, match=r"TensorRT 8.5.2.2 can't read the graph: .*no importer for Softmax"):
        tensorrt_build.build(order)


@pytest.mark.parametrize("weak", ["8.5", "10"])
def test_a_gpu_without_fast_fp16_leaves_it_to_fp32(bench: Bench, monkeypatch: pytest.MonkeyPatch, weak: str) -> None:
    install(monkeypatch, weak)
    monkeypatch.setenv("STANDIN_FAULT", "slow fp16")
    with pytest.raises(EngineError, match="no fast FP16"):
        bench.build()
    bench.build("fp32")
    assert bench.engine("fp32").open().name == "tensorrt-fp32"


def test_a_power_cut_in_the_build_is_counted_and_the_next_start_builds(bench: Bench, trt10: None) -> None:
    """What it leaves: the mark of a try that was begun, and half a file under a temporary name."""
    _, key = bench.engine()._identified()
    cache = PlanCache(bench.cache)
    cache.begin(key, "the build was cut off")
    (bench.cache / f".{key.stem}.plan.1234.tmp").write_bytes(MAGIC)
    assert bench.choose().stage.name == "onnxruntime-cpu"
    bench.build()
    assert bench.engine().open().name == "tensorrt-fp16"
    assert cache.tries(key).bad == 0


def test_a_board_that_loses_power_in_every_build_stops_trying(bench: Bench, trt10: None) -> None:
    _, key = bench.engine()._identified()
    for _ in range(plans.TRIES):
        PlanCache(bench.cache).begin(key, "the build was cut off")
    with pytest.raises(EngineError, match="given up after 3 tries, the last: the build was cut off"):
        bench.build()


def test_a_plan_whose_first_run_takes_the_daemon_along_is_left_alone_in_the_end(built10: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as deadly:
        deadly.setattr("latentd.engines.compiling.TensorRtStage", die)
        for _ in range(plans.TRIES):
            with pytest.raises(KeyboardInterrupt):
                built10.engine().open()
    with pytest.raises(EngineError, match="given up after 3 tries, the last: its first run ended latentd"):
        built10.engine().open()
    assert built10.choose().stage.name == "onnxruntime-cpu"


def test_a_disk_that_is_full_says_so_and_is_not_held_against_the_plan(bench: Bench, trt10: None) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # the child inherits it: its write fails half way
    try:
        with pytest.raises(EngineError, match=r"can't be stored in .*tensorrt: File too large"):
            bench.build()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in bench.cache.iterdir() if not path.name.startswith("timing")] == []
    bench.build()
    assert bench.engine().open().name == "tensorrt-fp16"


def test_where_there_is_no_room_nothing_is_built(bench: Bench, trt10: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 95, 5))
    monkeypatch.setattr(subprocess, "Popen", None)
    with pytest.raises(EngineError, match="0 MiB free, building a plan needs"):
        bench.build()


def test_a_cache_that_can_not_be_written_ends_with_a_reason(bench: Bench, trt10: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(PlanCache, "begin", refuse)
    with pytest.raises(EngineError, match="can't be written: Permission denied"):
        bench.build()


def test_a_plan_runs_from_a_cache_that_can_not_be_written(built10: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(plans, "_write_json", refuse)
    assert built10.choose().stage.name == "tensorrt-fp16"


def test_a_cache_that_can_not_hold_a_folder_is_a_reason(bench: Bench, trt10: None) -> None:
    bench.engine()._identified()
    bench.cache.write_text("no folder")
    with pytest.raises(EngineError, match=r"tensorrt can't be made: File exists"):
        bench.build()


def test_a_graph_that_can_not_be_read_is_not_taken_for_a_full_disk(bench: Bench, trt10: None, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = bench.folder / "gone.onnx"
    monkeypatch.setattr("latentd.engines.compiling.file_sha256", lambda path: "0" * 64)
    monkeypatch.setattr("latentd.engines.compiling.PlanEngine._require_room", lambda self, graph: None)
    monkeypatch.setattr("latentd.engines.compiling.PlanEngine._graph", lambda self: gone)
    bench.cache.mkdir()
    with pytest.raises(EngineError, match=f"what the build needs can't be read: .*{gone}"):
        bench.build()


def test_a_process_that_dies_has_left_tensorrts_last_words(bench: Bench, trt10: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STANDIN_FAULT", "crash with a word")
    with pytest.raises(EngineError, match=r"killed by signal 11: .*TensorRT: 2: \[defaultAllocator.cpp"):
        bench.build()


def test_the_building_process_is_the_first_to_go_where_memory_runs_out(bench: Bench, trt10: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STANDIN_FAULT", "hang")
    stopping, scores = threading.Event(), []

    def look(progress: Progress) -> None:
        if progress.phase == "building":
            children = [Path("/proc") / each for each in Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text().split()]
            (builder,) = (each for each in children if b"latentd.engines.tensorrt_build" in (each / "cmdline").read_bytes())
            scores.append(int((builder / "oom_score_adj").read_text()))
            stopping.set()

    with pytest.raises(Stopped):
        bench.engine().build(look, stopping)
    assert scores == [800]


def test_memory_that_runs_out_while_a_plan_is_loaded_is_not_held_against_it(built10: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STANDIN_FAULT", "no memory to load")
    with pytest.raises(EngineError, match=r"does not load the plan: .*out of memory"):
        built10.engine().open()
    assert tries(built10).bad == 0
    monkeypatch.delenv("STANDIN_FAULT")
    assert built10.engine().open().name == "tensorrt-fp16"


def test_a_plan_that_loses_the_context_is_left_alone_in_the_end(built10: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STANDIN_FAULT", "execute")
    for _ in range(plans.TRIES):
        with pytest.raises(EngineError, match="illegal memory access"):
            built10.engine().open()
    monkeypatch.delenv("STANDIN_FAULT")
    with pytest.raises(EngineError, match=r"given up after 3 tries, the last: .*illegal memory access"):
        built10.engine().open()


def test_a_full_batch_is_run_while_it_still_counts(built10: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []

    def encode(self: Any, pixels: Any, tokens: bool = False, shared: bool = False) -> None:
        counts.append((len(pixels), tries(built10).bad))

    monkeypatch.setattr("latentd.engines.tensorrt.TensorRtStage.encode", encode)
    built10.engine().open()
    assert counts == [(1, 1), (8, 1)]


def test_timings_that_tensorrt_refuses_are_measured_again(built10: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STANDIN_FAULT", "timings refused")
    built10.build("fp32")
    assert b'"timings": ""' in next(built10.cache.glob("fp32*.plan")).read_bytes()


def test_a_build_that_is_told_to_stop_ends_at_once_and_does_not_count(bench: Bench, trt10: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STANDIN_FAULT", "hang")
    stopping = threading.Event()

    def stop(progress: Progress) -> None:
        if progress.phase == "building":
            stopping.set()

    with pytest.raises(Stopped):
        bench.engine().build(stop, stopping)
    assert tries(bench).bad == 0


def test_a_build_that_takes_too_long_is_killed_and_counted(bench: Bench, trt10: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STANDIN_FAULT", "hang")
    with pytest.raises(EngineError, match=r"not built within 0.1 s"):
        bench.build(engine__build_timeout_s=0.1)
    assert tries(bench).bad == 1


def test_the_building_process_ends_with_its_parent(bench: Bench, trt10: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STANDIN_FAULT", "hang")
    engine = bench.engine()
    order = BuildOrder(engine._identified()[1], str(engine._artefacts.graph()), str(bench.cache), fresh=True)
    child = subprocess.Popen(
        [sys.executable, "-m", "latentd.engines.tensorrt_build", order.to_json()], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdin is not None
    assert child.stdout is not None
    assert b"phase" in child.stdout.readline()
    child.stdin.close()  # what the kernel does when the parent dies
    assert child.wait(60) == tensorrt_build.ORPHANED
    child.stdout.close()


def test_after_a_build_that_failed_the_timings_are_not_trusted(built10: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STANDIN_FAULT", "crash")
    with pytest.raises(EngineError, match="signal 11"):
        built10.build("fp32")
    monkeypatch.delenv("STANDIN_FAULT")
    built10.build("fp32")
    plan = next(built10.cache.glob("fp32*.plan")).read_bytes()
    assert b'"timings": ""' in plan


def test_a_process_that_can_not_be_started_is_a_reason(bench: Bench, trt10: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    with pytest.raises(EngineError, match="can't be started: Cannot allocate memory"):
        bench.build()
    assert tries(bench).bad == 0


def test_a_tensorrt_that_can_not_be_loaded_is_a_reason(bench: Bench, trt10: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(EngineError, match="tensorrt can't be loaded"):
        bench.build()
