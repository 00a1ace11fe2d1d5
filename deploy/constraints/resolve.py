"""Writes the constraints file of the Python that runs it: every package that latentd installs there, pinned.

Run it in an empty virtual environment with a current pip, from the top of the repository: `python deploy/constraints/resolve.py`.
pip answers from package metadata, so nothing large is downloaded; torch's CUDA packages are left out, since torch pins them itself.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List

HERE = Path(__file__).parent
# The newest torch that each Python has, 2.13 at most; 3.8 also keeps numpy below 1.24, which TensorRT 8.5's Python module needs.
CHOSEN: Dict[str, List[str]] = {"py38": ["torch==2.4.1", "numpy==1.23.5"], "py39": ["torch==2.8.0"]}
OTHERWISE = ["torch==2.13.0"]
CUDA = re.compile(r"(nvidia|triton|pytorch-triton|cuda)[^a-z]", re.IGNORECASE)


def resolved(*requirements: str) -> List[Dict[str, Any]]:
    """The packages that pip would install for these requirements in an empty environment, with their metadata."""
    command = [sys.executable, "-m", "pip", "install", "-qq", "--dry-run", "--ignore-installed", "--prefer-binary", "--report", "-"]
    answer = subprocess.run([*command, *requirements], check=True, stdout=subprocess.PIPE)
    packages: List[Dict[str, Any]] = json.loads(answer.stdout)["install"]
    return [package["metadata"] for package in packages]


def main() -> None:
    name = "py{}{}".format(*sys.version_info[:2])
    chosen = CHOSEN.get(name, OTHERWISE)
    (torch,) = resolved("--no-deps", chosen[0])
    needs = [need for need in torch["requires_dist"] if not CUDA.match(need)]
    packages = resolved(".[onnxruntime,bench,dev]", "pip", "setuptools", *chosen[1:], *needs)
    pins = {package["name"].lower().replace("_", "-"): package["version"] for package in packages if package["name"] != "latentd"}
    pins["torch"] = torch["version"].split("+")[0]
    lines = ["# Made by deploy/constraints/resolve.py; torch pins its own CUDA packages."]
    lines += [f"{package}=={version}" for package, version in sorted(pins.items())]
    (HERE / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


main()
