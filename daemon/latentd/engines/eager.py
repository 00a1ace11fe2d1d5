"""The frozen stage in eager PyTorch: the answer that every other engine is compared with, and the last engine in line.

On CUDA it has a stream of its own, of the priority that goes before the learner's.
"""

from __future__ import annotations

import copy
from typing import Optional

import numpy as np
import torch
from numpy.typing import NDArray

from latentd.engines.stage import Encoded, StageSpec, planar
from latentd.engines.torch_queue import ANSWERING, TorchQueue, has_gpu
from latentd.errors import EngineError
from latentd.vision.vit import Vit, normalised


class EagerStage:
    """FrozenStage on one torch device, in float32. The module given stays on the CPU; another device gets a copy."""

    lanes = 1

    def __init__(self, spec: StageSpec, vit: Vit, device: str = "cpu", threads: int = 0) -> None:
        if threads:
            torch.set_num_threads(threads)
        self.spec = spec
        self.name = f"eager-{torch.device(device).type}"
        try:
            self._queue = TorchQueue(device, ANSWERING)
            self._vit: Optional[Vit] = self._copied(vit) if self._queue.is_cuda else vit
        except RuntimeError as cause:
            raise EngineError(f"{self.name} could not be loaded: {cause}") from cause

    def encode(self, pixels: NDArray[np.uint8], tokens: bool = False, shared: bool = False) -> Encoded:
        assert self._vit is not None, "encode after close"
        try:
            with torch.inference_mode(), self._queue.work():
                images = normalised(self._images(pixels), self._vit.shape)
                features, cut = self._vit.frozen(images, self.spec.split, self.spec.class_tokens)
                return Encoded(self._queue.download(features), self._queue.download(cut) if tokens else None)
        except RuntimeError as cause:  # torch reports every device failure, out of memory included, as a RuntimeError
            raise EngineError(f"{self.name} failed on {len(pixels)} images: {cause}") from cause

    def close(self) -> None:
        self._vit = None
        self._queue.free()

    def _copied(self, vit: Vit) -> Vit:
        torch.backends.cudnn.allow_tf32 = False  # its ten bits of mantissa are not the float32 that others are compared with
        with self._queue.work():
            return copy.deepcopy(vit).to(self._queue.device)

    def _images(self, pixels: NDArray[np.uint8]) -> torch.Tensor:
        """(B, S, S, 3) -> (B, 3, S, S). To a GPU go bytes, a quarter of the floats, which are made behind the bus."""
        if self._queue.is_cuda:
            return self._queue.upload(pixels).permute(0, 3, 1, 2).float()
        return self._queue.upload(planar(pixels))


def best_device() -> str:
    """The device that eager PyTorch serves from: CUDA where torch can use it, otherwise the CPU."""
    return "cuda" if has_gpu() else "cpu"
