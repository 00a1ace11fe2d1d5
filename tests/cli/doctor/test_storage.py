from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import List

import pytest

from cli.doctor.trees import LAPTOP, STRANGER, configured, tree
from latentd.cli.doctor import storage
from latentd.cli.doctor.machine import BROKEN, NOTE, OK, Disk, Finding, Machine, User
from latentd.config import Config

MIB = 1 << 20


def opened(machine: Machine, *folders: str) -> None:
    """The folders, open to all, with all above them."""
    for name in folders:
        path = machine.root / name
        path.mkdir(parents=True, exist_ok=True)
        for each in (path, *path.parents):
            if machine.root in (each, *each.parents):
                each.chmod(0o777)


def test_a_closed_folder_above_the_state_is_named(nx: Machine) -> None:
    opened(nx, "var/lib/latentd")
    assert storage.state_folder(nx, configured(nx), STRANGER).state == OK
    (nx.root / "var/lib").chmod(0o700)
    found = storage.state_folder(nx, configured(nx), STRANGER)
    assert (found.state, found.fix) == (BROKEN, "sudo chmod o+x /var/lib")
    assert "/var/lib is closed to ann" in found.detail


def test_a_state_folder_or_file_of_another_user_is_named(nx: Machine) -> None:
    opened(nx, "var/lib/latentd")
    journal = nx.root / "var/lib/latentd/journal.sqlite"
    journal.touch()
    journal.chmod(0o600)
    found = storage.state_folder(nx, configured(nx), STRANGER)
    assert (found.state, "/var/lib/latentd/journal.sqlite" in found.detail) == (BROKEN, True)
    assert found.fix == "sudo chown -R ann: /var/lib/latentd"
    (nx.root / "var/lib/latentd").chmod(0o755)
    assert "/var/lib/latentd can't be written" in storage.state_folder(nx, configured(nx), STRANGER).detail


def test_links_are_followed_and_a_dangling_one_is_named(nx: Machine) -> None:
    opened(nx, "var/lib", "mnt/nvme")
    (nx.root / "var/lib/latentd").symlink_to(nx.root / "mnt/nvme")
    assert "a link to" in storage.state_folder(nx, configured(nx), STRANGER).detail
    (nx.root / "mnt/nvme").rmdir()
    found = storage.state_folder(nx, configured(nx), STRANGER)
    assert (found.state, "which is not there" in found.detail) == (BROKEN, True)


def test_a_state_folder_that_is_not_there_yet_is_made_by_who_may(nx: Machine) -> None:
    opened(nx, "var/lib")
    assert storage.state_folder(nx, configured(nx), STRANGER).state == OK
    (nx.root / "var/lib").chmod(0o755)
    assert storage.state_folder(nx, configured(nx), STRANGER).fix == "sudo install -d -o ann /var/lib/latentd"
    unit = User("latentd", 997, frozenset({997, 44}))
    assert storage.state_folder(nx, configured(nx), unit).state == OK, "systemd makes it"


def test_a_file_in_the_place_of_the_state_folder_is_no_folder(nx: Machine) -> None:
    opened(nx, "var/lib")
    (nx.root / "var/lib/latentd").touch()
    assert "is no folder" in storage.state_folder(nx, configured(nx), STRANGER).detail


@pytest.mark.parametrize(
    ("disk", "state"),
    [(Disk(50 << 30, False), OK), (Disk(300 * MIB, False), NOTE), (Disk(9 * MIB, False), BROKEN), (Disk(50 << 30, True), BROKEN)],
)
def test_the_disk_has_room_for_the_journal(nx: Machine, disk: Disk, state: str) -> None:
    found = storage.disk(replace(nx, disk=lambda path: disk), configured(nx))
    assert (found.state, bool(found.fix)) == (state, state != OK)


def test_free_space_is_that_of_the_nearest_folder_that_is_there(nx: Machine) -> None:
    opened(nx, "var/lib")
    asked: List[Path] = []

    def disk(path: Path) -> Disk:
        asked.append(path)
        return Disk(1 << 40, False)

    storage.disk(replace(nx, disk=disk), configured(nx))
    assert asked == [nx.root / "var/lib"]


@pytest.mark.parametrize(("available_mib", "on_nx", "on_laptop"), [(4096, OK, OK), (2000, NOTE, OK), (300, BROKEN, BROKEN)])
def test_memory_is_judged_by_what_is_available(nx: Machine, laptop: Machine, available_mib: int, on_nx: str, on_laptop: str) -> None:
    text = f"MemTotal: 6996988 kB\nMemAvailable: {available_mib << 10} kB\n"
    assert storage.memory(tree(nx.root, {"proc/meminfo": text}), Config()).state == on_nx
    assert storage.memory(tree(laptop.root, {"proc/meminfo": text}), Config()).state == on_laptop


def test_swap_is_missed_on_a_jetson_only(nx: Machine, laptop: Machine) -> None:
    assert storage.swap(nx).detail == "3.3 GiB"
    assert storage.swap(laptop) == Finding("swap", OK, "none")
    tree(nx.root, {"proc/meminfo": LAPTOP["proc/meminfo"]})
    assert storage.swap(nx).state == NOTE
