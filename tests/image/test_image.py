"""The image of Dockerfile.l4t, built on a Debian root: what is in it, and that it serves under the restrictions of deploy/compose.yaml."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import List

import pytest

from image.conftest import UID, Image, Start
from image.images import Running, debian_root, pins_of

pytestmark = pytest.mark.image

COMPILERS = ("cc", "gcc", "g++", "c++", "cpp", "clang", "as", "ld", "make", "nvcc")


MOTIFS = ("discs", "stripes")


def answers(running: Running) -> List[str]:
    """About the photographs that were taught: the backbone has random weights."""
    files = [f"/mnt/{motif}/{seed}.jpg" for motif in MOTIFS for seed in range(4)]
    return [result["decision"] for result in running.latentd("classify", *files)["results"]]


def test_no_compiler_of_the_base_is_left_in_it(image: Image) -> None:
    assert (debian_root() / "usr/bin/gcc").exists(), "the base has one"
    paths = [image.root / folder / name for folder in ("usr/bin", "usr/local/bin", "usr/sbin") for name in COMPILERS]
    left = [str(path) for path in paths if os.path.lexists(str(path))]
    assert left == []
    assert not (image.root / "usr/include/stdio.h").exists()
    assert not [path for path in image.root.rglob("cc1*") if path.is_file()]
    assert not [path for path in (image.root / "usr/lib").rglob("*.a") if path.is_file()]


def test_nothing_in_it_gives_root_to_a_user(image: Image) -> None:
    privileged = [
        str(path)
        for folder in ("usr", "opt", "etc")
        for path in (image.root / folder).rglob("*")
        if path.is_file() and not path.is_symlink() and path.stat().st_mode & (stat.S_ISUID | stat.S_ISGID)
    ]
    assert privileged == []


def test_it_holds_the_torch_that_was_named_and_the_pinned_rest(image: Image) -> None:
    site = image.root / f"opt/latentd/lib/python{image.python}/site-packages"
    pins = pins_of(image.python)
    installed = {path.name.split("-")[0].lower(): path.name.split("-")[1][: -len(".dist")] for path in site.glob("*.dist-info")}
    assert installed["torch"] == f"{pins['torch']}+cpu"
    assert {name: installed[name] for name in ("numpy", "onnxruntime", "fastapi", "pillow")} == {
        name: pins[name] for name in ("numpy", "onnxruntime", "fastapi", "pillow")
    }


def test_it_says_how_it_is_to_be_run(image: Image) -> None:
    assert image.config["User"] == f"{UID}:{UID}"
    assert set(image.config["Volumes"]) == {"/var/lib/latentd", "/var/cache/latentd"}
    assert f"latentd:x:{UID}:{UID}:" in (image.root / "etc/passwd").read_text()
    assert (image.root / "usr/local/lib/libgomp.so.1").is_symlink()


def test_on_a_read_only_root_without_any_privilege_it_is_taught_and_answers(start: Start) -> None:
    running = start()
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{running.pid}/status").read_text().splitlines() if ":\t" in line)
    assert status["Uid"].split() == [str(UID)] * 4
    assert {int(status[name], 16) for name in ("CapEff", "CapPrm", "CapBnd", "CapAmb")} == {0}
    assert status["NoNewPrivs"] == "1"
    written = running.run("sh", "-c", "echo > /opt/latentd/new; echo > /var/lib/new; touch /var/lib/latentd/mine /tmp/mine")
    assert written.stderr.count("Read-only file system") == 2, written.stderr
    assert "mine" in running.run("ls", "/var/lib/latentd").stdout
    for motif in MOTIFS:
        running.latentd("learn", "--label", motif, *(f"/mnt/{motif}/{seed}.jpg" for seed in range(4)))
    assert answers(running) == ["discs"] * 4 + ["stripes"] * 4


def test_stopped_and_started_again_it_knows_what_it_was_taught(start: Start) -> None:
    first = start()
    first.latentd("learn", "--label", "discs", "/mnt/discs/0.jpg", "/mnt/discs/1.jpg")
    first.stop()
    assert start().latentd("status")["samples"] == 2


def test_its_health_check_fails_where_nothing_answers(start: Start) -> None:
    running = start()
    assert running.health() == 0
    assert running.health({"LATENTD_HTTP__BIND": "127.0.0.1:1"}) != 0
