"""Images on their way to TensorRT's calibrator: through the CUDA runtime, which an imitation of it shows, or else through torch."""

from __future__ import annotations

import ctypes
from typing import Any, List

import numpy as np
import pytest

import tiny
from latentd.engines import staging
from latentd.engines.calibrating import entropy_calibrator
from latentd.engines.stage import planar
from latentd.engines.staging import CudartStaging, TorchStaging, make_staging
from latentd.errors import EngineError
from standin.host import HostMemory
from standin.module import make

SIZE = 4 * 3 * tiny.SIZE * tiny.SIZE


class Word:
    """cudaGetErrorString, whose result type is set."""

    def __call__(self, status: int) -> bytes:
        return {2: b"out of memory", 35: b"CUDA driver version is insufficient for CUDA runtime version"}[status]


class Cudart:
    """The five functions, over the memory of this process. failing: the one that fails, with this status."""

    def __init__(self, failing: str = "", status: int = 2) -> None:
        self.calls: List[str] = []
        self._failing, self._status = failing, status
        self._memory = np.zeros(SIZE + 256, np.uint8)
        self.cudaGetErrorString = Word()

    def _done(self, name: str) -> int:
        self.calls.append(name)
        return self._status if name == self._failing else 0

    def cudaMalloc(self, address: Any, size: ctypes.c_size_t) -> int:  # noqa: N802
        assert size.value == SIZE
        start = self._memory.ctypes.data
        address._obj.value = start + -start % 256
        return self._done("cudaMalloc")

    def cudaMemcpy(self, target: ctypes.c_void_p, source: ctypes.c_void_p, size: ctypes.c_size_t, kind: ctypes.c_int) -> int:  # noqa: N802
        assert (size.value, kind.value) == (SIZE, 1)
        status = self._done("cudaMemcpy")
        if not status:
            ctypes.memmove(target, source, size.value)
        return status

    def cudaDeviceSynchronize(self) -> int:  # noqa: N802
        return self._done("cudaDeviceSynchronize")


def install(monkeypatch: pytest.MonkeyPatch, cudart: Cudart) -> Cudart:
    monkeypatch.setattr(staging, "_cudart", lambda: cudart)
    return cudart


def test_an_image_lies_at_the_address_when_the_call_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    cudart = install(monkeypatch, Cudart())
    found = make_staging(tiny.SIZE)
    assert isinstance(found, CudartStaging)
    for pixels in tiny.pixels(2)[:, None]:
        address = found.show(pixels)
        assert address % 256 == 0
        assert ctypes.string_at(address, SIZE) == planar(pixels).tobytes()
    assert cudart.calls == ["cudaMalloc", "cudaMemcpy", "cudaDeviceSynchronize", "cudaMemcpy", "cudaDeviceSynchronize"]


@pytest.mark.parametrize("failing", ["cudaMemcpy", "cudaDeviceSynchronize"])
def test_an_image_that_does_not_get_there_is_an_error_in_cudas_words(monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    install(monkeypatch, Cudart(failing))
    with pytest.raises(RuntimeError, match="CUDA error 2: out of memory"):
        make_staging(tiny.SIZE).show(tiny.pixels(1))


def test_without_a_cuda_runtime_torch_has_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "_CUDART", ("libcudart.so.0.none",))
    monkeypatch.setattr("latentd.engines.device.CudaMemory", HostMemory)
    found = make_staging(tiny.SIZE)
    assert isinstance(found, TorchStaging)
    assert ctypes.string_at(found.show(tiny.pixels(1)), SIZE) == planar(tiny.pixels(1)).tobytes()


def test_where_neither_has_memory_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Cudart("cudaMalloc", 35))
    monkeypatch.setattr("latentd.engines.device.CudaMemory", HostMemory)
    monkeypatch.setenv("STANDIN_MEMORY", "none")
    with pytest.raises(EngineError, match="torch finds no GPU"):
        make_staging(tiny.SIZE)

    def full(self: Any, *shape: int) -> None:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.delenv("STANDIN_MEMORY")
    monkeypatch.setattr(HostMemory, "floats", full)
    with pytest.raises(EngineError, match="no device memory to calibrate with: CUDA out of memory"):
        make_staging(tiny.SIZE)


def test_an_image_that_fails_ends_the_calibration_and_not_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Cudart("cudaMemcpy"))
    calibrator = entropy_calibrator(make("8.5"), tiny.pixels(2))
    assert calibrator.get_batch(["pixels"]) is None


def test_every_image_is_shown_once_and_in_a_second_round_again(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Cudart())
    calibrator = entropy_calibrator(make("8.5"), tiny.pixels(2))
    for _ in range(2):
        assert [calibrator.get_batch(["pixels"]) is None for _ in range(3)] == [False, False, True]
    assert calibrator.read_calibration_cache() is None
    calibrator.write_calibration_cache(memoryview(b"ranges"))
    assert calibrator.read_calibration_cache() == b"ranges"
