"""The service's life under a real systemd: started, taught, killed, stuck, changed, stopped, upgraded, removed."""

from __future__ import annotations

import re
import shutil
import time
from pathlib import Path
from typing import Dict, Set

import pytest

from systemd.conftest import Drop, decisions
from systemd.container import LATENTD, Container

pytestmark = pytest.mark.systemd

STUCK = "ExecStart=\nExecStart=/opt/latentd/bin/python /opt/test/stuck.py serve"
DOCS = Path(__file__).parents[2] / "docs/service.md"
UNITS = "/usr/local/lib/systemd/system"


def restarted(container: Container, old_pid: str) -> str:
    """The new process, once the service is up again."""

    def up() -> str:
        pid = container.show("MainPID")
        return pid if pid not in ("0", old_pid) and container.show("ActiveState") == "active" else ""

    found: str = container.until(up, "the service to be up again")
    return found


def files(folder: Path) -> Dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_it_is_ready_when_the_installation_ends_and_comes_back_at_every_boot(system: Container) -> None:
    assert system.show("ActiveState") == "active"
    status = system.latentd("status")
    assert status["readiness"]["ready"]
    assert "answers; version 0, 0 classes" in system.show("StatusText")
    assert system.call("systemctl", "is-enabled", "latentd").strip() == "enabled"
    assert system.show("User") == "latentd"
    uid = system.call("ps", "-o", "user=", "-p", system.show("MainPID")).strip()
    assert uid == "latentd"
    assert "<6>" not in system.journal()
    assert "listening on http://127.0.0.1:8420" in system.journal("--priority=info..info")
    doctor = system.call(LATENTD, "doctor", check=False)
    assert "latentd answers at http://127.0.0.1:8420" in doctor
    assert re.search(r"state folder +ok +/var/lib/latentd, open to latentd", doctor), doctor


def test_the_unit_is_clean_and_closed(system: Container) -> None:
    assert system.call("systemd-analyze", "verify", f"{UNITS}/latentd.service", f"{UNITS}/latentd.socket") == ""
    exposure = system.call("systemd-analyze", "security", "--no-pager", "--threshold=40", "latentd.service")
    found = re.search(r"Overall exposure level for latentd.service: ([\d.]+)", exposure)
    assert found
    assert float(found.group(1)) <= 4.0


def test_killed_it_comes_back_and_knows_all_that_it_was_taught(taught: Container) -> None:
    before, pid = decisions(taught, range(10, 14)), taught.show("MainPID")
    taught.call("systemctl", "kill", "--signal=SIGKILL", "latentd")
    restarted(taught, pid)
    assert decisions(taught, range(10, 14)) == before
    samples = taught.latentd("samples")["samples"]
    assert [(sample["label"], sample["state"]) for sample in samples] == [("discs", "learned")] * 3 + [("stripes", "learned")] * 3


def test_an_idle_one_feeds_the_watchdog_and_a_stuck_one_is_killed_by_it(bare: Container, drop_in: Drop) -> None:
    drop_in(f"WatchdogSec=10\n{STUCK}")
    bare.call(LATENTD, "service", "install")
    pid = bare.show("MainPID")
    fed: Set[str] = set()

    def feedings() -> int:
        fed.add(bare.show("WatchdogTimestampMonotonic"))
        return len(fed)

    bare.until(lambda: feedings() > 6, "an idle daemon to feed the watchdog")
    assert (bare.show("MainPID"), bare.show("NRestarts")) == (pid, "0")
    bare.call("touch", "/run/hold-the-engine")
    bare.until(lambda: "Watchdog timeout" in bare.journal(), "the watchdog")
    bare.call("rm", "/run/hold-the-engine")
    restarted(bare, pid)
    assert bare.latentd("status")["readiness"]["ready"]
    assert "in held" in bare.journal(), "it says where the thread stood"


def test_a_changed_configuration_is_taken_on_and_a_broken_one_is_not(system: Container) -> None:
    config, pid = system.root / "etc/latentd/config.toml", system.show("MainPID")
    text = config.read_text()
    config.write_text(text.replace("[learn]\n", "[learn]\nseed = 7\nmax_lag_samples = 99\n") + '\n[log]\nlevel = "debug"\n')
    system.call("systemctl", "reload", "latentd")
    status = system.until(lambda: system.latentd("status")["needs_restart"] and system.latentd("status"), "the reload")
    assert status["needs_restart"] == ["learn.seed"]
    assert status["queues"]["learner"]["capacity"] == 99
    assert system.show("StatusText").endswith("restart needed for learn.seed")
    config.write_text("[lern]\nseed = 1\n")
    system.call("systemctl", "reload", "latentd")
    system.until(lambda: "stays as it was" in system.journal("--priority=err"), "the error of the broken file")
    running = system.latentd("status", "--url", "http://127.0.0.1:8420")
    assert running["queues"]["learner"]["capacity"] == 99
    assert (system.show("ActiveState"), system.show("MainPID")) == ("active", pid)


