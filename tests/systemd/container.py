"""A Debian system with systemd as its first process, in a container of systemd-nspawn, on layers of overlayfs.

Three layers: a root from debootstrap, made once and kept outside the repository; on it what a user installs, made once a session; on that
what one test does. The containers have no network but their own loopback.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence

import pytest

SUITE = "bookworm"
PACKAGES = ("systemd", "systemd-sysv", "python3", "python3-venv", "procps")
ROOTS = Path(os.environ.get("LATENTD_TEST_ROOTS", "/var/cache/latentd-tests"))
PYTHON, SITE = "/opt/test-python", "/opt/test-packages"  # this Python and its packages, as the container sees them
LATENTD = "/opt/latentd/bin/latentd"
ENVIRON = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8", "HOME": "/root"}
BOOT_S, CALL_S, WAIT_S = 120.0, 300.0, 150.0


def missing_tools() -> Optional[str]:
    """Why no container can be had here; None when one can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "containers are made by root, on Linux"
    absent = [tool for tool in ("systemd-nspawn", "debootstrap", "nsenter", "mount") if shutil.which(tool) is None]
    return f"{', '.join(absent)} not found: apt-get install systemd-container debootstrap" if absent else None


def base_root(packages: Sequence[str] = PACKAGES) -> Path:
    """A Debian root with these packages, made when it is not there; skips the test where it can't be."""
    name = hashlib.sha256(" ".join((SUITE, *packages)).encode()).hexdigest()[:8]
    root = ROOTS / f"{SUITE}-{name}"
    if root.is_dir():
        return root
    unfinished = ROOTS / f"{root.name}.{os.getpid()}"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    command = ["debootstrap", "--variant=minbase", f"--include={','.join(packages)}", SUITE, str(unfinished)]
    made = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if made.returncode != 0:
        shutil.rmtree(unfinished, ignore_errors=True)
        pytest.skip(f"debootstrap failed: {made.stdout[-400:]}")
    unfinished.rename(root)
    return root


class Layer:
    """A root: `upper`, where changes go, over the folders below."""

    def __init__(self, folder: Path, below: Sequence[Path]) -> None:
        self.below, self.upper, self.root = tuple(below), folder / "upper", folder / "root"
        for path in (self.upper, folder / "work", self.root):
            path.mkdir(parents=True)
        options = f"lowerdir={':'.join(map(str, self.below))},upperdir={self.upper},workdir={folder / 'work'}"
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, str(self.root)], check=True)

    def close(self) -> None:
        subprocess.run(["umount", str(self.root)], check=True)

    def nspawn(self, *arguments: str) -> List[str]:
        """systemd-nspawn on this root, with this Python and its packages where they can be read by all."""
        site = sysconfig.get_paths()["purelib"]
        binds = [f"--bind-ro={site}:{SITE}", *([] if sys.base_prefix == "/usr" else [f"--bind-ro={sys.base_prefix}:{PYTHON}"])]
        private = ["--private-network", "--register=no", "--keep-unit", "--quiet"]
        return ["systemd-nspawn", *private, f"--directory={self.root}", "--machine=latentd-test", *binds, *arguments]


