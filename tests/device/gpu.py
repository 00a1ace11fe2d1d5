"""What the tests on a GPU work with: a model of the usual size, latents of it, and a GPU that is nearly full."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

import tiny
from latentd.engines.onnx import OnnxStage
from latentd.engines.stage import StageSpec
from latentd.errors import EngineError
from latentd.replay.latents import TokenPool, make_latent_codec
from latentd.replay.memory import ReplayMemory
from latentd.vision import checkpoints
from latentd.vision.shape import VitShape
from latentd.vision.vit import Vit

CUDA = "CUDAExecutionProvider"
SMALL = VitShape(width=384, heads=(6,) * 12, mlp_width=(1536,) * 12, patch=16, grid=14)  # ViT-S/16 at 224 pixels
SPLIT, CLASS_TOKENS = 9, 4
POOLED = TokenPool(1, 14, 14)
LARGE = make_latent_codec("int8", "token", (CLASS_TOKENS, SMALL.width), (POOLED.tokens, SMALL.width), pool=POOLED)


class Model(NamedTuple):
    """A ViT-S with random weights: as much work and memory as the real one, and nothing to fetch."""

    vit: Vit
    spec: StageSpec
    backbone: checkpoints.Backbone

    def pixels(self, count: int) -> NDArray[np.uint8]:
        return tiny.pixels(count, self.spec.image_size)


def needs_onnxruntime(model: Model, graph: Path) -> None:
    """Skips the test where ONNX Runtime has no CUDA here: it is built without, or the libraries that it is built for are not there."""
    if CUDA not in onnxruntime.get_available_providers():
        pytest.skip(f"onnxruntime {onnxruntime.__version__} is built without CUDA: install onnxruntime-gpu, or NVIDIA's wheel on a Jetson")
    try:
        OnnxStage(model.spec, graph, CUDA).close()
    except EngineError:
        missing = _what_is_missing()
        if missing is None:
            raise
        pytest.skip(f"CUDA of onnxruntime {onnxruntime.__version__} does not load: {missing}")


def _what_is_missing() -> Optional[str]:
    """Loads what ONNX Runtime loads. Only after that has failed there: a provider that gets loaded without it would not work later."""
    folder = Path(onnxruntime.__file__).parent / "capi"
    try:
        for part in ("shared", "cuda"):
            ctypes.CDLL(str(folder / f"libonnxruntime_providers_{part}.so"))
    except OSError as cause:
        return str(cause)
    return None


def large_memory() -> ReplayMemory:
    """256 latents of eight classes, of the size that the model gives."""
    memory = ReplayMemory(str(LARGE), LARGE.code_bytes, 1 << 26, seed=0)
    rng = np.random.default_rng(0)
    for number in range(256):
        tokens = rng.standard_normal((1, POOLED.tokens, SMALL.width)).astype(np.float32)
        features = tokens[:, :CLASS_TOKENS].reshape(1, -1)
        memory.admit(f"s{number:08d}", number % 8, bytes(LARGE.encode(features, tokens)[0]))
    return memory


def leave_free(size_bytes: int) -> None:
    """Lets torch reserve so much more than it holds now, as if everything else were taken."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved() + size_bytes) / total))
