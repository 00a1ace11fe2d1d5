"""Fixtures: a Debian system with latentd installed as a user would, booted anew for each test."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Callable, Iterator, List

import pytest

import support
import tiny
from latentd import __version__
from systemd.container import LATENTD, Container, Layer, base_root, install_latentd, missing_tools

REPOSITORY = Path(__file__).parents[2]
CONFIG = f"""\
[backbone]
name = "tiny"
image_size = {tiny.SIZE}
class_tokens = 2

[engine]
threads = 1

[learn]
holdout_every = 0
duplicate_cosine = 2.0

[energy]
max_temperature_c = 150.0

[memory]
reserve_bytes = 0
"""


def wheel_of(source: Path, folder: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        str(folder),
        str(source),
    ]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout: building leaves files behind."""
    copy = tmp_path_factory.mktemp("source") / "latentd"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(str(REPOSITORY / name), str(copy))
    shutil.copytree(str(REPOSITORY / "daemon"), str(copy / "daemon"), ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    return copy


@pytest.fixture(scope="session")
def newer_wheel(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same program under a higher version."""
    copy = tmp_path_factory.mktemp("newer") / "latentd"
    shutil.copytree(str(sources), str(copy))
    init = copy / "daemon/latentd/__init__.py"
    text = init.read_text()
    assert __version__ in text
    init.write_text(text.replace(__version__, "99.0.0"))
    return wheel_of(copy, tmp_path_factory.mktemp("newer-wheel"))


@pytest.fixture(scope="session")
def installed(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Layer:
    """The Debian root with latentd, its configuration, a tiny backbone and photographs; not booted."""
    why = missing_tools()
    if why:
        pytest.skip(why)
    layer = Layer(tmp_path_factory.mktemp("installed"), [base_root()])
    try:
        install_latentd(layer, wheel_of(sources, tmp_path_factory.mktemp("wheel")))
        _furnish(layer.root, tmp_path_factory.mktemp("tiny"))
    finally:
        layer.close()
    return layer


def _furnish(root: Path, folder: Path) -> None:
    tiny.backbone(folder)
    shutil.copytree(str(folder / "cache"), str(root / "var/cache/latentd"))
    (root / "etc/latentd").mkdir()
    (root / "etc/latentd/config.toml").write_text(CONFIG)
    for motif in ("discs", "stripes"):
        (root / "root/photos" / motif).mkdir(parents=True)
        for seed in range(40):
            (root / "root/photos" / motif / f"{seed}.jpg").write_bytes(support.photo(seed, motif))
    (root / "opt/test").mkdir()
    shutil.copy(str(Path(__file__).with_name("stuck.py")), str(root / "opt/test"))


@pytest.fixture
def bare(installed: Layer, tmp_path: Path) -> Iterator[Container]:
    """A booted system on which the package lies, and no service yet."""
    layer = Layer(tmp_path / "layer", [installed.upper, *installed.below])
    try:
        with Container(layer) as container:
            yield container
    finally:
        layer.close()


@pytest.fixture
def system(bare: Container) -> Container:
    """A booted system with the service running."""
    bare.call(LATENTD, "service", "install")
    return bare


@pytest.fixture
def taught(system: Container) -> Container:
    """… that was taught six photographs of two classes."""
    teach(system, range(3))
    return system


def teach(container: Container, seeds: range) -> None:
    for motif in ("discs", "stripes"):
        files = [f"/root/photos/{motif}/{seed}.jpg" for seed in seeds]
        container.call(LATENTD, "learn", "--label", motif, *files)


Drop = Callable[[str], None]


@pytest.fixture
def drop_in(bare: Container) -> Drop:
    """drop_in(lines) writes a drop-in as an administrator would, and has systemd read it."""

    def write(lines: str) -> None:
        folder = bare.root / "etc/systemd/system/latentd.service.d"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "mine.conf").write_text(f"[Service]\n{lines}\n")
        bare.call("systemctl", "daemon-reload")

    return write


def decisions(container: Container, seeds: range) -> List[str]:
    files = [f"/root/photos/{motif}/{seed}.jpg" for motif in ("discs", "stripes") for seed in seeds]
    answer = container.latentd("classify", *files)
    return [result["decision"] for result in answer["results"]]