class Container:
    """A booted layer. Leaving the `with` block ends it, however it stands."""

    def __init__(self, layer: Layer) -> None:
        self._layer = layer
        self.root = layer.root
        self._leader = 0  # the number of its first process
        self._console = (layer.root.parent / "console").open("wb")
        command = layer.nspawn("--boot", "--console=pipe", "--kill-signal=SIGRTMIN+3")
        self._nspawn = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=self._console, stderr=subprocess.STDOUT)
        try:
            self._leader = self.until(self._first_process, "the container to start", BOOT_S)
            self.until(lambda: self.call("systemctl", "is-system-running", check=False).strip() in ("running", "degraded"), "boot", BOOT_S)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Container:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._nspawn.poll() is None:
            self._nspawn.send_signal(signal.SIGTERM)
            try:
                self._nspawn.wait(30)
            except subprocess.TimeoutExpired:
                self._nspawn.kill()
                self._nspawn.wait()
        self._console.close()

    def call(self, *command: str, check: bool = True) -> str:
        """Runs a command inside as root; gives its stdout. Raises with both outputs when it fails, unless told."""
        inside = ["nsenter", f"--target={self._leader}", "--all", "env", "-i", *(f"{key}={value}" for key, value in ENVIRON.items())]
        ran = subprocess.run([*inside, *command], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=CALL_S)
        if check and ran.returncode != 0:
            raise AssertionError(f"{' '.join(command)}: exit code {ran.returncode}\n{ran.stdout}{ran.stderr}\n{self.journal()}")
        return ran.stdout

    def latentd(self, *arguments: str) -> Dict[str, Any]:
        """`latentd … --json` inside."""
        answer: Dict[str, Any] = json.loads(self.call(LATENTD, *arguments, "--json"))
        return answer

    def show(self, name: str, unit: str = "latentd.service") -> str:
        """One property of a unit."""
        return self.call("systemctl", "show", f"--property={name}", "--value", unit).strip()

    def journal(self, *filters: str) -> str:
        """What latentd and systemd said of latentd since the boot."""
        inside = ["nsenter", f"--target={self._leader}", "--all", "journalctl", "--unit=latentd", "--output=cat", "--no-pager", *filters]
        return subprocess.run(inside, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout

    def until(self, true: Callable[[], Any], what: str, timeout_s: float = WAIT_S) -> Any:
        """The first true value that `true` gives; an error that says what did not come."""
        deadline = time.monotonic() + timeout_s
        while True:
            found = true()
            if found:
                return found
            if time.monotonic() > deadline or self._nspawn.poll() is not None:
                raise AssertionError(
                    f"waited {timeout_s:.0f} s for {what}; the journal:\n{self.journal() if hasattr(self, '_leader') else ''}"
                )
            threading.Event().wait(0.1)

    def _first_process(self) -> Optional[int]:
        """systemd, as this machine numbers it; None before it runs: nspawn has other children on the way there."""
        children = Path(f"/proc/{self._nspawn.pid}/task/{self._nspawn.pid}/children").read_text().split()
        for child in children:
            with suppress(OSError):
                status = Path(f"/proc/{child}/status").read_text()
                if re.search(r"^NSpid:.*\t1$", status, re.MULTILINE) and "Name:\tsystemd\n" in status:
                    return int(child)
        return None


def python_inside() -> str:
    """The Python to make the environment with; skips the test where the container has none that can use our packages."""
    version = ".".join(map(str, sys.version_info[:2]))
    if sys.base_prefix != "/usr":
        return f"{PYTHON}/bin/python{version}"
    if not (base_root() / f"usr/bin/python{version}").exists():
        pytest.skip(f"these tests run on the system's Python {version}, which Debian {SUITE} does not have")
    return f"/usr/bin/python{version}"


def install_latentd(layer: Layer, wheel: Path) -> None:
    """What a user does before `latentd service install`: an environment in /opt, and the package in it; its dependencies are ours."""
    (layer.root / "opt/wheels").mkdir(parents=True, exist_ok=True)
    shutil.copy(str(wheel), str(layer.root / "opt/wheels"))
    version = ".".join(map(str, sys.version_info[:2]))
    (layer.root / "etc/ld.so.conf.d/test-python.conf").write_text(f"{PYTHON}/lib\n")
    script = (
        f"set -e; ldconfig; {python_inside()} -m venv /opt/latentd; echo {SITE} > /opt/latentd/lib/python{version}/site-packages/ours.pth; "
        f"/opt/latentd/bin/python -m pip install --quiet --no-index --no-deps /opt/wheels/{wheel.name}"
    )
    ran = subprocess.run(
        layer.nspawn("--pipe", "/bin/sh", "-c", script), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert ran.returncode == 0, ran.stdout.decode("utf-8", "replace")