def test_it_stops_in_time_in_the_middle_of_learning_and_loses_nothing(bare: Container) -> None:
    config = bare.root / "etc/latentd/config.toml"
    text = config.read_text().replace("[learn]\n", "[learn]\nminibatch = 8\nepochs = 100.0\n")
    config.write_text(text + "\n[http]\nmax_images = 128\n")
    bare.call(LATENTD, "service", "install")
    bare.call(LATENTD, "learn", "--no-wait", "/root/photos")
    assert bare.latentd("status")["learner"]["state"] in ("learning", "yielding")
    began = time.monotonic()
    bare.call("systemctl", "stop", "latentd")
    assert time.monotonic() - began < 30
    assert bare.show("Result") == "success"
    assert "in the middle of a request" in bare.journal()
    bare.call("systemctl", "start", "latentd")
    assert bare.latentd("status")["samples"] == 80


def test_an_upgrade_touches_neither_configuration_nor_what_was_taught(taught: Container, drop_in: Drop, newer_wheel: Path) -> None:
    drop_in("CPUWeight=50")
    etc, pid = files(taught.root / "etc/latentd"), taught.show("MainPID")
    mine = (taught.root / "etc/systemd/system/latentd.service.d/mine.conf").read_text()
    before = decisions(taught, range(10, 14))
    shutil.copy(str(newer_wheel), str(taught.root / "opt/wheels"))
    taught.call("/opt/latentd/bin/python", "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", f"/opt/wheels/{newer_wheel.name}")
    taught.call(LATENTD, "service", "install")
    restarted(taught, pid)
    assert taught.latentd("status")["latentd"] == "99.0.0"
    assert files(taught.root / "etc/latentd") == etc
    assert (taught.root / "etc/systemd/system/latentd.service.d/mine.conf").read_text() == mine
    assert taught.show("CPUWeight") == "50"
    assert decisions(taught, range(10, 14)) == before


def test_a_second_installation_does_not_enable_what_was_disabled(system: Container) -> None:
    system.call("systemctl", "disable", "--now", "latentd")
    system.call(LATENTD, "service", "install")
    assert system.show("ActiveState") == "inactive"
    assert system.call("systemctl", "is-enabled", "latentd", check=False).strip() == "disabled"


def test_a_first_installation_that_failed_is_completed_by_the_next(bare: Container, drop_in: Drop) -> None:
    drop_in("ExecStart=\nExecStart=/bin/false\nRestartSec=100ms")
    bare.call(LATENTD, "service", "install", check=False)
    bare.until(lambda: bare.show("ActiveState") == "failed", "systemd to give it up")
    drop_in("")
    bare.call(LATENTD, "service", "install")
    assert bare.show("ActiveState") == "active"
    assert bare.call("systemctl", "is-enabled", "latentd").strip() == "enabled"


def test_uninstalling_keeps_what_was_taught_and_purging_does_not(taught: Container) -> None:
    taught.call(LATENTD, "service", "uninstall")
    assert taught.show("LoadState") == "not-found"
    assert not list((taught.root / UNITS.lstrip("/")).glob("latentd*"))
    assert (taught.root / "var/lib/latentd/journal.sqlite").exists()
    assert (taught.root / "etc/latentd/config.toml").exists()
    taught.call(LATENTD, "service", "install")
    assert taught.latentd("status")["samples"] == 6
    taught.call(LATENTD, "service", "uninstall", "--purge-state")
    assert not (taught.root / "var/lib/latentd").exists()
    assert "latentd" not in (taught.root / "etc/passwd").read_text()
    assert (taught.root / "etc/latentd/config.toml").exists()


def test_as_documented_systemd_holds_the_port_and_starts_it_at_the_first_call(taught: Container) -> None:
    (commands,) = re.findall(r"^  ```bash\n((?:  sudo systemctl .*\n)+)", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
    assert "enable --now latentd.socket" in commands
    taught.call("sh", "-ec", commands.replace("sudo ", ""))
    assert taught.show("ActiveState", "latentd.socket") == "active"
    assert taught.latentd("status")["samples"] == 6
    taught.call("systemctl", "stop", "latentd")
    assert taught.show("ActiveState") == "inactive"
    assert taught.latentd("status")["samples"] == 6
    assert taught.show("ActiveState") == "active"
