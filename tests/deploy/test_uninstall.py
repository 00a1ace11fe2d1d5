"""deploy/install.sh --uninstall in a root that imitates a Xavier NX: with a latentd that runs, and without."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from deploy.board import LATENTD, NX, Board
from latentd.cli.install import CACHE, STATE, UNFINISHED, UNIT_FOLDER, Host, install_steps


def test_uninstalling_removes_service_and_environment_and_keeps_the_rest(board: Board) -> None:
    board.install()
    state = board.root / "var/lib/latentd/journal.sqlite"
    board.plant(board.root, {"var/lib/latentd/journal.sqlite": "taught"})
    said = board.install("--uninstall")
    assert board.noted("latentd")[-1] == f"service uninstall --root={board.root}"
    assert "removed /opt/latentd" in said
    assert not board.venv.exists()
    assert state.exists()
    assert "there is no /opt/latentd/bin/latentd" in board.install("--uninstall"), "safe to run again"
    assert state.exists()


BROKEN = {"empty": "", "without its python": "#!/no/such/python\n", "failing": LATENTD + "exit 1\n"}


@pytest.mark.parametrize(("fault", "purge"), [("gone", False), ("gone", True), *((fault, False) for fault in BROKEN)])
def test_uninstalling_without_a_latentd_that_runs_removes_all_that_latentd_would(board: Board, fault: str, purge: bool) -> None:
    before = board.files()
    board.plant(board.root, {"etc/group": NX["etc/group"] + "render:x:104:\n", "etc/passwd": "latentd:x:997:997::/:/bin/false\n"})
    for step in install_steps(Host(board.root, lambda command: None), Path("/opt/latentd/bin/latentd"), start=False):
        step.act()
    board.plant(board.root, {f"{UNIT_FOLDER}/{UNFINISHED}": "", f"{STATE}/journal.sqlite": "taught", f"{CACHE}/weights": "big"})
    if fault in BROKEN:
        board.plant(board.root, {"opt/latentd/pyvenv.cfg": "", "opt/latentd/bin/latentd": BROKEN[fault]})
        (board.venv / "bin/latentd").chmod(0o755)
    said = board.install("--uninstall", *(["--purge-state"] if purge else []))
    assert "the service is removed without it" in said
    taken = ["disable latentd.socket", "disable latentd.service"]
    users = [f"userdel --root {board.root} latentd"] if purge else []
    assert board.noted("system") == [*(f"systemctl --root={board.root} {each}" for each in taken), *users]
    kept = [] if purge else [f"{CACHE}/weights", f"{STATE}/journal.sqlite"]
    assert board.files() == sorted([*before, "etc/passwd", *kept])


def test_uninstalling_without_latentd_leaves_a_users_own_drop_in(board: Board) -> None:
    mine = f"{UNIT_FOLDER}/latentd.service.d/90-mine.conf"
    board.plant(board.root, {mine: "", f"{UNIT_FOLDER}/latentd.service": ""})
    assert "has files of yours" in board.install("--uninstall")
    assert [name for name in board.files() if name.startswith("usr/")] == [mine]


def test_the_command_is_where_sudo_looks_for_it_and_goes_with_the_rest(board: Board) -> None:
    link = board.root / "usr/local/bin/latentd"
    assert "made the command latentd" in board.install()
    assert os.readlink(str(link)) == "/opt/latentd/bin/latentd"
    assert "made the command" not in board.install()
    board.install("--uninstall")
    assert not link.is_symlink()


@pytest.mark.parametrize("is_link", [True, False])
def test_a_command_of_that_name_that_is_not_ours_stays(board: Board, is_link: bool) -> None:
    link = board.root / "usr/local/bin/latentd"
    board.plant(board.root, {"usr/local/bin/other": "mine", "usr/local/bin/latentd": "mine"})
    if is_link:
        link.unlink()
        link.symlink_to("other")
    assert f"{link} is something else and stays" in board.install()
    board.install("--uninstall")
    assert (link.is_symlink(), link.read_text()) == (is_link, "mine")


def test_what_was_taught_goes_only_when_told(board: Board) -> None:
    board.install()
    board.install("--uninstall", "--purge-state")
    assert board.noted("latentd")[-1] == f"service uninstall --purge-state --root={board.root}"
    assert "goes with --uninstall" in board.install("--purge-state", code=1)
