"""Where an image lies on the device while TensorRT's calibrator looks at it. Lives in the building process; blocks on the GPU."""

from __future__ import annotations

import ctypes
import logging
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from latentd.engines.stage import planar
from latentd.errors import EngineError

log = logging.getLogger(__name__)

_CUDART = ("libcudart.so.11.0", "libcudart.so.12", "libcudart.so")  # of 11.4, which 8.5 is for; of those that 8.6 and 9 are for
_TO_DEVICE = 1  # cudaMemcpyHostToDevice


class Staging(Protocol):
    """Device memory for one image at a time."""

    def show(self, pixels: NDArray[np.uint8]) -> int:
        """Puts one image (1, S, S, 3) there as float32 (1, 3, S, S) and waits for it; its address. RuntimeError where that fails."""
        ...


class CudartStaging:
    """Of the CUDA runtime's own: torch would load all its kernels into the memory that the builder needs, a gigabyte of a board's.

    OSError where there is no CUDA runtime, RuntimeError where it gives no memory.
    """

    def __init__(self, side: int) -> None:
        self._cuda = _cudart()
        address = ctypes.c_void_p()
        self._check(self._cuda.cudaMalloc(ctypes.byref(address), ctypes.c_size_t(4 * 3 * side * side)))
        self._address = address

    def show(self, pixels: NDArray[np.uint8]) -> int:
        floats = planar(pixels)
        size = ctypes.c_size_t(floats.nbytes)
        self._check(self._cuda.cudaMemcpy(self._address, ctypes.c_void_p(floats.ctypes.data), size, ctypes.c_int(_TO_DEVICE)))
        self._check(self._cuda.cudaDeviceSynchronize())  # TensorRT reads it on a stream of its own
        return int(self._address.value or 0)

    def _check(self, status: int) -> None:
        if status:
            self._cuda.cudaGetErrorString.restype = ctypes.c_char_p
            raise RuntimeError(f"CUDA error {status}: {self._cuda.cudaGetErrorString(status).decode('ascii', 'replace')}")


class TorchStaging:
    """Of torch's, where the CUDA runtime lies in torch's own folders. EngineError where torch can use no GPU."""

    def __init__(self, side: int) -> None:
        from latentd.engines.device import CudaMemory

        self._memory = CudaMemory()
        self._buffer = self._memory.floats(1, 3, side, side)

    def show(self, pixels: NDArray[np.uint8]) -> int:
        self._memory.upload(pixels, self._buffer)
        self._memory.download(self._buffer, 1)  # waits: TensorRT reads it on a stream of its own
        return int(self._buffer.data_ptr())


def make_staging(side: int) -> Staging:
    """EngineError where there is no device memory."""
    try:
        return CudartStaging(side)
    except (OSError, RuntimeError, AttributeError) as cause:  # AttributeError: the library is something else
        log.info("calibrating with torch: %s", cause)
    try:
        return TorchStaging(side)
    except RuntimeError as cause:
        raise EngineError(f"no device memory to calibrate with: {cause}") from cause


def _cudart() -> Any:
    for name in _CUDART:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise OSError(f"none of {', '.join(_CUDART)} is where libraries are looked for")
