"""Checks of where things are kept: the state folder and all above it, disk, memory, swap."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Tuple

from latentd import headroom
from latentd.cli.doctor.machine import BROKEN, ENTER, NOTE, OK, READ, WRITE, Finding, Machine, User, free_disk
from latentd.config import Config

GIB = 1 << 30
LEAST_MEMORY = GIB // 2  # the daemon with the default backbone needs about that much
LEAST_DISK = GIB // 4


def state_folder(machine: Machine, config: Config, user: User) -> Finding:
    """Whether the user reaches and writes it. A folder above that is closed is the fault that is hardest to see."""
    found, fix = _fault(machine, config.state_dir, user)
    if found:
        return Finding("state folder", BROKEN, found, fix)
    here = machine.path(str(config.state_dir))
    if not here.exists():
        return Finding("state folder", OK, f"{config.state_dir} is made at the first start")
    linked = f" (a link to {here.resolve()})" if here.is_symlink() else ""
    return Finding("state folder", OK, f"{config.state_dir}{linked}, open to {user.name}")


def _fault(machine: Machine, path: Path, user: User) -> Tuple[str, str]:
    """What is wrong with the folder or one above it, and the remedy; two empty strings where nothing is."""
    for folder in (*reversed(path.parents), path):
        here = machine.path(str(folder))
        if here.is_symlink() and not here.exists():
            return f"{folder} is a link to {os.readlink(here)}, which is not there", f"Mend or remove {folder}"
        if not here.exists():
            return _missing(machine, path, folder.parent, user)
        if not here.is_dir():
            return f"{folder} is no folder", "Move it away, or name another folder in state.dir"
        if folder != path and not user.may(here, ENTER):
            return f"{folder} is closed to {user}, who has to reach {path}", f"sudo chmod o+x {folder}"
    return _contents(machine.path(str(path)), path, user)


def _missing(machine: Machine, path: Path, above: Path, user: User) -> Tuple[str, str]:
    if user.may(machine.path(str(above)), WRITE | ENTER) or user.name == "latentd":  # systemd makes the folders of its unit
        return "", ""
    return f"{path} is not there, and {user} can't make it in {above}", f"sudo install -d -o {user.name} {path}"


def _contents(here: Path, path: Path, user: User) -> Tuple[str, str]:
    remedy = f"sudo chown -R {user.name}: {path}"
    if not user.may(here, READ | WRITE | ENTER):
        return f"{path} can't be written by {user}", remedy
    try:
        closed = [each.name for each in sorted(here.iterdir()) if not user.may(each, READ | WRITE)]
    except PermissionError:  # the one who asks is neither root nor that user
        return "", ""
    return (f"{path}/{closed[0]} can't be written by {user}", remedy) if closed else ("", "")


def disk(machine: Machine, config: Config) -> Finding:
    """Free space where the journal grows: it may grow to its budget."""
    place = config.state_dir
    found = free_disk(machine, place)
    free = f"{found.free_bytes / GIB:.1f} GiB free for {place}"
    if found.read_only:
        return Finding("disk", BROKEN, f"{place} lies on a file system that is mounted read-only", "dmesg | tail: a card may be dying")
    if found.free_bytes < LEAST_DISK:
        return Finding("disk", BROKEN, f"{free}: teaching will be refused", "Make room: sudo journalctl --vacuum-size=100M, apt-get clean")
    if found.free_bytes < config.state.journal_bytes + LEAST_DISK:
        return Finding("disk", NOTE, f"{free}, less than state.journal_bytes may take", "Make room, or lower state.journal_bytes")
    return Finding("disk", OK, free)


def memory(machine: Machine, config: Config) -> Finding:
    """On a Jetson the GPU takes its memory from the same place, and a plan is built only where there is room for it."""
    found = headroom.meminfo(machine.root)
    if "MemAvailable" not in found:
        return Finding("memory", NOTE, "/proc/meminfo can't be read")
    available = found["MemAvailable"]
    sentence = f"{available / GIB:.1f} of {found.get('MemTotal', 0) / GIB:.1f} GiB available"
    if available < LEAST_MEMORY:
        return Finding("memory", BROKEN, f"{sentence}: too little to start", "Stop what takes it: ps -eo rss,comm --sort -rss | head")
    if machine.is_tegra and available < config.memory.build_bytes:
        fix = "Without a desktop there is 1 GiB more: sudo systemctl set-default multi-user.target, then reboot"
        return Finding("memory", NOTE, f"{sentence}, shared with the GPU: compiling the engine may have to wait", fix)
    return Finding("memory", OK, sentence)


def swap(machine: Machine) -> Finding:
    total = headroom.meminfo(machine.root).get("SwapTotal", 0)
    if total or not machine.is_tegra:
        return Finding("swap", OK, f"{total / GIB:.1f} GiB" if total else "none")
    fix = "sudo systemctl enable --now nvzramconfig, or a swap file on an SSD"
    return Finding("swap", NOTE, "none: a short peak of memory ends a process", fix)
