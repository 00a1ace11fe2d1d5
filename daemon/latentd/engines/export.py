"""The frozen stage as an ONNX graph that ONNX Runtime and TensorRT 8.5 read. Seconds of work, on whoever asks; needs torch and onnx."""

from __future__ import annotations

import inspect
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict

import numpy as np

from latentd.engines.stage import StageSpec
from latentd.errors import EngineError
from latentd.vision.probe import probe_images

if TYPE_CHECKING:
    from latentd.vision.vit import Vit

EXPORTER_VERSION = 2
"""Part of the cache key: change it whenever the exported graph would come out different."""
OPSET = 16  # TensorRT 8.5 has no LayerNormalization operator, which opset 17 would bring
IR_VERSION = 8  # the newest that the ONNX Runtime builds for JetPack 5 read


def export(vit: Vit, spec: StageSpec, path: Path, whole: bool = False) -> None:
    """Write the graph: `pixels` float32 (B, 3, S, S) in 0..255 -> `features` (B, m*D), `tokens` (B, N, D); only B is dynamic.

    whole: every block gives all its tokens, though nobody takes the last one's (`Vit.frozen`). Normalisation is inside; the input is float
    because TensorRT 8.5 can't cast from uint8. Raises EngineError where onnx is missing or the exporter fails, OSError where the file can't
    be written.
    """
    try:
        import onnx
    except ImportError as cause:
        raise EngineError("exporting the graph needs the onnx package", hint="python -m pip install onnx") from cause
    try:
        _trace(vit, spec, path, whole)
        model = onnx.load(str(path))
        model.ir_version = IR_VERSION
        model.producer_name, model.producer_version = "latentd", str(EXPORTER_VERSION)
        for key, value in asdict(spec).items():
            model.metadata_props.add(key=key, value=str(value))
        for output, sizes in zip(model.graph.output, ((spec.features_width,), (spec.tokens, spec.width))):
            for axis, size in zip(output.type.tensor_type.shape.dim[1:], sizes):
                axis.dim_value = size  # the tracer could not tell
        onnx.checker.check_model(model)
        onnx.save(model, str(path))
    except (RuntimeError, ValueError, onnx.checker.ValidationError) as cause:
        raise EngineError(f"{spec.backbone_name} could not be exported to ONNX: {cause}") from cause


def _trace(vit: Vit, spec: StageSpec, path: Path, whole: bool) -> None:
    import torch

    example = torch.from_numpy(probe_images(spec.image_size)[:2].transpose(0, 3, 1, 2).astype(np.float32))
    options: Dict[str, Any] = {"dynamo": False} if "dynamo" in inspect.signature(torch.onnx.export).parameters else {}
    with warnings.catch_warnings(), torch.no_grad():
        _silence_exporter()
        torch.onnx.export(
            _frozen_module(vit, spec, whole),
            (example,),
            str(path),
            input_names=["pixels"],
            output_names=["features", "tokens"],
            dynamic_axes={name: {0: "batch"} for name in ("pixels", "features", "tokens")},
            opset_version=OPSET,
            **options,
        )


def _frozen_module(vit: Vit, spec: StageSpec, whole: bool) -> Any:
    from torch import Tensor, nn

    from latentd.vision.vit import normalised

    class Frozen(nn.Module):
        """What is traced. The backbone is its child, so that every node's name says which block it belongs to."""

        def __init__(self) -> None:
            super().__init__()
            self.vit = vit

        def forward(self, pixels: Tensor) -> Any:
            return self.vit.frozen(normalised(pixels, vit.shape), spec.split, spec.class_tokens, whole)

    return Frozen().eval()


def _silence_exporter() -> None:
    """Of the exporter's warnings, those that state what is meant here: every size but the batch is a constant of the graph."""
    warnings.filterwarnings("ignore", message="You are using the legacy TorchScript-based ONNX export", category=DeprecationWarning)
    warnings.filterwarnings("ignore", message="The feature will be removed", category=DeprecationWarning, module=r"torch\.onnx\..*")
    for message in ("Converting a tensor to a Python integer", r"torch\.tensor results are registered as constants"):
        warnings.filterwarnings("ignore", message=message, category=Warning)  # torch.jit.TracerWarning
