"""What a device's failure means: out of memory, a context that is lost for this process, or something else.

Torch, ONNX Runtime, TensorRT and the driver say the same thing in many ways and with unrelated exception classes, some of them only since a
certain version. So classes are recognised by name and texts by pattern, and no runtime is imported. Any thread; nothing here blocks.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import re
import sys
from typing import Any, Callable, Iterator, List, Tuple, Type, TypeVar

from latentd.errors import EngineError, OutOfMemory

Rows = TypeVar("Rows", bound=Any)
Result = TypeVar("Result")


class Trouble(enum.Enum):
    """MEMORY: less at once may succeed. CONTEXT: nothing on this device succeeds again in this process (a "sticky" CUDA error)."""

    MEMORY = "out of memory"
    CONTEXT = "device context lost"
    OTHER = "other"


# What a stage or a torch module may raise. ONNX Runtime's own classes are wrapped where they arise; everything else is a bug.
FAILURES: Tuple[Type[Exception], ...] = (RuntimeError, MemoryError, EngineError)

_MEMORY = re.compile(
    r"""
    out\ of\ memory                                                # CUDA runtime and driver, torch, TensorRT
    | OutOfMemory                                                  # TensorRT: "Error Code 2: OutOfMemory"
    | ERROR_OUT_OF_MEMORY | cudaErrorMemoryAllocation
    | NVML_SUCCESS\ ==\ r\ INTERNAL\ ASSERT\ FAILED                # torch on a Tegra without NVML, while it words its own OutOfMemoryError
    | CU(BLAS|DNN|SOLVER|SPARSE)_STATUS_ALLOC_FAILED
    | CU(BLAS|DNN|SOLVER|SPARSE)_STATUS_NOT_INITIALIZED            # no memory for the handle, when cublasCreate and its like say it
    | failed\ to\ allocate\ memory\ for\ requested\ buffer         # ONNX Runtime's arena: the device refuses
    | is\ smaller\ than\ requested\ bytes                          # ONNX Runtime's arena: its own limit is reached
    | std::bad_alloc | bad\ allocation
    | ca(n't|nnot)\ allocate\ memory(?!\ in\ static\ TLS\ block)   # torch on the CPU, errno 12; of TLS: a library that does not load
    | not\ enough\ memory
    | NvMapMem\w*:\ .*error\ 12 | NvMapMem\w*:\ error\ 0           # the Tegra driver
    | allocator\ error\ allocating                                 # TensorRT: "User allocator error allocating N-byte buffer"
    | GPU\ memory\ \([^)]*\)\ could\ not\ be\ allocated            # TensorRT: "Requested amount of GPU memory (N bytes) could not ..."
    """,
    re.VERBOSE | re.IGNORECASE,
)
# Torch ends every CUDA error with a hint about device-side assertions: only a triggered one is meant.
_CONTEXT = re.compile(
    r"""
    illegal\ memory\ access | illegal\ instruction | illegal\ address
    | unspecified\ launch\ failure | device-side\ assert\ triggered
    | misaligned\ address | hardware\ stack\ error | invalid\ program\ counter
    | operation\ not\ supported\ on\ global/shared\ address\ space
    | launch\ timed\ out | uncorrectable\ \w+\ error | context\ is\ destroyed
    | driver\ shutting\ down | CUDA\ error:\ unknown\ error
    | CUDA\ failure\ (214|70[029]|71\d|999):
    """,
    re.VERBOSE | re.IGNORECASE,
)
_DEPTH = 8  # causes that are followed


def trouble_of(error: BaseException) -> Trouble:
    """What this exception, or one that it was raised from, means. A lost context outweighs memory: what it says of memory is hearsay."""
    found = [_said_by(each) for each in _causes(error)]
    return next((trouble for trouble in (Trouble.CONTEXT, Trouble.MEMORY) if trouble in found), Trouble.OTHER)


def is_shortage(error: BaseException) -> bool:
    return trouble_of(error) is Trouble.MEMORY


def _said_by(error: BaseException) -> Trouble:
    kinds = type(error).__mro__
    if isinstance(error, (MemoryError, OutOfMemory)) or any(kind.__name__ == "OutOfMemoryError" for kind in kinds):
        return Trouble.MEMORY  # torch.OutOfMemoryError is in torch.cuda in 2.0
    if not isinstance(error, (RuntimeError, OSError, EngineError)) and not kinds[0].__module__.startswith("onnxruntime"):
        return Trouble.OTHER  # a text about memory in anybody else's exception is somebody's label or file name
    text = str(error)
    if _CONTEXT.search(text):
        return Trouble.CONTEXT
    return Trouble.MEMORY if _MEMORY.search(text) else Trouble.OTHER


def _causes(error: BaseException) -> Iterator[BaseException]:
    current = error
    for _ in range(_DEPTH):
        yield current
        if current.__cause__ is None:
            return
        current = current.__cause__


def in_halves(run: Callable[[Rows], Result], rows: Rows) -> List[Result]:
    """What `run` makes of the rows, in order: of all at once or, where memory does not suffice for that, of parts.

    Raises what `run` raises, where one row alone is too much or the failure is another.
    """
    try:
        return [run(rows)]
    except FAILURES as error:
        if len(rows) < 2 or not is_shortage(error):
            raise
    free_cached()  # here, not above: an exception that is being handled keeps every tensor of the failed run
    middle = (len(rows) + 1) // 2
    return in_halves(run, rows[:middle]) + in_halves(run, rows[middle:])


def trim() -> None:
    """Gives memory that the C library holds for later back to the system: matrices that came and went leave much of it. glibc only; takes
    milliseconds.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def free_cached() -> None:
    """Gives device memory that torch holds for later back to the device; any thread, whoever uses torch meanwhile."""
    torch = sys.modules.get("torch")  # where nobody has imported it, it holds nothing
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
