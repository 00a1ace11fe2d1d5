"""`import tensorrt` for the processes that a test starts, where this folder's parent is on the path: the version in STANDIN_TENSORRT."""

from __future__ import annotations

import os
import sys
from typing import Any

from latentd.engines import device
from standin.module import make


def _host_memory() -> Any:
    from standin.host import HostMemory

    return HostMemory()


sys.modules[__name__] = make(os.environ["STANDIN_TENSORRT"])
device.CudaMemory = _host_memory  # type: ignore[assignment,misc]  # for a calibrator: the process has no GPU
