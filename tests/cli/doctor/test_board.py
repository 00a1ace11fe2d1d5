from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cli.doctor.trees import STRANGER, member_of, tree
from latentd.cli.doctor import board
from latentd.cli.doctor.machine import BROKEN, NOTE, OK, Finding, Machine


def test_the_board_is_told_by_the_device_tree_and_the_release_file(nx: Machine, laptop: Machine) -> None:
    assert board.board(nx) == Finding("board", OK, "NVIDIA Jetson Xavier NX Developer Kit, L4T 35.6.5 (JetPack 5)")
    assert board.board(laptop) == Finding("board", OK, "T14")
    (nx.root / "etc/nv_tegra_release").unlink()
    assert "container" in board.board(nx).detail
    assert board.board(nx).state == OK


def test_in_a_container_without_device_tree_and_release_file_the_kernel_tells_that_it_is_a_jetson(tmp_path: Path) -> None:
    container = tree(tmp_path, {"proc/sys/kernel/osrelease": "5.10.216-tegra\n"})
    assert container.is_tegra
    assert board.driver(container, STRANGER).state == BROKEN, "the runtime is missing, which CUDA never says"
    assert not tree(tmp_path, {"proc/sys/kernel/osrelease": "6.1.0-18-amd64\n"}).is_tegra


def test_a_release_that_nobody_has_seen_is_no_fault(nx: Machine) -> None:
    (nx.root / "etc/nv_tegra_release").write_text("# R99 (release), REVISION: 1.0, GCID: 1\n")
    assert (board.board(nx).state, "99.1.0" in board.board(nx).detail) == (NOTE, True)


def test_the_drivers_nodes_must_be_open_to_the_user(nx: Machine) -> None:
    assert board.driver(nx, member_of(nx.root / "dev/nvmap")).state == OK
    closed = board.driver(nx, STRANGER)
    assert closed.state == BROKEN
    assert "/dev/nvmap is closed to ann (uid 54321, gids 54321)" in closed.detail
    assert "usermod -aG" in closed.fix


def test_a_closed_node_is_told_with_the_name_of_its_group(nx: Machine) -> None:
    gid = (nx.root / "dev/nvmap").stat().st_gid
    tree(nx.root, {"etc/group": f"video:x:44:\ngraphics:x:{gid}:\n"})
    found = board.driver(nx, STRANGER)
    assert found.detail.endswith("it belongs to group graphics")
    assert found.fix.startswith("sudo usermod -aG graphics ann")


def test_the_node_for_profilers_may_be_closed(nx: Machine) -> None:
    """NVIDIA's rules give nvhost-prof-gpu to the group debug, whose members CUDA does not ask for."""
    tree(nx.root, {"dev/nvhost-prof-gpu": "", "etc/group": "video:x:44:\ndebug:x:999:\n"})
    member = member_of(nx.root / "dev/nvmap")
    (nx.root / "dev/nvhost-prof-gpu").chmod(0o000)
    assert board.driver(nx, member).state == OK


def test_nodes_that_are_missing_are_named_with_the_container_remedy(nx: Machine) -> None:
    (nx.root / "dev/nvhost-ctrl-gpu").unlink()
    found = board.driver(nx, STRANGER)
    assert (found.state, "/dev/nvhost-ctrl-gpu not there" in found.detail) == (BROKEN, True)
    assert "--runtime nvidia" in found.fix


def test_a_laptop_without_an_nvidia_card_is_fine_and_one_with_a_closed_node_is_not(laptop: Machine) -> None:
    assert board.driver(laptop, STRANGER).state == OK
    (laptop.root / "dev").mkdir()
    (laptop.root / "dev/nvidiactl").touch(0o600)
    assert board.driver(laptop, STRANGER).state == BROKEN


def test_the_meter_and_the_temperature_are_told(nx: Machine) -> None:
    found = board.sensors(nx, ("ina3221", "rapl"))
    assert found.state == OK
    assert found.detail.startswith("ina3221 measures all that the module takes in (VDD_IN)")
    assert found.detail.endswith("warmest zone 42 °C")


def test_no_meter_is_a_note_with_every_reason(laptop: Machine) -> None:
    found = board.sensors(laptop, ("ina3221", "tegrastats", "rapl"))
    assert found.state == NOTE
    assert "INA3221" in found.detail
    assert "RAPL" in found.detail
    assert found.detail.endswith("no temperature")


@pytest.mark.parametrize(
    ("said", "state", "detail"),
    [
        ("NVPM ERROR: Error opening /sys/kernel/x: 13\nNV Fan Mode:quiet\nNV Power Mode: MODE_20W_6CORE\n8\n", OK, "MODE_20W_6CORE"),
        ("NV Power Mode: MODE_10W_DESKTOP\n5\n", NOTE, "MODE_10W_DESKTOP"),
        ("", NOTE, "nvpmodel does not tell"),
    ],
)
def test_the_power_mode_is_read_from_what_nvpmodel_says(nx: Machine, said: str, state: str, detail: str) -> None:
    found = board.power_mode(replace(nx, output=lambda command: said))
    assert (found.state, detail in found.detail) == (state, True)
    assert bool(found.fix) == (state != OK)


def test_where_nvpmodel_says_nothing_its_file_does(nx: Machine) -> None:
    tree(nx.root, {"var/lib/nvpmodel/status": "pmode:0008"})
    assert board.power_mode(replace(nx, output=lambda command: "")) == Finding("power mode", OK, "mode 8")


def test_a_laptop_tells_its_governor(laptop: Machine) -> None:
    assert board.power_mode(laptop).state == OK
    tree(laptop.root, {"sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "powersave\n"})
    assert board.power_mode(laptop).detail == "processor governor powersave"


def test_a_clock_that_was_never_set_is_found(nx: Machine) -> None:
    assert board.clock(nx, 86400.0).state == BROKEN
    assert "1970-01-02" in board.clock(nx, 86400.0).detail
    assert board.clock(nx, 2e9).detail == "set"
    tree(nx.root, {"run/systemd/timesync/synchronized": ""})
    assert board.clock(nx, 2e9).detail == "set, and synchronized"
