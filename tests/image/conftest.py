"""Fixtures: the image of Dockerfile.l4t on a Debian root, built once, and containers of it."""

from __future__ import annotations

import os
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, NamedTuple

import pytest

import support
import tiny
from image.images import REPOSITORY, Running, Store, debian_root, missing_tools, python_of, wheelhouse
from systemd.container import ROOTS

UID = 8420
ENVIRON = {
    "LATENTD_BACKBONE__NAME": "tiny",
    "LATENTD_BACKBONE__IMAGE_SIZE": str(tiny.SIZE),
    "LATENTD_BACKBONE__CLASS_TOKENS": "2",
    "LATENTD_ENGINE__THREADS": "1",
    "LATENTD_LEARN__HOLDOUT_EVERY": "0",
    "LATENTD_LEARN__DUPLICATE_COSINE": "2",
    **support.UNDISTURBED,
}


class Image(NamedTuple):
    root: Path
    config: Dict[str, Any]
    python: str


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    why = missing_tools()
    if why:
        pytest.skip(why)
    base = debian_root()
    wheel = wheelhouse(tmp_path_factory.mktemp("wheels"), python_of(base))
    context = tmp_path_factory.mktemp("context") / "latentd"
    shutil.copytree(str(REPOSITORY), str(context), symlinks=True, ignore=shutil.ignore_patterns(".git", ".venv*", "out", "__pycache__"))
    store = Store(ROOTS / f"images.{os.getpid()}")
    try:
        built = store.build("localhost/latentd", store.import_root(base, "localhost/debian"), wheel, context)
        yield Image(store.mounted(built), store.config(built), python_of(base))
    finally:
        store.close()


@pytest.fixture
def volumes(tmp_path: Path) -> Dict[Path, str]:
    """State, cache with a tiny backbone, and photographs, where the container sees them."""
    state, photos = tmp_path / "state", tmp_path / "photos"
    tiny.backbone(tmp_path)
    state.mkdir()
    for motif in ("discs", "stripes"):
        (photos / motif).mkdir(parents=True)
        for seed in range(4):
            (photos / motif / f"{seed}.jpg").write_bytes(support.photo(seed, motif))
    for folder in (state, tmp_path / "cache"):
        for path in (folder, *folder.rglob("*")):
            os.chown(str(path), UID, UID)
    return {state: "/var/lib/latentd", tmp_path / "cache": "/var/cache/latentd", photos: "/mnt"}


Start = Callable[[], Running]


@pytest.fixture
def start(image: Image, volumes: Dict[Path, str]) -> Iterator[Start]:
    """start() runs the image and returns when its health check passes."""
    with ExitStack() as stack:

        def started() -> Running:
            running = stack.enter_context(Running(image.root, image.config, volumes, ENVIRON))
            running.until_healthy()
            return running

        yield started
