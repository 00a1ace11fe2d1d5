"""latentd with a frozen stage that hangs for as long as a file is there. Only these tests' containers have this file."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from latentd.cli.app import main
from latentd.engines.eager import EagerStage
from latentd.engines.onnx import OnnxStage

HOLD = Path("/run/hold-the-engine")


def holding(encode: Any) -> Any:
    def held(*arguments: Any, **more: Any) -> Any:
        while HOLD.exists():
            time.sleep(0.05)
        return encode(*arguments, **more)

    return held


for kind in (EagerStage, OnnxStage):
    kind.encode = holding(kind.encode)  # type: ignore[method-assign]
main()
