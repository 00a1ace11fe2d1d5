"""What installing and removing the systemd service does, as a list of steps: each a sentence, and the act behind it.

The unit goes to /usr/local/lib, never to /etc: a change of a user's is a drop-in in /etc/systemd/system, which nothing here touches, nor
/etc/latentd. Steps are planned from what is there, so a second run has few or none, and one after a failure does what the first did not.
Only the thread of the verb; blocks on systemctl.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import stat
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import latentd
from latentd.cli.doctor.machine import Machine
from latentd.errors import InstallError
from latentd.files import replacing
from latentd.service.notify import LONGEST_START_S

SOURCES = Path(latentd.__file__).parent / "units"
USER = "latentd"
SERVICE, SOCKET = "latentd.service", "latentd.socket"
UNIT_FOLDER = "usr/local/lib/systemd/system"
JETSON, RENDER = f"{SERVICE}.d/20-jetson.conf", f"{SERVICE}.d/30-render.conf"
EXAMPLES = tuple(f"{SERVICE}.d/{name}.conf.example" for name in ("50-memory", "50-cpu", "60-network"))
UNFINISHED = f"{SERVICE}.d/unfinished"  # there from the first step of a first installation until the service is enabled
SYSUSERS = "usr/local/lib/sysusers.d/latentd.conf"
STATE, CACHE = "var/lib/latentd", "var/cache/latentd"
HOMES = ("/home", "/root", "/run/user")  # ProtectHome= hides them from the service
TIMEOUT_S = LONGEST_START_S + 300.0  # systemctl returns when the old one has stopped and the new one is ready

Run = Callable[[Sequence[str]], None]


class Step(NamedTuple):
    """One thing to do, and the sentence that says so."""

    sentence: str
    act: Callable[[], object]


@dataclass(frozen=True)
class Host:
    """The machine, or a folder that holds its root. run: runs a command, raising InstallError when it fails."""

    root: Path
    run: Run

    @property
    def is_live(self) -> bool:
        """Whether this is the running machine, and systemd runs it."""
        return self.root == Path("/") and self.path("run/systemd/system").is_dir()

    def path(self, inside: str) -> Path:
        return self.root / inside

    def systemctl(self, *arguments: str) -> None:
        self.run(["systemctl", *([] if self.root == Path("/") else [f"--root={self.root}"]), *arguments])

    def has(self, file: str, name: str) -> bool:
        """Whether etc/passwd or etc/group has an entry of this name."""
        try:
            lines = self.path(file).read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return False
        return any(line.split(":")[0] == name for line in lines)

    @property
    def is_enabled(self) -> bool:
        """Whether the service is started at every boot."""
        try:
            self.systemctl("is-enabled", SERVICE)
        except InstallError:
            return False
        return True

    @property
    def is_jetson(self) -> bool:
        return Machine(self.root).is_tegra


def run(command: Sequence[str]) -> None:
    """Runs a command of the system; InstallError with its last words when it fails or is not there."""
    try:
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=TIMEOUT_S)
    except subprocess.CalledProcessError as failed:
        words = failed.stderr.decode("utf-8", "replace").strip() or f"exit code {failed.returncode}"
        raise InstallError(f"{' '.join(command)}: {words}") from failed
    except (OSError, subprocess.TimeoutExpired) as cause:
        raise InstallError(f"{' '.join(command)}: {cause}") from cause


# --- installing -------------------------------------------------------------------------------------------------------


def check_reachable(host: Host, paths: Sequence[Path]) -> None:
    """Raises InstallError where the service's user could not get at a path: in a home, or below a folder that is closed to others."""
    for path in paths:
        if str(path).startswith(tuple(f"{home}/" for home in HOMES)):
            raise InstallError(
                f"{path} lies in a home folder, which the service is not allowed to see.",
                hint="Install latentd where every user can read it, /opt/latentd for example: deploy/install.sh does.",
            )
        for folder in path.parents:
            inside = host.path(str(folder).lstrip("/"))
            if inside.is_dir() and not inside.stat().st_mode & stat.S_IXOTH:
                raise InstallError(f"{folder} is closed to user {USER}, who has to reach {path}.", hint=f"chmod o+x {folder}")


def interpreter_of(program: Path) -> Optional[Path]:
    """What runs a script, by its first line and with links followed; None where that can't be told."""
    try:
        with program.open("rb") as stream:
            found = re.match(rb"#!\s*(/\S+)", stream.readline(4096))
    except OSError:
        return None
    return Path(os.fsdecode(found.group(1))).resolve() if found else None


