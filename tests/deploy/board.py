"""A root that imitates a Xavier NX, where deploy/install.sh may do as it likes, with a pip that only notes what it was asked for."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Dict, List

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "deploy/install.sh"
NX = {
    "proc/device-tree/model": "NVIDIA Jetson Xavier NX Developer Kit\0",
    "proc/device-tree/compatible": "nvidia,p3449-0000+p3668-0001\0nvidia,tegra194\0",
    "proc/meminfo": "MemTotal:        6996988 kB\nMemAvailable:    4194304 kB\nSwapTotal:       3498484 kB\n",
    "etc/nv_tegra_release": "# R35 (release), REVISION: 6.5, GCID: 32790763, BOARD: t186ref, EABI: aarch64\n",
    "etc/group": "root:x:0:\nvideo:x:44:\n",
}
NVIDIA_TORCH = "__version__ = '2.1.0a0+41361538.nv23.06'\ndebug = False\ncuda = '11.4'\n"
PLAIN_TORCH = "from typing import Optional\n__version__ = '2.4.1'\ncuda: Optional[str] = None\n"
OLD_NUMPY = "short_version = '1.17.4'\nversion = '1.17.4'\nfull_version = '1.17.4'\n"
# It writes down its arguments and the constraints, and leaves a latentd that writes down its own.
LATENTD = """#!/bin/sh
echo "$@" >> "$NOTES/latentd"
case $1 in --version) echo latentd 1.2.3 ;; *) echo did "$2" ;; esac
"""
PIP = """#!/bin/sh
echo "$@" >> "$NOTES/pip"
while [ "$1" != --constraint ]; do shift; done
cp "$2" "$NOTES/pins"
case "$*" in *--no-build-isolation*) ;; *) exit ;; esac
cp "$NOTES/../tools/latentd" "$BIN/latentd"
for site in "$BIN"/../lib/python*/site-packages; do
    mkdir -p "$site/latentd/cli" "$site/latentd/service"
    touch "$site/onnx.py" "$site/latentd/cli/app.py" "$site/latentd/service/supervisor.py"
done
"""


@functools.lru_cache(maxsize=1)
def python38() -> str:
    """Python 3.8, as JetPack 5 has it, where there is one; else the Python of the tests, without what the tests' environment holds."""
    pyenv = Path(os.environ.get("PYENV_ROOT", str(Path.home() / ".pyenv")))
    found = [shutil.which("python3.8"), *map(str, sorted(pyenv.glob("versions/3.8.*/bin/python")))]
    for path in filter(None, found):  # a shim of pyenv is there for every version and works for some
        if subprocess.run([path, "--version"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0:
            return path
    return str(Path(sys.base_prefix, "bin", "python{}.{}".format(*sys.version_info)))


class Board:
    """A root in a folder, and what the installer did to it."""

    def __init__(self, folder: Path) -> None:
        self.root, self.notes, self.site, self.tools = (folder / name for name in ("root", "notes", "site", "tools"))
        for path in (self.root, self.notes, self.site, self.tools):
            path.mkdir()
        self.plant(self.root, NX)
        self.plant(
            self.site, {"torch/__init__.py": "", "torch/version.py": NVIDIA_TORCH, "tensorrt/__init__.py": '__version__ = "8.5.2.2"\n'}
        )
        self.plant(self.site, {"numpy/__init__.py": "", "numpy/version.py": OLD_NUMPY})
        self.tool("pip", PIP)
        self.tool("latentd", LATENTD)
        for name in ("systemctl", "userdel"):
            self.tool(name, f'#!/bin/sh\necho {name} "$@" >> "$NOTES/system"\n')
        self.venv = self.root / "opt/latentd"

    def plant(self, folder: Path, files: Dict[str, str]) -> None:
        for name, text in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)

    def tool(self, name: str, text: str) -> None:
        (self.tools / name).write_text(text)
        (self.tools / name).chmod(0o755)

    def install(self, *options: str, code: int = 0, **environ: str) -> str:
        """Runs the installer; gives what it said."""
        own = {"PATH": f"{self.tools}:{os.environ['PATH']}", "PYTHON": python38(), "PYTHONPATH": str(self.site), "HOME": str(self.root)}
        fakes = {"LATENTD_PIP": str(self.tools / "pip"), "NOTES": str(self.notes), "BIN": str(self.venv / "bin")}
        command = ["sh", str(SCRIPT), "--root", str(self.root), *options]
        ran = subprocess.run(command, env={**own, **fakes, **environ}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        said = ran.stdout.decode()
        assert ran.returncode == code, said
        return said

    def files(self) -> List[str]:
        return sorted(str(path.relative_to(self.root)) for path in self.root.rglob("*") if path.is_file() or path.is_symlink())

    def noted(self, name: str) -> List[str]:
        path = self.notes / name
        return path.read_text().splitlines() if path.exists() else []
