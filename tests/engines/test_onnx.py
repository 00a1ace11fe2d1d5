"""ONNX Runtime sessions on the CPU: what they do to the process around them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from engines.test_export import exported

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
