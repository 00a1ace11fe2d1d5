"""The frozen stage in eager PyTorch: the answer that every other engine is compared with, and the last engine in line."""

from __future__ import annotations

import copy
from typing import Optional

import numpy as np
import torch
from numpy.typing import NDArray

from latentd.engines.stage import Encoded, StageSpec, planar
from latentd.errors import EngineError
from latentd.headroom import is_out_of_memory
from latentd.vision.vit import Vit, normalised


class EagerStage:
    """FrozenStage on one torch device, in float32. The module given stays on the CPU; another device gets a copy."""

    lanes = 1

    def __init__(self, spec: StageSpec, vit: Vit, device: str = "cpu", threads: int = 0) -> None:
        if threads:
            torch.set_num_threads(threads)
        self.spec = spec
        self.name = f"eager-{torch.device(device).type}"
        self._device = torch.device(device)
        self._vit: Optional[Vit] = vit if self._device.type == "cpu" else copy.deepcopy(vit).to(self._device)

    def encode(self, pixels: NDArray[np.uint8], tokens: bool = False, shared: bool = False) -> Encoded:
        assert self._vit is not None, "encode after close"
        try:
            with torch.inference_mode():
                images = normalised(torch.from_numpy(planar(pixels)).to(self._device), self._vit.shape)
                features, cut = self._vit.frozen(images, self.spec.split, self.spec.class_tokens)
                return Encoded(features.cpu().numpy(), cut.cpu().numpy() if tokens else None)
        except RuntimeError as cause:  # torch reports every device failure, out of memory included, as a RuntimeError
            if self._device.type == "cuda" and is_out_of_memory(cause):
                torch.cuda.empty_cache()  # what the allocator kept for other shapes may do for a smaller batch
            raise EngineError(f"{self.name} failed on {len(pixels)} images: {cause}") from cause

    def close(self) -> None:
        self._vit = None


def best_device() -> str:
    """The device that eager PyTorch serves from: CUDA where torch can use it, otherwise the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"
