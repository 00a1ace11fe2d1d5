"""The container's files without a container: the linter, what the build is sent, compose's restrictions, the health check's verdict."""

from __future__ import annotations

import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Iterator, List

import pytest

from latentd.cli.doctor.machine import JETSON_DROP_IN

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile.l4t").read_text(encoding="utf-8")
COMPOSE = (ROOT / "deploy/compose.yaml").read_text(encoding="utf-8")


def test_the_linter_has_nothing_to_say() -> None:
    hadolint = shutil.which("hadolint", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if hadolint is None:
        pytest.skip("no hadolint here; make check has it")
    said = subprocess.run([hadolint, "Dockerfile.l4t"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert (said.returncode, said.stdout) == (0, "")


def test_the_build_is_sent_all_that_it_copies_and_it_all_exists() -> None:
    copied = [words for line in re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE, re.MULTILINE) for words in line.split()[:-1]]
    sent = re.findall(r"^!(.*)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    assert len(copied) >= 6
    for name in copied:
        assert (ROOT / name).exists(), name
        assert [each for each in sent if each == name or name.startswith(f"{each}/") or each.startswith(f"{name}/")], name


def test_the_last_stage_starts_from_nothing_and_is_no_root() -> None:
    last = DOCKERFILE[DOCKERFILE.rindex("\nFROM ") :]
    assert last.startswith("\nFROM scratch\n")
    assert re.findall(r"^(?:USER|ENTRYPOINT|RUN).*", last, re.MULTILINE) == ["USER 8420:8420", 'ENTRYPOINT ["/opt/latentd/bin/latentd"]']
    assert "r35.4.1" in DOCKERFILE.splitlines()[3]


def test_libraries_are_looked_for_where_the_unit_looks_for_them_on_a_jetson() -> None:
    """NVIDIA's runtime puts the driver's into the folder tegra."""
    found = re.findall(r"\bLD_LIBRARY_PATH=(\S+)", DOCKERFILE + JETSON_DROP_IN.read_text(encoding="utf-8"))
    assert len(found) == 2
    assert found[0] == found[1]


def lines_under(key: str) -> List[str]:
    """The items of a list in compose's file."""
    (block,) = re.findall(rf"^    {key}:\n((?:^ +(?:-|#).*\n)+)", COMPOSE, re.MULTILINE)
    return [line.strip()[2:] for line in block.splitlines() if line.strip().startswith("-")]


def test_compose_gives_the_gpu_and_takes_everything_else() -> None:
    for line in ("runtime: nvidia", "read_only: true", "network_mode: host"):
        assert re.search(rf"^    {line}$", COMPOSE, re.MULTILINE), line
    assert lines_under("group_add") == ['"${VIDEO_GID:-44}"']
    assert lines_under("cap_drop") == ["ALL"]
    assert lines_under("security_opt") == ["no-new-privileges:true"]
    assert lines_under("tmpfs")[0].startswith("/tmp:")
    assert {"state:/var/lib/latentd", "cache:/var/cache/latentd"} < set(lines_under("volumes"))
    assert not re.search(r"privileged|cap_add|gpus:|devices:|unconfined|docker\.sock", COMPOSE)


class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(self.server.status if self.path == "/readyz" else 404)  # type: ignore[attr-defined]
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing is printed."""


@pytest.fixture
def daemon() -> Iterator[http.server.HTTPServer]:
    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1), (404, 1)])
def test_the_health_check_passes_only_where_the_daemon_is_ready(daemon: http.server.HTTPServer, status: int, code: int) -> None:
    daemon.status = status  # type: ignore[attr-defined]
    environ = {"LATENTD_HTTP__BIND": f"127.0.0.1:{daemon.server_port}", "http_proxy": "http://127.0.0.1:1"}
    assert subprocess.run([sys.executable, "-I", "deploy/image/healthcheck.py"], cwd=ROOT, env=environ).returncode == code


def test_the_health_check_fails_where_nobody_listens() -> None:
    command = [sys.executable, "-I", "deploy/image/healthcheck.py"]
    ran = subprocess.run(command, cwd=ROOT, env={"LATENTD_HTTP__BIND": "127.0.0.1:1"}, stderr=subprocess.PIPE, text=True)
    assert ran.returncode == 1
    assert "Connection refused" in ran.stderr
