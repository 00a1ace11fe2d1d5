"""The machine as the checks see it: a root folder, the user who will run latentd, and the few calls that a folder can't answer.

Everything here reads; nothing changes the machine. Tests give a folder that imitates a board.
"""

from __future__ import annotations

import importlib.util
import os
import re
import stat
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Dict, FrozenSet, List, Mapping, NamedTuple, Optional, Sequence

import latentd

OK, NOTE, BROKEN = "ok", "note", "broken"
READ, WRITE, ENTER = 4, 2, 1  # of a file's mode, for each of owner, group and others
COMMAND_S = 10.0
IMPORT_S = 120.0  # torch from a slow card that has other things to do
JETSON_DROP_IN = Path(latentd.__file__).parent / "units/latentd.service.d/20-jetson.conf"


class Finding(NamedTuple):
    """What one check found. state: ok, note (latentd works, something could be better), or broken. fix: one thing to do, or nothing."""

    check: str
    state: str
    detail: str
    fix: str = ""


class Disk(NamedTuple):
    """Of the file system that holds a path."""

    free_bytes: int
    read_only: bool


def disk_of(path: Path) -> Disk:
    """Raises OSError where the path is not there."""
    found = os.statvfs(str(path))
    return Disk(found.f_bavail * found.f_frsize, bool(found.f_flag & os.ST_RDONLY))


def package_folder(name: str) -> Optional[Path]:
    """Where this Python would import a package from, without importing it; None: it has none."""
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).parent if spec and spec.origin else None


def import_trouble(name: str, environ: Mapping[str, str]) -> Optional[str]:
    """Why this Python can't import a package, tried in a process of its own with these variables besides; None: it can."""
    command = [sys.executable, "-c", f"import {name}"]
    try:
        ran = subprocess.run(
            command,
            cwd="/",
            env={**os.environ, **environ},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=IMPORT_S,
        )
    except subprocess.TimeoutExpired:
        return f"not done after {IMPORT_S:.0f} s"
    if ran.returncode < 0:
        return f"ended by signal {-ran.returncode}"
    said = ran.stderr.decode("utf-8", "replace").strip().splitlines()
    return (said or ["it said nothing"])[-1] if ran.returncode else None


def jetson_environ() -> Dict[str, str]:
    """What the unit sets on a Jetson before latentd starts."""
    return dict(re.findall(r"^Environment=(\w+)=(.*)$", JETSON_DROP_IN.read_text(encoding="utf-8"), re.MULTILINE))


def output_of(command: Sequence[str]) -> str:
    """What a command prints, whatever its exit code; nothing when it is not there or hangs."""
    try:
        ran = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=COMMAND_S)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return ran.stdout.decode("utf-8", "replace")


@dataclass(frozen=True)
class User:
    """Who runs latentd: the user of the unit, or the one who asks."""

    name: str
    uid: int
    gids: FrozenSet[int]

    def may(self, path: Path, wanted: int) -> bool:
        """Whether the mode of the file or folder allows it (READ, WRITE, ENTER, or a sum). Raises OSError where it is not there.

        Worked out from the mode, so that root can ask for another user; access control lists are not looked at.
        """
        if self.uid == 0:
            return True
        found = path.stat()
        shift = 6 if found.st_uid == self.uid else 3 if found.st_gid in self.gids else 0
        return found.st_mode >> shift & wanted == wanted

    def __str__(self) -> str:
        return f"{self.name} (uid {self.uid}, gids {', '.join(map(str, sorted(self.gids))) or 'none'})"


@dataclass(frozen=True)
class Machine:
    """root: of the filesystem. disk, package, output and imports answer what no folder can; see the functions they are by default."""

    root: Path = Path("/")
    disk: Callable[[Path], Disk] = disk_of
    package: Callable[[str], Optional[Path]] = package_folder
    output: Callable[[Sequence[str]], str] = output_of
    imports: Callable[[str, Mapping[str, str]], Optional[str]] = import_trouble

    def path(self, inside: str) -> Path:
        return self.root / inside.lstrip("/")

    def text(self, inside: str) -> str:
        """A small file without trailing blanks and NULs; empty where it can't be read."""
        try:
            return self.path(inside).read_bytes().decode("utf-8", "replace").strip("\0 \t\n")
        except OSError:
            return ""

    @property
    def is_tegra(self) -> bool:
        """Whether this is a Jetson. In a container the release file may be missing, and Docker masks /sys/firmware, where the device tree
        lies; the kernel is the host's.
        """
        names = (self.text(file) for file in ("proc/device-tree/compatible", "proc/sys/kernel/osrelease"))
        return any("tegra" in name for name in names) or bool(self.text("etc/nv_tegra_release"))

    @property
    def l4t(self) -> Optional[str]:
        """ "35.6.5"; None where nothing says. Never a reason to refuse: releases go on."""
        found = re.search(r"R(\d+).*?REVISION:\s*([\d.]+)", self.text("etc/nv_tegra_release"))
        return f"{found.group(1)}.{found.group(2)}" if found else None

    def group(self, gid: int) -> str:
        """The name of a group in etc/group; its number where that has none."""
        return next((parts[0] for parts in self._rows("etc/group", 4) if int(parts[2]) == gid), str(gid))

    def user(self, name: str, extra_groups: Sequence[str] = ()) -> Optional[User]:
        """A user of etc/passwd with the groups that etc/group gives it, and `extra_groups`, as a unit's SupplementaryGroups=."""
        for parts in self._rows("etc/passwd", 4):
            if parts[0] == name:
                member = {int(row[2]) for row in self._rows("etc/group", 4) if name in row[3].split(",") or row[0] in extra_groups}
                return User(name, int(parts[2]), frozenset({int(parts[3]), *member}))
        return None

    def _rows(self, file: str, least: int) -> List[List[str]]:
        rows = [line.split(":") for line in self.text(file).splitlines()]
        return [row for row in rows if len(row) >= least and row[2].isdigit()]


def asking_user(machine: Machine) -> User:
    """The user of the installed unit when root asks, else whoever asks."""
    if os.geteuid() == 0:
        unit = machine.path("usr/local/lib/systemd/system/latentd.service")
        service = machine.user("latentd", ("video", "render")) if unit.exists() else None
        if service is not None:
            return service
    name = next((row[0] for row in machine._rows("etc/passwd", 4) if int(row[2]) == os.geteuid()), str(os.geteuid()))
    return User(name, os.geteuid(), frozenset({os.getegid(), *os.getgroups()}))


def is_device_or_file(path: Path) -> bool:
    """Whether there is a node: a device on a machine, a plain file in a tree that imitates one."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return stat.S_ISCHR(mode) or stat.S_ISREG(mode)


def free_disk(machine: Machine, path: Path) -> Disk:
    """Of the nearest folder above the path that is there."""
    folders = (machine.path(str(folder)) for folder in (path, *path.parents))
    return machine.disk(next((folder for folder in folders if folder.exists()), machine.root))
