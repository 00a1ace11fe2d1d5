from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Callable

import pytest

from cli.conftest import Latentd
from cli.doctor.trees import STRANGER, configured, member_of
from latentd.cli import doctor as verb
from latentd.cli.doctor import network
from latentd.cli.doctor.machine import BROKEN, NOTE, OK, Finding, Machine, User
from latentd.errors import NotLatentd, Unreachable


def refuse(error: Exception) -> Callable[[str], None]:
    def asked(url: str) -> None:
        raise error

    return asked


def test_a_port_is_latentds_own_or_free_or_somebody_elses(nx: Machine) -> None:
    config = configured(nx, bind="127.0.0.1:9")
    assert network.port(config, lambda url: None) == Finding("port", OK, "latentd answers at http://127.0.0.1:9")
    other = network.port(config, refuse(NotLatentd("What answers is not latentd.")))
    assert (other.state, "http.bind" in other.fix) == (BROKEN, True)


def test_a_port_that_is_taken_without_an_answer_is_found(nx: Machine) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        config = configured(nx, bind=f"127.0.0.1:{taken.getsockname()[1]}")
        assert network.port(config, refuse(Unreachable("nobody"))).state == BROKEN
    assert "is free" in network.port(config, refuse(Unreachable("nobody"))).detail


def test_the_groups_of_a_user_are_those_of_the_files_and_of_its_unit(nx: Machine) -> None:
    assert nx.user("latentd") == User("latentd", 997, frozenset({997}))
    assert nx.user("latentd", ("video", "render")) == User("latentd", 997, frozenset({997, 44}))
    assert nx.user("nobody") is None
    assert (nx.group(44), nx.group(45)) == ("video", "45")


def test_a_mode_is_read_for_owner_group_and_others(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    path.chmod(0o640)
    found = path.stat()
    owner = User("owner", found.st_uid or 0, frozenset())
    assert owner.may(path, 6)
    assert member_of(path).may(path, 4)
    assert not member_of(path).may(path, 2)
    assert not STRANGER.may(path, 4)


def test_the_verb_prints_a_line_a_check_and_fails_when_something_is_broken(
    latentd: Latentd, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = [Finding("driver", OK, "fine"), Finding("swap", NOTE, "none", "add some")]
    monkeypatch.setattr(verb, "examine", lambda machine, folder, user: found)
    ran = latentd("doctor")
    assert ran.code == 0
    assert "→ add some" in ran.out
    found.append(Finding("disk", BROKEN, "full", "make room"))
    assert latentd("doctor").code == 1
    answer = latentd("doctor", "--json")
    assert (answer.code, answer.json["ok"]) == (1, False)
    assert answer.json["findings"][2] == {"check": "disk", "state": "broken", "detail": "full", "fix": "make room"}


def test_every_check_gives_one_line_on_both_machines(nx: Machine, laptop: Machine, tmp_path: Path) -> None:
    for machine in (nx, laptop):
        findings = verb.examine(machine, tmp_path, STRANGER)
        assert len({found.check for found in findings}) == len(findings) == 14
        assert all(found.detail and "\n" not in found.detail + found.fix for found in findings)
        assert all(found.fix for found in findings if found.state == BROKEN)


def test_a_broken_configuration_is_the_first_finding_and_the_rest_is_checked_all_the_same(nx: Machine, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("[lern]\nseed = 1\n")
    findings = verb.examine(nx, tmp_path, STRANGER)
    assert (findings[0].check, findings[0].state) == ("configuration", BROKEN)
    assert "learn.seed" in findings[0].fix
    assert len(findings) == 14


def test_doctor_imports_neither_torch_nor_tensorrt() -> None:
    code = "import sys, latentd.cli.doctor; sys.exit(bool({'torch', 'tensorrt'} & set(sys.modules)))"
    environ = {**os.environ, "PYTHONPATH": str(Path(verb.__file__).parents[3])}
    assert subprocess.run([sys.executable, "-c", code], env=environ).returncode == 0
