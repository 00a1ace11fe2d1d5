"""The seam between the TensorRT stage and whoever owns device memory: torch, whose CUDA context and allocator the process has anyway.

Belongs to the thread that encodes. torch is imported when the memory is made, so that nobody without a GPU pays for it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional, Protocol

import numpy as np
from numpy.typing import NDArray

from latentd.errors import EngineError

L4T_RELEASE = Path("/etc/nv_tegra_release")
ANSWERING = -1  # of torch's two priorities the one before the learner's


class DeviceMemory(Protocol):
    """Buffers on one device, and the stream (never the default one, which would wait for everybody's work) on which all of it is queued."""

    @property
    def device(self) -> str:
        """Which device and which software under it: a plan that was built for another one is not for this."""
        ...

    @property
    def stream(self) -> int:
        """The handle of the stream."""
        ...

    def floats(self, *shape: int) -> Any:
        """A float32 buffer of its own, with data_ptr()."""
        ...

    def upload(self, pixels: NDArray[np.uint8], buffer: Any) -> None:
        """Queues pixels (B, S, S, 3) into the first B rows of a buffer (M, 3, S, S)."""
        ...

    def download(self, buffer: Any, rows: int) -> NDArray[np.float32]:
        """The first rows of a buffer, once all that was queued before is done."""
        ...


class CudaMemory:
    """DeviceMemory of the GPU that torch uses. Raises EngineError where torch can use none."""

    def __init__(self) -> None:
        try:
            import torch
        except ImportError as cause:
            raise EngineError("TensorRT needs torch for device memory, and torch is not installed") from cause
        if torch.version.cuda is None:
            raise EngineError(
                f"torch {torch.__version__} is built without CUDA",
                hint="On a Jetson pip may have put it in the place of NVIDIA's: install that again.",
            )
        try:
            if not torch.cuda.is_available():
                raise EngineError("torch finds no GPU", hint="In a container: --runtime nvidia. Otherwise: the group `video`.")
            self._stream = torch.cuda.Stream(priority=ANSWERING)  # type: ignore[no-untyped-call]
            capability = torch.cuda.get_device_capability()
            name = torch.cuda.get_device_name()
        except RuntimeError as cause:  # torch reports every failure of the driver as one
            raise EngineError(f"the GPU can't be used: {cause}") from cause
        self.device = f"{name} sm_{capability[0]}{capability[1]} CUDA {torch.version.cuda}{_l4t()}"
        self._torch = torch

    @property
    def stream(self) -> int:
        return int(self._stream.cuda_stream)

    def floats(self, *shape: int) -> Any:
        with self._torch.cuda.stream(self._stream):
            return self._torch.zeros(shape, dtype=self._torch.float32, device="cuda")

    def upload(self, pixels: NDArray[np.uint8], buffer: Any) -> None:
        with self._torch.cuda.stream(self._stream):  # bytes cross the bus, floats are made behind it
            buffer[: len(pixels)].copy_(self._torch.from_numpy(pixels).cuda().permute(0, 3, 1, 2))

    def download(self, buffer: Any, rows: int) -> NDArray[np.float32]:
        with self._torch.cuda.stream(self._stream):
            found: NDArray[np.float32] = buffer[:rows].cpu().numpy()
        return found


def answering_stream() -> Optional[Any]:
    """A stream of torch's for an engine that takes one (`.cuda_stream` is its handle); None where torch has no GPU or is not installed."""
    try:
        import torch

        if torch.version.cuda is not None and torch.cuda.is_available():
            return torch.cuda.Stream(priority=ANSWERING)  # type: ignore[no-untyped-call]
    except (ImportError, RuntimeError):  # the engine then makes one of its own, of the learner's priority
        pass
    return None


def _l4t() -> str:
    """The board's release, where there is one: "# R35 (release), REVISION: 3.1, …" -> " R35 3.1"."""
    try:
        parts = L4T_RELEASE.read_text(encoding="ascii", errors="replace").split("\n")[0].replace(",", "").split()
        return f" {parts[1]} {parts[parts.index('REVISION:') + 1]}"
    except (OSError, ValueError, IndexError):
        return ""
