"""What the README tells people to type, typed: every bash block runs, against a live daemon and photographs made here."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Iterator, List, NamedTuple

import httpx
import pytest

import support
from harness import DaemonProcess
from latentd.vision.checkpoints import Backbone

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"(?:^<!-- run: (?P<how>.*?) -->\n)?^```bash\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
MOTIFS = {"cat": "discs", "dog": "stripes", "fox": "rings"}
# curl says nothing of an HTTP error in its exit code unless told.
PRELUDE = 'set -euo pipefail\ncurl() { command curl --silent --show-error --fail "$@"; }\n'


class Block(NamedTuple):
    how: str
    text: str


def blocks(how: str) -> List[Block]:
    return [block for block in every_block() if block.how == how]


def every_block() -> List[Block]:
    return [Block(found.group("how") or "", found.group("text")) for found in BLOCK.finditer(README)]


def test_every_bash_block_says_how_it_is_run() -> None:
    assert README.count("```bash") == len(every_block()) > 0
    assert {block.how for block in every_block()} <= {"setup", "server", "by hand, it needs your weights", "by hand, it needs root"}


def test_the_two_setup_commands_are_targets_of_the_makefile() -> None:
    commands = "".join(block.text for block in blocks("setup")).split("\n")[:-1]
    assert commands == ["make demo", "make test"]
    for command in commands:
        subprocess.run([*command.split(), "--dry-run", f"PYTHON={sys.executable}"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def test_every_make_target_and_file_that_the_readme_names_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"(?:^|`)make ([a-z0-9-]+)", README, re.MULTILINE))
    assert {"demo", "test", "run", "check"} <= targets
    assert [target for target in targets if not re.search(rf"^{target}:", makefile, re.MULTILINE)] == []
    named = re.findall(r"\b(?:deploy|docs|systemd|benchmarks|tests)/[\w./-]*\w", README)
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.fixture(scope="module")
def daemon(backbone: Backbone, cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    with support.daemon(tmp_path_factory.mktemp("readme") / "state", cache_dir) as running:
        yield running


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working folder with the files that the README's commands name, and `latentd` as a command."""
    for label in ("cat", "dog"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for seed in range(4):
            (tmp_path / "photos" / label / f"{seed}.jpg").write_bytes(support.photo(seed, MOTIFS[label]))
    (tmp_path / "fox.jpg").write_bytes(support.photo(100, MOTIFS["fox"]))
    (tmp_path / "new.jpg").write_bytes(support.photo(101, MOTIFS["cat"]))
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "latentd"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m latentd "$@"\n')
    command.chmod(0o755)
    return tmp_path


def run(script: str, folder: Path, daemon: DaemonProcess) -> str:
    environ = {"PATH": f"{folder / 'bin'}:{support.environment()['PATH']}", "LATENTD_HTTP__BIND": daemon.url.split("//")[1]}
    done = subprocess.run(
        ["bash", "-c", PRELUDE + script.replace("127.0.0.1:8420", daemon.url.split("//")[1])],
        cwd=folder,
        env=support.environment(environ),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, f"{script}\nended with {done.returncode}:\n{done.stdout}\n{daemon.log}"
    return done.stdout


def test_the_readme_in_its_order_teaches_three_classes_and_asks(daemon: DaemonProcess, folder: Path) -> None:
    missing = [tool for tool in ("bash", "curl") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"not on this machine: {', '.join(missing)}")
    for block in blocks("server"):
        assert run(block.text, folder, daemon).strip(), f"{block.text} printed nothing"
    with httpx.Client(base_url=daemon.url, trust_env=False) as client:
        assert {each["name"] for each in client.get("/v1/classes").json()["classes"]} == set(MOTIFS)
        for label, motif in MOTIFS.items():
            answer = client.post("/v1/classify", content=support.photo(7, motif), headers={"Content-Type": "image/jpeg"}).json()
            assert answer["results"][0]["decision"] == label
