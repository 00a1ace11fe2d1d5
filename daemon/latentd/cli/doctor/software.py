"""Checks of the software beside latentd: PyTorch, TensorRT, the weights and compiled plans."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Dict, Optional

from latentd.cli.doctor.machine import BROKEN, ENTER, NOTE, OK, READ, WRITE, Finding, Machine, User, jetson_environ
from latentd.config import Config
from latentd.errors import CheckpointError

_CUDA = re.compile(r"^cuda(?:\s*:[^=\n]+)?\s*=\s*(?:'([^']*)'|\"([^\"]*)\"|None)", re.MULTILINE)
_VERSION = re.compile(r"^__version__\s*=\s*['\"]([^'\"]+)['\"]", re.MULTILINE)
OLDEST_TENSORRT = (8, 5)
LIBRARIES = "sudo apt-get install libopenblas-base libopenmpi-dev libomp-dev for a missing library; NVIDIA's wheel for all users else"


def torch(machine: Machine, user: User) -> Finding:
    """What torch/version.py says, and whether torch can be imported as the unit would. On a Jetson one without CUDA is one that pip put in
    the place of NVIDIA's.
    """
    folder = machine.package("torch")
    if folder is None:
        fix = "Jetson: NVIDIA's torch wheel for JetPack 5, then deploy/install.sh. Elsewhere: pip install 'latentd[torch]'"
        return Finding("torch", BROKEN, "PyTorch is not installed: nothing can be learned", fix)
    text = _text(folder / "version.py")
    version, cuda = _first(_VERSION, text) or "of unknown version", _first(_CUDA, text)
    if cuda is None and machine.is_tegra:
        fix = f"{folder.parent}: pip uninstall torch, then NVIDIA's wheel again; never pip install torch on a Jetson"
        return Finding("torch", BROKEN, f"{version} without CUDA: pip put it in the place of NVIDIA's wheel", fix)
    trouble = machine.imports("torch", _environ(machine, user))
    if trouble is not None:
        fix = LIBRARIES if machine.is_tegra else "pip install --force-reinstall torch, for all users"
        return Finding("torch", BROKEN, f"{version} in {folder.parent} can't be imported: {trouble}", fix)
    return Finding("torch", OK, f"{version}, built for CUDA {cuda}" if cuda else f"{version}, for the CPU")


def _environ(machine: Machine, user: User) -> Dict[str, str]:
    """What the service gets besides: its user can't see packages in somebody's home."""
    alone = {"PYTHONNOUSERSITE": "1"} if user.name == "latentd" else {}
    return {**(jetson_environ() if machine.is_tegra else {}), **alone}


def tensorrt(machine: Machine) -> Finding:
    folder = machine.package("tensorrt")
    if folder is None:
        if not machine.is_tegra:
            return Finding("TensorRT", OK, "not installed: ONNX Runtime or PyTorch answers")
        fix = "sudo apt-get install python3-libnvinfer, and an environment made with --system-site-packages"
        return Finding("TensorRT", NOTE, "this Python can't import it: ONNX Runtime or PyTorch answers, slower", fix)
    version = _first(_VERSION, _text(folder / "__init__.py"))
    if version is None:
        return Finding("TensorRT", OK, f"in {folder}, of a version that its files do not tell")
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if numbers < OLDEST_TENSORRT:
        return Finding("TensorRT", NOTE, f"{version}: older than 8.5, and not used", "JetPack 5.1 brings 8.5.2")
    return Finding("TensorRT", OK, version)


def plan_cache(config: Config, user: User) -> Finding:
    """The cache folder: weights, which must be there, and graphs and plans, which are made when they are not."""
    from latentd.vision import checkpoints  # and with it numpy: not for the verbs that only ask the daemon

    folder = config.cache_dir
    try:
        checkpoints.find(folder, config.backbone.name)
    except CheckpointError as absent:
        return Finding("plan cache", BROKEN, f"{folder}: {absent.detail}", "latentd backbone pull, as the user who owns that folder")
    except PermissionError:
        return Finding("plan cache", BROKEN, f"{folder} can't be read by you", "sudo latentd doctor")
    folders = [path for path in (folder, folder / "onnx", folder / "tensorrt") if path.is_dir()]
    closed = next((path for path in folders if not user.may(path, READ | WRITE | ENTER)), None)
    if closed is not None:
        slow = f"{closed} can't be written by {user}: what belongs there is made at every start"
        return Finding("plan cache", NOTE, slow, f"sudo chown -R {user.name}: {folder}")
    graphs = len(list((folder / "onnx").glob("*.onnx")))
    plans = ", ".join(_plan(path) for path in sorted((folder / "tensorrt").glob("*.plan"))) or "none"
    return Finding("plan cache", OK, f"{folder}: {config.backbone.name}, {graphs} graphs; TensorRT plans: {plans}")


def _plan(path: Path) -> str:
    """Precision and TensorRT of a plan, by the note beside it; one that was cut off has none."""
    try:
        key = json.loads(path.with_suffix(".json").read_bytes())["key"]
        return f"{key['precision']} for TensorRT {key['tensorrt']}"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{path.name} without a note"


def _first(pattern: re.Pattern[str], text: str) -> Optional[str]:
    found = pattern.search(text)
    return next((group for group in found.groups() if group is not None), None) if found else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
