"""Root folders that imitate a Xavier NX and a laptop, and users who may and may not."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict

from latentd.cli.doctor import board
from latentd.cli.doctor.machine import Disk, Machine, User
from latentd.config import Config, HttpConfig, StateConfig

NX: Dict[str, str] = {
    "proc/device-tree/model": "NVIDIA Jetson Xavier NX Developer Kit\0",
    "proc/device-tree/compatible": "nvidia,p3449-0000+p3668-0001\0nvidia,tegra194\0",
    "proc/meminfo": "MemTotal:        6996988 kB\nMemFree: 1 kB\nMemAvailable:    4194304 kB\nSwapTotal:       3498484 kB\n",
    "etc/nv_tegra_release": "# R35 (release), REVISION: 6.5, GCID: 32790763, BOARD: t186ref, EABI: aarch64\n",
    "etc/passwd": "root:x:0:0::/root:/bin/bash\nlatentd:x:997:997::/var/lib/latentd:/usr/sbin/nologin\n",
    "etc/group": "root:x:0:\nvideo:x:44:nvidia\nlatentd:x:997:\n",
    "sys/class/thermal/thermal_zone0/type": "CPU-therm",
    "sys/class/thermal/thermal_zone0/temp": "41500",
    **{f"dev/{name}": "" for name in board.JETSON_NODES},
    **{
        f"sys/bus/i2c/drivers/ina3221/7-0040/hwmon/hwmon4/{name}": value
        for name, value in {"in1_label": "VDD_IN", "in1_input": "5000", "curr1_input": "1000"}.items()
    },
}
LAPTOP = {"proc/meminfo": "MemTotal: 16000000 kB\nMemAvailable: 8000000 kB\nSwapTotal: 0 kB\n", "sys/class/dmi/id/product_name": "T14"}


def tree(root: Path, files: Dict[str, str]) -> Machine:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        if name.startswith("dev/"):
            path.chmod(0o660)
    disk = Disk(50 << 30, False)
    return Machine(root, lambda path: disk, package=lambda name: None, output=lambda command: "", imports=lambda name, environ: None)


def member_of(path: Path) -> User:
    """A user who is in the group of this file, and does not own it."""
    return User("ann", 54321, frozenset({path.stat().st_gid}))


STRANGER = User("ann", 54321, frozenset({54321}))


def configured(machine: Machine, **http: Any) -> Config:
    state = StateConfig(dir="/var/lib/latentd", cache_dir=str(machine.root / "cache"))
    return Config(http=HttpConfig(**http), state=state, origins={"http.bind": "config.toml"})
