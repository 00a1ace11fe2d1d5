from __future__ import annotations

import io
import logging
import os
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

from latentd.service import logs


@contextmanager
def bare_root() -> Iterator[logging.Logger]:
    """The root logger as a fresh process has it. Entered in the test itself: pytest puts its own handlers on before that."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers[:] = []
    try:
        yield root
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


def journal_of(path: Path) -> str:
    status = path.stat()
    return f"{status.st_dev}:{status.st_ino}"


def test_the_journal_gets_the_severity_of_every_line_of_a_traceback(tmp_path: Path) -> None:
    path = tmp_path / "stderr"
    with path.open("w") as stream, bare_root():
        logs.set_up("debug", {"JOURNAL_STREAM": journal_of(path)}, stream)
        log = logging.getLogger("latentd.x")
        log.debug("d")
        log.info("i")
        log.warning("w")
        log.critical("c")
        try:
            raise ValueError("broken")
        except ValueError:
            log.exception("two\nlines")
    lines = path.read_text().splitlines()
    assert lines[:4] == ["<7>latentd.x: d", "<6>latentd.x: i", "<4>latentd.x: w", "<2>latentd.x: c"]
    assert len(lines) > 7
    assert all(line.startswith("<3>") for line in lines[4:])


def test_a_stream_that_does_not_go_to_the_journal_gets_plain_lines(tmp_path: Path) -> None:
    (tmp_path / "journal").touch()
    with (tmp_path / "stderr").open("w") as stream, bare_root():
        logs.set_up("info", {"JOURNAL_STREAM": journal_of(tmp_path / "journal")}, stream)
        logging.getLogger("latentd.x").info("said")
        logging.getLogger("latentd.x").debug("not said")
    assert (tmp_path / "stderr").read_text() == "INFO latentd.x: said\n"


def test_a_stream_without_a_file_is_not_the_journal() -> None:
    assert not logs.goes_to_journal({"JOURNAL_STREAM": "1:2"}, io.StringIO())
    assert not logs.goes_to_journal({}, io.StringIO())
    with open(os.devnull, "w") as stream:
        assert not logs.goes_to_journal({}, stream)


def test_logging_that_was_set_up_before_keeps_its_handlers() -> None:
    mine = logging.NullHandler()
    with bare_root() as root:
        root.addHandler(mine)
        logs.set_up("warning", {}, io.StringIO())
        assert root.handlers == [mine]
        assert root.level == logging.WARNING
