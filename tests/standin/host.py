"""DeviceMemory in the CPU's memory, with the alignment and the stream handle of a device's."""

from __future__ import annotations

import os
from typing import Any, List

import numpy as np
import torch
from numpy.typing import NDArray

from latentd.errors import EngineError
from standin.building import gpu


class HostMemory:
    """STANDIN_MEMORY in the environment: "none" for a machine without a GPU, "unaligned" for addresses that TensorRT does not take."""

    stream = 7

    def __init__(self) -> None:
        if os.environ.get("STANDIN_MEMORY") == "none":
            raise EngineError("torch finds no GPU")
        self.device = gpu()
        self.uploads: List[int] = []

    def floats(self, *shape: int) -> Any:
        size = int(np.prod(shape))
        raw = torch.zeros(4 * size + 512, dtype=torch.uint8)
        start = -raw.data_ptr() % 256 + (4 if os.environ.get("STANDIN_MEMORY") == "unaligned" else 0)
        return raw[start : start + 4 * size].view(torch.float32).reshape(shape)

    def upload(self, pixels: NDArray[np.uint8], buffer: Any) -> None:
        self.uploads.append(len(pixels))
        buffer[: len(pixels)].copy_(torch.from_numpy(pixels).permute(0, 3, 1, 2))

    def download(self, buffer: Any, rows: int) -> NDArray[np.float32]:
        found: NDArray[np.float32] = buffer[:rows].numpy().copy()
        return found
