"""Installing the unit into a root of its own, with the system's commands written down instead of run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, List, Sequence

import pytest

from cli.conftest import Latentd
from latentd.cli import install as installing
from latentd.cli.install import CACHE, JETSON, RENDER, SERVICE, STATE, SYSUSERS, UNIT_FOLDER, Host, check_reachable
from latentd.errors import InstallError
from latentd.service.notify import LONGEST_START_S

BINARY = Path("/opt/latentd/bin/latentd")
UNITS = installing.SOURCES


class System:
    """A root in a folder; `commands` is what would have been run. fails: what a command that fails begins with."""

    def __init__(self, root: Path) -> None:
        self.root, self.commands, self.fails = root, [""][:0], "no command"
        self.is_enabled = False
        self.host = Host(root, self.run)
        (root / "etc").mkdir()
        (root / "etc/group").write_text("root:x:0:\nvideo:x:44:\n")
        (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")

    def run(self, command: Sequence[str]) -> None:
        line = " ".join(word for word in command if word != f"--root={self.root}" or command[0] != "systemctl")
        self.commands.append(line.replace(str(self.root), "ROOT"))
        if line.startswith(self.fails) or (line.startswith("systemctl is-enabled") and not self.is_enabled):
            raise InstallError(f"{line}: failed")
        if line.startswith(("systemctl enable", "systemctl disable")):
            self.is_enabled = "enable" in command
        if line.startswith("systemctl restart"):
            (self.root / STATE).mkdir(parents=True, exist_ok=True)
        if command[0] == "systemd-sysusers":
            with (self.root / "etc/passwd").open("a") as passwd:
                passwd.write("latentd:x:999:999::/var/lib/latentd:/usr/sbin/nologin\n")

    def take(self, steps: Sequence[installing.Step]) -> List[str]:
        for step in steps:
            step.act()
        return [step.sentence.replace(str(self.root), "") for step in steps]

    def install(self) -> List[str]:
        return self.take(installing.install_steps(self.host, BINARY, start=True))

    def uninstall(self, purge: bool = False) -> List[str]:
        return self.take(installing.uninstall_steps(self.host, purge))

    def unit(self, name: str = SERVICE) -> Path:
        return self.root / UNIT_FOLDER / name

    def files(self) -> List[str]:
        return sorted(str(path.relative_to(self.root)) for path in self.root.rglob("*") if path.is_file())


@pytest.fixture
def system(tmp_path: Path) -> System:
    (tmp_path / "root").mkdir()
    return System(tmp_path / "root")


def test_the_unit_goes_outside_etc_and_runs_the_latentd_that_installed_it(system: System) -> None:
    sentences = system.install()
    assert f"ExecStart={BINARY} serve\n" in system.unit().read_text()
    assert system.unit().stat().st_mode & 0o777 == 0o644
    assert [name for name in system.files() if name.startswith("etc/")] == ["etc/group", "etc/passwd"]
    assert system.commands == ["systemd-sysusers --root=ROOT latentd.conf", f"systemctl enable {SERVICE}"]
    assert "make the system user latentd" in sentences
    assert not system.unit(JETSON).exists()
    assert not system.unit(RENDER).exists()


def test_another_place_of_latentd_is_written_into_the_unit(system: System) -> None:
    system.take(installing.install_steps(system.host, Path("/srv/venv/bin/latentd"), start=True))
    text = system.unit().read_text()
    assert "ExecStart=/srv/venv/bin/latentd serve\n" in text
    assert "/opt/latentd" not in text


def test_a_second_installation_has_nothing_to_do(system: System) -> None:
    system.install()
    before = system.files()
    assert system.install() == []
    assert system.files() == before


def test_an_upgrade_brings_the_new_unit_and_leaves_enabled_what_was_enabled(system: System) -> None:
    system.install()
    system.unit().write_text("[Service]\nExecStart=/bin/old\n")
    (system.root / "etc/latentd").mkdir()
    (system.root / "etc/latentd/config.toml").write_text("[log]\nlevel = 'debug'\n")
    drop_in = system.root / f"etc/systemd/system/{SERVICE}.d/mine.conf"
    drop_in.parent.mkdir(parents=True)
    drop_in.write_text("[Service]\nCPUWeight=20\n")
    system.commands.clear()
    assert system.install() == [f"write /{UNIT_FOLDER}/{SERVICE}"]
    assert system.commands == [f"systemctl is-enabled {SERVICE}"], "neither enabled again nor another user"
    assert "Type=notify" in system.unit().read_text()
    assert (system.root / "etc/latentd/config.toml").read_text() == "[log]\nlevel = 'debug'\n"
    assert drop_in.read_text() == "[Service]\nCPUWeight=20\n"


def test_a_jetson_and_a_render_group_get_their_drop_ins_and_lose_them_again(system: System) -> None:
    (system.root / "etc/nv_tegra_release").write_text("# R35 (release), REVISION: 3.1, GCID: 1, BOARD: t186ref\n")
    (system.root / "etc/group").write_text("video:x:44:\nrender:x:104:\n")
    system.install()
    assert "LD_PRELOAD=" in system.unit(JETSON).read_text()
    assert "SupplementaryGroups=render" in system.unit(RENDER).read_text()
    (system.root / "etc/group").write_text("video:x:44:\n")
    assert system.install() == [f"remove /{UNIT_FOLDER}/{RENDER}"]


@pytest.fixture
def live(system: System, monkeypatch: pytest.MonkeyPatch) -> System:
    """… on which systemd runs."""
    monkeypatch.setattr(Host, "is_live", True)
    return system


START = [f"systemctl reset-failed {SERVICE}", f"systemctl restart {SERVICE}"]


def test_a_running_systemd_is_told_and_the_service_started(live: System) -> None:
    live.install()
    assert live.commands[1:] == ["systemctl daemon-reload", f"systemctl enable {SERVICE}", *START]
    live.commands.clear()
    live.unit().write_text("old")
    live.install()
    assert live.commands == [f"systemctl is-enabled {SERVICE}", "systemctl daemon-reload", *START], "whether it runs, failed or ended"


def test_what_was_disabled_is_neither_enabled_nor_started_by_an_upgrade(live: System) -> None:
    live.install()
    live.run(["systemctl", "disable", "--now", SERVICE])
    live.commands.clear()
    live.install()
    assert live.commands == [f"systemctl is-enabled {SERVICE}", "systemctl daemon-reload", f"systemctl try-restart {SERVICE}"]


@pytest.mark.parametrize("fails", ["systemd-sysusers", "systemctl daemon-reload", "systemctl enable", "systemctl restart"])
def test_a_first_installation_that_failed_is_completed_by_the_next(live: System, fails: str) -> None:
    live.fails = fails
    with pytest.raises(InstallError):
        live.install()
    live.fails = "no command"
    live.commands.clear()
    live.install()
    assert live.is_enabled
    assert "systemctl daemon-reload" in live.commands
    assert live.commands[-2:] == START


def test_a_first_installation_that_was_cut_off_after_any_step_is_completed_by_the_next(live: System, tmp_path: Path) -> None:
    for taken in range(1 + len(installing.install_steps(live.host, BINARY, start=True))):
        (tmp_path / str(taken)).mkdir()
        system = System(tmp_path / str(taken))
        steps = installing.install_steps(system.host, BINARY, start=True)
        system.take(steps[:taken])
        system.commands.clear()
        system.install()
        assert (system.is_enabled, system.commands[-2:]) == (True, START), steps[:taken][-1:]
        assert not system.unit(installing.UNFINISHED).exists()


def test_a_first_installation_that_failed_without_a_mark_is_completed_where_the_service_never_ran(live: System) -> None:
    """As the version before the mark left it."""
    live.fails = "systemctl enable"
    with pytest.raises(InstallError):
        live.install()
    live.unit(installing.UNFINISHED).unlink()
    live.fails = "no command"
    live.install()
    assert (live.is_enabled, live.commands[-2:]) == (True, START)
    assert not live.unit(installing.UNFINISHED).exists()


def test_a_service_that_never_ran_has_no_failure_to_forget(live: System) -> None:
    live.fails = "systemctl reset-failed"
    live.install()
    assert live.commands[-1] == f"systemctl restart {SERVICE}"


def test_a_first_start_may_take_as_long_as_the_daemon_asks_the_manager_for() -> None:
    assert installing.TIMEOUT_S > LONGEST_START_S + 150, "and the one that ran before has 150 s to stop"


def test_uninstalling_keeps_what_was_taught_and_the_configuration(system: System) -> None:
    system.install()
    for kept in (f"{STATE}/journal.sqlite", f"{CACHE}/backbones/w", "etc/latentd/config.toml"):
        (system.root / kept).parent.mkdir(parents=True, exist_ok=True)
        (system.root / kept).write_text("kept")
    system.commands.clear()
    system.uninstall()
    assert system.commands == [f"systemctl disable {SERVICE} latentd.socket"]
    assert system.files() == sorted(
        ["etc/group", "etc/passwd", "etc/latentd/config.toml", f"{STATE}/journal.sqlite", f"{CACHE}/backbones/w"]
    )
    assert not (system.root / UNIT_FOLDER / f"{SERVICE}.d").exists()
    assert system.uninstall() == []


def test_a_users_own_drop_in_beside_ours_survives(system: System) -> None:
    system.install()
    mine = system.unit(f"{SERVICE}.d/90-mine.conf")
    mine.write_text("[Service]\n")
    system.uninstall()
    assert mine.exists()


def test_what_was_taught_goes_only_when_told(system: System) -> None:
    system.install()
    (system.root / STATE).mkdir(parents=True)
    (system.root / STATE / "journal.sqlite").write_text("taught")
    elsewhere = system.root / "mnt"
    elsewhere.mkdir()
    (elsewhere / "weights").write_text("big")
    (system.root / "var/cache").mkdir()
    (system.root / CACHE).symlink_to(elsewhere)
    system.uninstall(purge=True)
    assert not (system.root / STATE).exists()
    assert not (system.root / CACHE).is_symlink()
    assert (elsewhere / "weights").exists(), "a link is removed, not what it points to"
    assert system.commands[-1] == "userdel --root ROOT latentd"


@pytest.mark.parametrize("place", ["/root/venv/bin/latentd", "/home/ann/.venv/bin/latentd"])
def test_a_latentd_in_a_home_is_refused_because_the_service_could_not_see_it(system: System, place: str) -> None:
    with pytest.raises(InstallError, match="home folder") as refused:
        check_reachable(system.host, [Path(place)])
    assert "/opt/latentd" in refused.value.hint


def test_a_closed_folder_on_the_way_is_named(system: System) -> None:
    (system.root / "opt/mine/bin").mkdir(parents=True)
    (system.root / "opt/mine").chmod(0o700)
    with pytest.raises(InstallError, match="/opt/mine is closed") as refused:
        check_reachable(system.host, [Path("/opt/mine/bin/latentd")])
    assert refused.value.hint == "chmod o+x /opt/mine"
    (system.root / "opt/mine").chmod(0o755)
    check_reachable(system.host, [Path("/opt/mine/bin/latentd")])


def test_a_command_that_fails_is_told_with_its_last_words() -> None:
    with pytest.raises(InstallError, match="sh -c echo no systemd >&2; exit 3: no systemd"):
        installing.run(["sh", "-c", "echo no systemd >&2; exit 3"])
    with pytest.raises(InstallError, match="no-such-command"):
        installing.run(["no-such-command"])


# --- the verb ---------------------------------------------------------------------------------------------------------


def test_a_dry_run_says_the_steps_and_changes_nothing(latentd: Latentd, system: System) -> None:
    before = system.files()
    ran = latentd("service", "install", "--dry-run", "--root", str(system.root), "--exec", str(BINARY))
    assert (ran.code, ran.err) == (0, "")
    assert all(line.startswith("would ") for line in ran.out.splitlines())
    assert f"would write {system.root}/{UNIT_FOLDER}/{SERVICE}" in ran.out.splitlines()
    assert system.files() == before
    steps = latentd("service", "install", "--dry-run", "--root", str(system.root), "--json").json
    assert steps["dry_run"] is True
    assert len(steps["steps"]) == len(ran.out.splitlines())


def test_the_verbs_install_and_remove(latentd: Latentd, system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installing, "run", system.run)
    assert latentd("service", "install", "--root", str(system.root)).code == 0
    assert system.unit().exists()
    assert latentd("service", "install", "--root", str(system.root)).out == "Nothing to do.\n"
    (system.root / STATE).mkdir(parents=True)
    ran = latentd("service", "uninstall", "--root", str(system.root))
    assert ran.code == 0
    assert f"Kept: {system.root / STATE}." in ran.err
    assert not system.unit().exists()


@pytest.mark.parametrize("arguments", [["install"], ["uninstall"], ["uninstall", "--purge-state"]])
def test_without_root_it_says_so_and_does_nothing(latentd: Latentd, monkeypatch: pytest.MonkeyPatch, arguments: List[str]) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    ran = latentd("service", *arguments)
    assert ran.code == 1
    assert "this needs root, and you are user 1000" in ran.err
    assert "sudo" in ran.err


def test_a_latentd_that_is_not_there_is_not_installed(latentd: Latentd, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("nothing may be run")

    monkeypatch.setattr(installing, "run", refuse)
    ran = latentd("service", "install", "--dry-run", "--exec", str(tmp_path / "latentd"))
    assert ran.code == 1
    assert "to run" in ran.err


def test_the_python_behind_the_latentd_to_run_must_be_reachable_too(
    latentd: Latentd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(host: Host, paths: Sequence[Path]) -> None:
        raise InstallError(" ".join(map(str, paths)))

    monkeypatch.setattr(installing, "check_reachable", refuse)
    (tmp_path / "home").touch()
    (tmp_path / "python").symlink_to(tmp_path / "home")
    program = tmp_path / "latentd"
    program.write_text(f"#!{tmp_path}/python -s\n")
    program.chmod(0o755)
    ran = latentd("service", "install", "--dry-run", "--exec", str(program))
    assert (ran.code, f"{program} {tmp_path}/home" in ran.err) == (1, True)


@pytest.mark.parametrize("start", [b"", b"\x7fELF\x02", b"#! usr/bin/python\n", b"\n"])
def test_a_program_that_tells_no_interpreter_has_none(tmp_path: Path, start: bytes) -> None:
    (tmp_path / "latentd").write_bytes(start)
    assert installing.interpreter_of(tmp_path / "latentd") is None
    assert installing.interpreter_of(tmp_path / "absent") is None


def test_every_unit_is_part_of_the_package() -> None:
    names = {str(path.relative_to(UNITS)) for path in UNITS.rglob("*") if path.is_file()}
    assert names == {SERVICE, installing.SOCKET, JETSON, RENDER, "latentd.sysusers", *installing.EXAMPLES}
    assert Path(SYSUSERS).name == "latentd.conf"


def test_the_unit_sees_no_packages_in_a_home_as_the_installer_does() -> None:
    assert "Environment=PYTHONNOUSERSITE=1" in (UNITS / SERVICE).read_text().splitlines()


def test_the_unit_has_no_line_that_cuda_forbids() -> None:
    lines = [line.strip() for line in (UNITS / SERVICE).read_text().splitlines() if "=" in line and not line.startswith("#")]
    keys = {line.split("=")[0] for line in lines}
    devices = {"PrivateDevices", "DevicePolicy", "DeviceAllow", "ProtectClock"}
    forbidden = {*devices, "MemoryDenyWriteExecute", "PrivateUsers", "ProcSubset", "PrivateNetwork"}
    assert not keys & forbidden
    comments = "\n".join(line for line in (UNITS / SERVICE).read_text().splitlines() if line.startswith("#"))
    assert all(f"{key}=" in comments for key in forbidden), "each is named with its reason"
