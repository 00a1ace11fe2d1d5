from __future__ import annotations

import io
import socket
import subprocess
import sys
from pathlib import Path
from typing import Iterator, List

import pytest

from cli.conftest import Latentd
from latentd import __version__
from latentd.cli import app, backbone
from service.fakes import World
from support import environment

CLIENT_VERBS = [
    ["status"],
    ["status", "--watch"],
    ["classify", "-"],
    ["learn", "--label", "cat", "-"],
    ["label", "s00000001", "cat"],
    ["samples"],
    ["forget", "s00000001"],
    ["classes"],
    ["accuracy"],
    ["energy"],
    ["memory"],
]


@pytest.fixture
def deaf() -> Iterator[str]:
    """The URL of a loopback port that nobody listens on, though it is taken."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


@pytest.mark.parametrize("arguments", CLIENT_VERBS, ids=" ".join)
def test_without_a_daemon_every_verb_says_how_to_start_it(latentd: Latentd, deaf: str, arguments: List[str]) -> None:
    ran = latentd(*arguments, "--url", deaf)
    assert ran.code == 3
    assert ran.out == ""
    assert ran.err.startswith("latentd is not running; start it with `latentd serve`\n")
    assert deaf in ran.err
    assert "Traceback" not in ran.err


def test_without_a_daemon_programs_get_a_problem(latentd: Latentd, deaf: str) -> None:
    ran = latentd("status", "--json", "--url", deaf)
    assert ran.code == 3
    assert ran.json["problem"]["code"] == "unreachable"


def test_the_daemon_is_found_by_the_address_that_it_noted(latentd: Latentd, served: object, tmp_path: Path) -> None:
    address = tmp_path / "state" / "address"
    assert address.is_file(), "the daemon notes its address in its state folder"
    (tmp_path / "client-state").symlink_to(tmp_path / "state")
    assert latentd("status", "--json").json["samples"] == 0


def test_a_refusal_is_shown_as_title_detail_and_hint(asked: Latentd) -> None:
    ran = asked("samples", "show", "s00000009")
    assert ran.code == 4
    title, detail, hint = ran.err.splitlines()
    assert title == "There is no such sample"
    assert "s00000009" in detail
    assert hint == "  GET /v1/samples lists what was taught."
    assert asked("samples", "show", "s00000009", "--json").json["problem"]["code"] == "sample-not-found"


def test_a_bug_in_the_daemon_is_a_failure_and_no_refusal(asked: Latentd, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world.learner, "memory", lambda: 1 / 0)
    assert asked("memory").code == 1


@pytest.mark.parametrize(
    "arguments", [["nosuchverb"], ["status", "--nosuch"], ["classify"], ["status", "--url", "ftp://x"], ["samples", "--limit", "0"]]
)
def test_a_wrong_command_line_is_exit_code_2(latentd: Latentd, arguments: List[str]) -> None:
    ran = latentd(*arguments)
    assert ran.code == 2
    assert ran.out == ""


def test_ctrl_c_is_exit_code_130(latentd: Latentd, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(url: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("latentd.cli.reports.connect", interrupted)
    ran = latentd("memory")
    assert (ran.code, ran.out) == (130, "")


def test_version_and_help(latentd: Latentd) -> None:
    assert latentd("--version").out == f"latentd {__version__}\n"
    ran = latentd("--help")
    assert ran.code == 0
    for name in (
        "serve",
        "status",
        "classify",
        "learn",
        "label",
        "samples",
        "forget",
        "classes",
        "accuracy",
        "energy",
        "memory",
        "backbone",
        "config",
    ):
        assert name in ran.out


def test_client_verbs_load_nothing_heavy() -> None:
    heavy = "{'torch', 'numpy', 'fastapi', 'uvicorn', 'pydantic', 'onnxruntime'}"
    code = f"import sys, latentd.cli.app; sys.exit(sorted({heavy} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_python_m_latentd_ends_with_the_exit_code(deaf: str) -> None:
    command = [sys.executable, "-m", "latentd", "status", "--url", deaf]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith("latentd is not running")


def test_serve_says_what_is_wrong_with_the_configuration(latentd: Latentd, tmp_path: Path) -> None:
    ran = latentd("serve", "--bind", "127.0.0.1:0", "--log-level", "loud")
    assert ran.code == 1
    assert "log.level = 'loud' (command line) must be one of debug, info, warning, error" in ran.err
    assert latentd("serve", "--config", str(tmp_path / "absent")).code == 2


class TestConfig:
    def test_show_prints_every_key_with_its_origin(self, latentd: Latentd, tmp_path: Path) -> None:
        (tmp_path / "config.toml").write_text('[http]\nbind = "127.0.0.1:9999"\n')
        found = latentd("config", "show", "--origin", "--config", str(tmp_path), "--json").json
        assert found["http.bind"] == {"value": "127.0.0.1:9999", "origin": str(tmp_path / "config.toml")}
        assert found["http.max_images"]["origin"] == "default"
        assert "127.0.0.1:9999" in latentd("config", "show", "--config", str(tmp_path)).out

    def test_check_names_the_mistake(self, latentd: Latentd, tmp_path: Path) -> None:
        assert latentd("config", "check", "--config", str(tmp_path)).code == 0
        assert latentd("config", "check", "--config", str(tmp_path), "--json").json["ok"] is True
        (tmp_path / "config.toml").write_text('[http]\nbimd = "x"\n')
        ran = latentd("config", "check", "--config", str(tmp_path))
        assert ran.code == 1
        assert "http.bimd" in ran.err
        assert "Did you mean http.bind?" in ran.err

    def test_the_example_is_a_configuration_that_changes_nothing(self, latentd: Latentd, tmp_path: Path) -> None:
        (tmp_path / "config.toml").write_text(latentd("config", "example").out)
        assert latentd("config", "check", "--config", str(tmp_path)).code == 0


class TestBackbone:
    def test_an_empty_cache_says_how_to_fill_it(self, latentd: Latentd, tmp_path: Path) -> None:
        ran = latentd("backbone", "list", "--cache-dir", str(tmp_path))
        assert (ran.code, ran.out) == (0, "")
        assert "latentd backbone pull" in ran.err
        assert latentd("backbone", "list", "--cache-dir", str(tmp_path), "--json").json == {"backbones": []}

    def test_a_name_that_can_not_be_pulled_is_a_failure(self, latentd: Latentd, tmp_path: Path) -> None:
        ran = latentd("backbone", "pull", "resnet", "--cache-dir", str(tmp_path), "--json")
        assert ran.code == 1
        assert ran.json["problem"]["code"] == "checkpoint-invalid"

    def test_a_file_that_is_no_checkpoint_is_a_failure(self, latentd: Latentd, tmp_path: Path) -> None:
        (tmp_path / "weights.safetensors").write_bytes(b"nothing")
        ran = latentd("backbone", "import", str(tmp_path / "weights.safetensors"), "--cache-dir", str(tmp_path))
        assert ran.code == 1
        assert "Traceback" not in ran.err

    def test_an_installed_one_is_described(self, latentd: Latentd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from latentd.vision.checkpoints import Backbone
        from latentd.vision.shape import VitShape

        path = tmp_path / "tiny.safetensors"
        path.write_bytes(b"12345")
        tiny = Backbone("tiny", path, "ab" * 32, VitShape(width=192, heads=(3,) * 12, mlp_width=(768,) * 12, patch=16, grid=14), "a file")
        monkeypatch.setattr("latentd.vision.checkpoints.installed", lambda cache_dir: [tiny])
        found = latentd("backbone", "list", "--json").json["backbones"]
        assert found == [backbone._described(tiny)]
        assert (found[0]["depth"], found[0]["image_size"], found[0]["size_bytes"]) == (12, 224, 5)
        assert "12 blocks" in latentd("backbone", "list").out


def test_a_caller_with_a_stream_of_its_own_for_stdout_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    own = io.StringIO()
    monkeypatch.setattr(sys, "stdout", own)
    with pytest.raises(SystemExit) as end:
        app.main(["--version"])
    assert (end.value.code, own.getvalue()) == (0, f"latentd {__version__}\n")
