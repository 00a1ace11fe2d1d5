"""Checks of the board: what it is, the driver's nodes, sensors, power mode, clock."""

from __future__ import annotations

import re
import time
from typing import Any, Callable, Sequence

from latentd.cli.doctor.machine import BROKEN, NOTE, OK, READ, WRITE, Finding, Machine, User, is_device_or_file
from latentd.energy import thermal
from latentd.energy.board import power_mode as power_mode_of
from latentd.energy.meters.choose import choose_meter
from latentd.energy.meters.nvml import import_pynvml

# What CUDA opens; nvhost-prof-gpu, which NVIDIA's rules give to another group, is for profilers.
JETSON_NODES = ("nvmap", "nvhost-ctrl", "nvhost-ctrl-gpu", "nvhost-gpu", "nvhost-as-gpu")
JETSON_NEEDED = ("nvmap", "nvhost-ctrl-gpu")
PC_NODES = ("nvidiactl", "nvidia0", "nvidia-uvm")
OLDEST_NOW = 1735689600.0  # 2025-01-01: a clock before that was never set
SENSOR_S = 3.0


def board(machine: Machine) -> Finding:
    model = machine.text("proc/device-tree/model") or machine.text("sys/class/dmi/id/product_name") or "a computer without a name"
    if not machine.is_tegra:
        return Finding("board", OK, model)
    if machine.l4t is None:
        return Finding("board", OK, f"{model}; its L4T release is not told here, as in a container")
    if machine.l4t.startswith("35."):
        return Finding("board", OK, f"{model}, L4T {machine.l4t} (JetPack 5)")
    return Finding("board", NOTE, f"{model}, L4T {machine.l4t}; latentd was made for L4T 35 (JetPack 5) and may work here as well")


def driver(machine: Machine, user: User) -> Finding:
    """The nodes of the GPU's driver, and whether the user may open them. Without them CUDA falls back to the CPU, silently."""
    names = JETSON_NODES if machine.is_tegra else PC_NODES
    there = [machine.path(f"dev/{name}") for name in names if is_device_or_file(machine.path(f"dev/{name}"))]
    missing = [f"/dev/{name}" for name in JETSON_NEEDED if machine.is_tegra and machine.path(f"dev/{name}") not in there]
    if missing:
        fix = "In a container: docker run --runtime nvidia. Otherwise: sudo apt-get install --reinstall nvidia-l4t-core nvidia-l4t-cuda"
        return Finding("driver", BROKEN, f"{', '.join(missing)} not there: the GPU can't be used", fix)
    if not there:
        return Finding("driver", OK, "no NVIDIA driver here: latentd computes on the CPU")
    closed = [path for path in there if not user.may(path, READ | WRITE)]
    if closed:
        group = machine.group(closed[0].stat().st_gid)
        fix = f"sudo usermod -aG {group} {user.name}, then log in again (the unit has it as SupplementaryGroups=)"
        return Finding("driver", BROKEN, f"/dev/{closed[0].name} is closed to {user}; it belongs to group {group}", fix)
    return Finding("driver", OK, f"{len(there)} nodes, open to {user.name}")


def sensors(machine: Machine, meters: Sequence[str], load_nvml: Callable[[], Any] = import_pynvml) -> Finding:
    """Which meter would serve, and how warm it is."""
    until = time.monotonic() + SENSOR_S
    choice = choose_meter(
        meters,
        machine.root,
        clock=time.monotonic,
        wait=lambda seconds: _wait(seconds, until),
        load_nvml=load_nvml,
    )
    warmest = max((value for value in thermal.read(machine.root).values() if value is not None), default=None)
    warmth = "no temperature" if warmest is None else f"warmest zone {warmest:.0f} °C"
    if choice.meter is None:
        closed = "permission denied" in choice.reason
        fix = "sudo chmod a+r on the file that is named, at every boot; only the joules are missing" if closed else ""
        return Finding("sensors", NOTE, f"no power meter: {choice.reason}; {warmth}", fix)
    try:
        return Finding("sensors", OK, f"{choice.meter.source} measures {choice.meter.scope}; {warmth}")
    finally:
        choice.meter.close()


def _wait(seconds: float, until: float) -> bool:
    time.sleep(seconds)
    return time.monotonic() > until


def power_mode(machine: Machine) -> Finding:
    """The mode of a Jetson, by nvpmodel, which complains without root and tells the mode all the same; elsewhere the governor."""
    if not machine.is_tegra:
        governor = machine.text("sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
        return Finding("power mode", OK, f"processor governor {governor}" if governor else "this machine tells none")
    found = re.search(r"NV Power Mode:\s*(\S+)", machine.output(["nvpmodel", "-q"]))
    mode = found.group(1) if found else power_mode_of(machine.root)
    if mode is None:
        return Finding("power mode", NOTE, "nvpmodel does not tell the power mode", "sudo nvpmodel -q")
    if "10W" in mode:
        return Finding("power mode", NOTE, f"{mode}: the slowest modes of the board", "sudo nvpmodel -m 8, where 20 W are allowed")
    return Finding("power mode", OK, mode)


def clock(machine: Machine, now_s: float) -> Finding:
    """A board without a battery starts in the past; what was taught then carries a wrong date. Nothing else depends on it."""
    if now_s < OLDEST_NOW:
        date = time.strftime("%Y-%m-%d", time.gmtime(now_s))
        return Finding("clock", BROKEN, f"it says {date}: what is taught now gets a wrong date", "sudo timedatectl set-ntp true, or set it")
    synchronized = machine.path("run/systemd/timesync/synchronized").exists()
    return Finding("clock", OK, "set, and synchronized" if synchronized else "set")