def install_steps(host: Host, executable: Path, start: bool) -> List[Step]:
    """What is still to do. executable: of latentd, as the service will see it."""
    mark = host.path(f"{UNIT_FOLDER}/{UNFINISHED}")
    is_first = mark.exists() or not host.path(f"{UNIT_FOLDER}/{SERVICE}").exists() or _never_began(host)
    files = [(f"{UNIT_FOLDER}/{UNFINISHED}", "latentd service install\n")] if is_first else []
    steps = [step for name, text in [*files, *_files(host, executable)] for step in _file_step(host, name, text)]
    if not host.has("etc/passwd", USER):
        steps.append(Step(f"make the system user {USER}", lambda: host.run(_sysusers(host))))
    if host.is_live:
        steps.append(Step("have systemd read its units again", lambda: host.systemctl("daemon-reload")))
    if is_first:
        steps.append(Step(f"start {SERVICE} at every boot", lambda: host.systemctl("enable", SERVICE)))
        steps.append(Step(f"remove {mark}", mark.unlink))
    return [*steps, _start_step(host, is_first)] if start and host.is_live else steps


def _never_began(host: Host) -> bool:
    """Whether an installation that left no mark was not completed: neither enabled nor ever started, which makes the state folder."""
    return not host.path(STATE).exists() and not host.is_enabled


def _start_step(host: Host, is_first: bool) -> Step:
    """What is not started at every boot, by somebody's wish, is not started by an upgrade either."""
    if is_first or host.is_enabled:
        return Step(f"start {SERVICE} anew, which may take minutes: journalctl -fu latentd tells", lambda: _restart(host))
    return Step(f"restart {SERVICE} if it runs", lambda: host.systemctl("try-restart", SERVICE))


def _restart(host: Host) -> None:
    with suppress(InstallError):  # it never ran
        host.systemctl("reset-failed", SERVICE)  # else one that failed too often would not be started
    host.systemctl("restart", SERVICE)


def _files(host: Host, executable: Path) -> Iterator[Tuple[str, Optional[str]]]:
    """Path inside the root, and the content; None: it must not be there."""
    service = _text(SOURCES / SERVICE).replace("ExecStart=/opt/latentd/bin/latentd ", f"ExecStart={executable} ")
    yield f"{UNIT_FOLDER}/{SERVICE}", service
    for name in (SOCKET, *EXAMPLES):
        yield f"{UNIT_FOLDER}/{name}", _text(SOURCES / name)
    yield f"{UNIT_FOLDER}/{JETSON}", _text(SOURCES / JETSON) if host.is_jetson else None
    yield f"{UNIT_FOLDER}/{RENDER}", _text(SOURCES / RENDER) if host.has("etc/group", "render") else None
    yield SYSUSERS, _text(SOURCES / "latentd.sysusers")


def _file_step(host: Host, name: str, text: Optional[str]) -> Iterator[Step]:
    path = host.path(name)
    if text is None:
        if path.exists():
            yield Step(f"remove {path}", path.unlink)
    elif not path.is_file() or _text(path) != text:
        yield Step(f"write {path}", lambda: _write(path, text))


def _write(path: Path, text: str) -> None:
    """The file, whole or not at all, readable to all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as unfinished:
            unfinished.write_text(text, encoding="utf-8")
            unfinished.chmod(0o644)
    except OSError as cause:
        raise InstallError(f"{path} can't be written: {cause.strerror or cause}") from cause


def _sysusers(host: Host) -> List[str]:
    return ["systemd-sysusers", *([] if host.root == Path("/") else [f"--root={host.root}"]), Path(SYSUSERS).name]


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


# --- removing ---------------------------------------------------------------------------------------------------------


def uninstall_steps(host: Host, purge: bool) -> List[Step]:
    """What is there to remove. purge: also what was taught, the caches and the user; /etc/latentd stays in any case."""
    ours = [host.path(f"{UNIT_FOLDER}/{name}") for name in (SERVICE, SOCKET, UNFINISHED, JETSON, RENDER, *EXAMPLES)] + [host.path(SYSUSERS)]
    there = [path for path in ours if path.exists()]
    units = [path.name for path in there if path.name in (SERVICE, SOCKET)]
    steps = []
    if units:
        now = ["--now"] if host.is_live else []
        steps.append(Step(f"stop and disable {' and '.join(units)}", lambda: host.systemctl("disable", *now, *units)))
    steps += [Step(f"remove {path}", path.unlink) for path in there]
    folder = host.path(f"{UNIT_FOLDER}/{SERVICE}.d")
    if folder.is_dir() and all(path in there for path in folder.iterdir()):
        steps.append(Step(f"remove {folder}", folder.rmdir))
    if there and host.is_live:
        steps.append(Step("have systemd read its units again", lambda: host.systemctl("daemon-reload")))
    return steps + (list(_purge_steps(host)) if purge else [])


def _purge_steps(host: Host) -> Iterator[Step]:
    for name in (STATE, CACHE):
        path = host.path(name)
        if path.is_symlink():
            yield Step(f"remove the link {path}; what it points to stays", path.unlink)
        elif path.is_dir():
            yield Step(f"remove {path} and all that is in it", functools.partial(shutil.rmtree, path))
    if host.has("etc/passwd", USER):
        root = [] if host.root == Path("/") else ["--root", str(host.root)]
        yield Step(f"remove the user {USER}", lambda: host.run(["userdel", *root, USER]))
