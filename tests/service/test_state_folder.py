from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from latentd.errors import ConfigError, StateInUse
from latentd.service.state_folder import ADDRESS_FILE, LOCK_FILE, StateFolder, holder
from support import environment


def test_a_second_daemon_is_refused_and_told_which_process_has_the_folder(tmp_path: Path) -> None:
    first = StateFolder(tmp_path)
    with pytest.raises(StateInUse, match=f"process {os.getpid()} "):
        StateFolder(tmp_path)
    first.close()
    StateFolder(tmp_path).close()


def test_the_lock_of_a_dead_process_does_not_count(tmp_path: Path) -> None:
    take = f"from pathlib import Path; from latentd.service.state_folder import StateFolder; folder = StateFolder(Path({str(tmp_path)!r}))"
    code = f"import os; {take}; os._exit(9)"
    assert subprocess.run([sys.executable, "-c", code], env=environment(), check=False).returncode == 9
    assert (tmp_path / LOCK_FILE).read_text().strip().isdigit()
    StateFolder(tmp_path).close()


def test_the_address_is_there_while_the_daemon_is(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path / "deep" / "er")
    folder.note_address("http://127.0.0.1:1")
    folder.note_address("http://127.0.0.1:8420")
    assert (folder.path / ADDRESS_FILE).read_text() == "http://127.0.0.1:8420\n"
    folder.close()
    folder.close()
    assert not (folder.path / ADDRESS_FILE).exists()


def test_a_new_folder_is_private(tmp_path: Path) -> None:
    StateFolder(tmp_path / "state").close()
    assert (tmp_path / "state").stat().st_mode & 0o077 == 0


def test_a_folder_that_can_not_be_used_is_a_configuration_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match=f"user {os.geteuid()}"):
        StateFolder(tmp_path / "file" / "state")


def test_who_holds_a_folder_can_be_asked_without_taking_it(tmp_path: Path) -> None:
    assert holder(tmp_path / "absent") is None
    assert not (tmp_path / "absent").exists()
    folder = StateFolder(tmp_path)
    assert holder(tmp_path) == str(os.getpid())
    folder.close()
    assert holder(tmp_path) is None
    StateFolder(tmp_path).close()
