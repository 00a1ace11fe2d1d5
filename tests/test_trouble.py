"""What the real message texts of torch, ONNX Runtime, TensorRT and the Tegra driver are taken for."""

from __future__ import annotations

import errno
from types import SimpleNamespace
from typing import List, Optional

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from latentd import trouble
from latentd.errors import EngineError, JournalError, OutOfMemory
from latentd.trouble import Trouble, in_halves, is_shortage, trouble_of

HINT = (
    "\nCUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be incorrect."
    "\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1.\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.\n"
)
ARENA = (
    "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Non-zero status code returned while running FusedMatMul node. Name:'MatMul_92' "
    "Status Message: /onnxruntime_src/onnxruntime/core/framework/bfc_arena.cc:376 void* onnxruntime::BFCArena::AllocateRawInternal("
    "size_t, bool, onnxruntime::Stream*, bool, onnxruntime::WaitNotificationFn) "
)
SHORTAGES = [
    "CUDA out of memory. Tried to allocate 20.00 MiB (GPU 0; 6.70 GiB total capacity; 5.01 GiB already allocated; 12.00 MiB free)",
    'NVML_SUCCESS == r INTERNAL ASSERT FAILED at "../c10/cuda/CUDACachingAllocator.cpp":1154, please report a bug to PyTorch. ',
    'NVML_SUCCESS == r INTERNAL ASSERT FAILED at "/opt/pytorch/pytorch/c10/cuda/CUDACachingAllocator.cpp":830, please report a bug',
    "CUDA driver error: out of memory",
    "CUDA error: out of memory" + HINT,
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_NOT_INITIALIZED",
    "CUBLAS failure 1: CUBLAS_STATUS_NOT_INITIALIZED ; GPU=0 ; hostname=nx ; file=cuda_call.cc ; expr=cublasCreate(&cublas_handle_); ",
    "[enforce fail at alloc_cpu.cpp:75] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 40000000000 bytes. "
    "Error code 12 (Cannot allocate memory)",
    "std::bad_alloc",
    ARENA + "Failed to allocate memory for requested buffer of size 8388608000",
    ARENA + "Available memory of 1048576 is smaller than requested bytes of 8388608",
    "CUDA failure 2: out of memory ; GPU=0 ; hostname=nx ; file=cuda_allocator.cc ; line=47 ; expr=cudaMalloc((void**)&p, size); ",
    "1: [defaultAllocator.cpp::allocate::19] Error Code 1: Cuda Runtime (out of memory)",
    "[virtualMemoryBuffer.cpp::resizePhysical::154] Error Code 2: OutOfMemory (Requested size was 16581132288 bytes.)",
    "Requested amount of GPU memory (2147483648 bytes) could not be allocated. There may not be enough free memory.",
    "NvMapMemAllocInternalTagged: 1075072515 error 12",
    "NvMapMemHandleAlloc: error 0",
]
LOST = [
    "CUDA error: an illegal memory access was encountered" + HINT,
    "CUDA error: device-side assert triggered" + HINT,
    "CUDA error: unspecified launch failure" + HINT,
    "CUDA error: misaligned address" + HINT,
    "CUDA error: the launch timed out and was terminated" + HINT,
    "CUDA error: uncorrectable ECC error encountered" + HINT,
    "CUDA failure 700: an illegal memory access was encountered ; GPU=0 ; hostname=nx ; expr=cudaStreamSynchronize(stream); ",
    "CUDA failure 719: unspecified launch failure ; GPU=0 ; hostname=nx ; expr=cudaEventRecord(event, stream); ",
]
NEITHER = [
    "NvRmMemInitNvmap failed with Permission denied",
    "CUDA error: invalid argument" + HINT,
    "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(handle, ...)`",
    "CUDA error: no kernel image is available for execution on the device" + HINT,
    "mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)",
    "/usr/lib/aarch64-linux-gnu/libgomp.so.1: cannot allocate memory in static TLS block",
]


@pytest.mark.parametrize("text", SHORTAGES)
def test_memory_that_runs_out_is_recognised_however_it_is_worded(text: str) -> None:
    assert trouble_of(RuntimeError(text)) is Trouble.MEMORY


