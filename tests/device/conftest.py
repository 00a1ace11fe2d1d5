"""Tests that need a GPU. Elsewhere each of them is skipped with the reason; `make test-device` runs them."""

from __future__ import annotations

from typing import Iterator, List, Optional

import pytest
import torch

import tiny
from device.gpu import CLASS_TOKENS, SMALL, SPLIT, Model
from latentd.engines.stage import StageSpec


def why_no_gpu() -> Optional[str]:
    """None where torch can compute on a GPU."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return "torch finds no GPU: in a container --runtime nvidia or --gpus all, otherwise the group video"
    return None


def pytest_collection_modifyitems(items: List[pytest.Item]) -> None:
    """Before any fixture is made: a model is not built only to be left alone."""
    reason = why_no_gpu()
    for item in items:
        if reason is not None and item.get_closest_marker("device") is not None:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def gpu() -> Iterator[str]:
    """The name of the GPU; all of its memory may be used, and is given back at the end."""
    yield str(torch.cuda.get_device_name())
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    vit = tiny.vit(SMALL)
    with torch.no_grad():
        for parameter in vit.parameters():
            if parameter.dim() > 1:
                parameter.mul_(0.2)  # lively, but not chaotic over twelve blocks
    backbone = tiny.backbone(tmp_path_factory.mktemp("model"), vit)
    spec = StageSpec(backbone.name, backbone.sha256, 224, SPLIT, CLASS_TOKENS, SMALL.width, SMALL.tokens(224))
    return Model(vit, spec, backbone)
