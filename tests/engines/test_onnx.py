"""ONNX Runtime sessions on the CPU: what they do to the process around them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, List

import onnxruntime
import pytest

from engines.test_export import exported, spec_of
from latentd.engines import onnx
from latentd.engines.onnx import CPU, OnnxStage
from tiny import DINOV2

OPENS_ONE = """
import sys
from pathlib import Path
import numpy as np
from latentd.engines.onnx import CPU, OnnxStage
from latentd.engines.stage import StageSpec
spec = StageSpec("tiny", "f" * 64, image_size=24, split=2, class_tokens=2, width=128, tokens=37)
stage = OnnxStage(spec, Path(sys.argv[1]), CPU, threads=2)
stage.encode(np.zeros((1, 24, 24, 3), np.uint8))
print(float(np.float32(1e-40) * np.float32(1.0)) > 0)
"""


def test_the_first_session_of_a_process_leaves_its_caller_the_numbers_near_zero(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", OPENS_ONE, str(exported(tmp_path))], stdout=subprocess.PIPE, text=True, check=True, timeout=60
    )
    assert ran.stdout.strip() == "True"


@pytest.mark.parametrize(
    ("affinity", "siblings", "threads"),
    [
        ({0, 1, 2, 3}, {0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"}, 2),  # two cores of two hyperthreads
        ({2, 3}, {2: "2", 3: "3"}, 2),
        ({5}, {5: "4-5"}, 1),
    ],
)
def test_an_image_alone_gets_a_thread_for_each_core_that_this_process_may_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, affinity: Any, siblings: Any, threads: int
) -> None:
    monkeypatch.setattr(onnx, "_affinity", lambda: affinity)
    monkeypatch.setattr(onnx, "_siblings", siblings.__getitem__)
    opened: List[int] = []

    def session(path: str, options: Any, providers: Any) -> Any:
        opened.append(options.intra_op_num_threads)
        return real(path, options, providers=providers)

    real = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    stage = OnnxStage(spec_of(DINOV2), exported(tmp_path), CPU)
    assert opened == ([threads, 1] if len(affinity) > 1 else [threads])
    assert stage.lanes == len(affinity)


def test_no_thread_of_a_session_is_tied_to_a_core(tmp_path: Path) -> None:
    tasks = Path("/proc/self/task")
    before = set(tasks.iterdir())
    stage = OnnxStage(spec_of(DINOV2), exported(tmp_path), CPU)
    for thread in set(tasks.iterdir()) - before:
        assert os.sched_getaffinity(int(thread.name)) == os.sched_getaffinity(0)
    stage.close()


def test_where_the_kernel_tells_no_siblings_every_processor_is_a_core() -> None:
    assert onnx._siblings(100_000) == "100000"