@pytest.mark.parametrize("text", LOST)
def test_a_lost_context_is_recognised_also_where_its_text_speaks_of_memory(text: str) -> None:
    assert trouble_of(RuntimeError(text)) is Trouble.CONTEXT


@pytest.mark.parametrize("text", NEITHER)
def test_other_failures_are_not_taken_for_either(text: str) -> None:
    assert trouble_of(RuntimeError(text)) is Trouble.OTHER


def test_torchs_own_class_is_recognised_under_both_of_its_names_without_any_text() -> None:
    assert is_shortage(torch.cuda.OutOfMemoryError("odd words"))

    class OutOfMemoryError(RuntimeError):
        """As torch 2.0 has it: defined elsewhere than in 2.5."""

    assert is_shortage(OutOfMemoryError("odd words"))


def test_onnx_runtimes_classes_which_are_no_runtime_errors_are_recognised_by_their_text() -> None:
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    assert not issubclass(state.RuntimeException, RuntimeError)
    assert is_shortage(state.RuntimeException(ARENA + "Failed to allocate memory for requested buffer of size 8"))
    assert not is_shortage(state.Fail("[ONNXRuntimeError] : 1 : FAIL : Load model failed"))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (OutOfMemory("words"), True),
        (EngineError("onnxruntime-cuda failed on 8 images: " + ARENA + "Failed to allocate memory for requested buffer of size 8"), True),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (JournalError("the label 'out of memory' can't be written"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_host_memory_and_our_own_errors_count_and_foreign_words_do_not(error: Exception, expected: bool) -> None:
    assert is_shortage(error) is expected


def test_a_shortage_is_found_through_the_errors_that_were_raised_from_it() -> None:
    def chained(cause: BaseException) -> BaseException:
        outer = EngineError("the frozen stage failed")
        outer.__cause__ = EngineError("eager-cuda failed on 8 images")
        outer.__cause__.__cause__ = cause
        return outer

    assert trouble_of(chained(MemoryError())) is Trouble.MEMORY
    assert trouble_of(chained(RuntimeError(LOST[0]))) is Trouble.CONTEXT
    assert trouble_of(chained(RuntimeError(NEITHER[1]))) is Trouble.OTHER


def test_a_real_allocation_that_no_machine_can_serve_is_recognised() -> None:
    with pytest.raises((RuntimeError, MemoryError)) as refused:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_shortage(refused.value)
    with pytest.raises(MemoryError) as refused_too:
        np.empty(1 << 60, np.uint8)
    assert is_shortage(refused_too.value)


class Narrow:
    """Takes so many rows at once."""

    def __init__(self, most: int, text: str = "CUDA out of memory") -> None:
        self.most, self.text = most, text
        self.seen: List[int] = []

    def __call__(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        self.seen.append(len(rows))
        if len(rows) > self.most:
            raise RuntimeError(self.text)
        return rows * 2


@pytest.mark.parametrize("most", [1, 2, 3, 5, 7, 8])
def test_rows_are_taken_in_halves_until_they_fit_and_none_is_lost_or_moved(most: int) -> None:
    narrow = Narrow(most)
    rows = np.arange(7)
    np.testing.assert_array_equal(np.concatenate(in_halves(narrow, rows)), rows * 2)
    assert sum(size for size in narrow.seen if size <= most) == 7


@pytest.mark.parametrize(("text", "runs"), [(None, [4, 2, 1]), (NEITHER[1], [4])])
def test_one_row_that_does_not_fit_and_any_other_failure_are_told(text: Optional[str], runs: List[int]) -> None:
    narrow = Narrow(0, text or SHORTAGES[0])
    with pytest.raises(RuntimeError):
        in_halves(narrow, np.arange(4))
    assert narrow.seen == runs


@pytest.mark.parametrize("library", [object(), OSError("no C library")], ids=["another C library", "none"])
def test_where_the_c_library_can_give_nothing_back_nothing_happens(library: object, monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(name: None) -> object:
        if isinstance(library, OSError):
            raise library
        return library

    monkeypatch.setattr("ctypes.CDLL", opened)
    trouble.trim()


def test_memory_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: List[int] = []
    monkeypatch.setattr("ctypes.CDLL", lambda name: SimpleNamespace(malloc_trim=asked.append))
    trouble.trim()
    assert asked == [0]
