"""TensorRT's entropy calibrator, for versions before 10: shows it images, and keeps what it finds.

Lives in the building process; TensorRT calls it on the thread that builds. Blocks on the GPU and the disk.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, List, Optional

import numpy as np
from numpy.typing import NDArray

from latentd.errors import EngineError
from latentd.files import replacing

log = logging.getLogger(__name__)


def entropy_calibrator(trt: Any, images: NDArray[np.uint8], kept: Path) -> Any:
    """Shows images (n, S, S, 3) one by one. kept: the cache file of this graph and version; damaged ones TensorRT refuses by itself.

    EngineError where there is no device memory, or no such calibrator.
    """
    if not hasattr(trt, "IInt8EntropyCalibrator2"):
        raise EngineError(f"TensorRT {trt.__version__} has no entropy calibrator")
    from latentd.engines.device import CudaMemory

    memory = CudaMemory()
    try:
        buffer = memory.floats(1, 3, *images.shape[1:3])
    except RuntimeError as cause:
        raise EngineError(f"no device memory to calibrate with: {cause}") from cause

    class Calibrator(trt.IInt8EntropyCalibrator2):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IInt8EntropyCalibrator2.__init__(self)  # pybind11 wants it called by this name
            self._next = 0

        def get_batch_size(self) -> int:
            return 1

        def get_batch(self, names: List[str]) -> Optional[List[int]]:
            """The address of the next image for each input; None at the end."""
            if self._next == len(images):
                return None
            memory.upload(images[self._next : self._next + 1], buffer)
            memory.download(buffer, 1)  # waits: TensorRT reads it on a stream of its own
            self._next += 1
            return [int(buffer.data_ptr())]

        def read_calibration_cache(self) -> Optional[bytes]:
            try:
                return kept.read_bytes() or None
            except OSError:
                return None

        def write_calibration_cache(self, cache: Any) -> None:
            try:
                with replacing(kept) as temporary:
                    temporary.write_bytes(bytes(cache))
            except OSError as cause:  # the plan matters more
                log.info("the calibration can't be stored: %s", cause)

    return Calibrator()
