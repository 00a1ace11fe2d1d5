"""TensorRT's entropy calibrator, for versions before 10: shows it images, and keeps what it finds for as long as the build lasts.

Lives in the building process; TensorRT calls it on the thread that builds. Blocks on the GPU.
"""

from __future__ import annotations

import logging
from typing import Any, List, Optional

import numpy as np
from numpy.typing import NDArray

from latentd.engines.staging import make_staging
from latentd.errors import EngineError

log = logging.getLogger(__name__)


def entropy_calibrator(trt: Any, images: NDArray[np.uint8]) -> Any:
    """Shows images (n, S, S, 3) one by one. What TensorRT finds is good for this graph and these images alone, so no file keeps it: a
    second try of the same build takes it from memory.

    EngineError where there is no device memory, or no such calibrator.
    """
    if not hasattr(trt, "IInt8EntropyCalibrator2"):
        raise EngineError(f"TensorRT {trt.__version__} has no entropy calibrator")
    staging = make_staging(images.shape[1])

    class Calibrator(trt.IInt8EntropyCalibrator2):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IInt8EntropyCalibrator2.__init__(self)  # pybind11 wants it called by this name
            self._next = 0
            self._found: Optional[bytes] = None

        def get_batch_size(self) -> int:
            return 1

        def get_batch(self, names: List[str]) -> Optional[List[int]]:
            """The address of the next image for each input; None at the end. Must not raise: that would end the process."""
            if self._next == len(images):
                self._next = 0
                return None
            try:
                address = staging.show(images[self._next : self._next + 1])
            except RuntimeError as cause:
                log.info("an image to calibrate on does not reach the GPU: %s", cause)
                return None
            self._next += 1
            return [address]

        def read_calibration_cache(self) -> Optional[bytes]:
            return self._found

        def write_calibration_cache(self, cache: Any) -> None:
            self._found = bytes(cache)

    return Calibrator()
