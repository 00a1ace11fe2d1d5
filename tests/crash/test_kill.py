"""SIGKILL at any moment: nothing that was acknowledged is lost, and nothing is there by half."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
import threading
from pathlib import Path
from typing import List

import numpy as np

import support
from latentd.learning import checkpoint
from latentd.replay.journal import Journal
from lessons import WAIT_S, running_journal, sample

TESTS = Path(__file__).parents[1]
KILLS = 8
LIFE = 1_000_000  # numbers of one life
LONGEST_S = 0.25  # of a life, from the first word on


def killed(what: str, folder: Path, first: int, seconds: float) -> List[List[str]]:
    """The words of a victim that was killed so many seconds after it was ready."""
    command = [sys.executable, str(TESTS / "crash" / "victim.py"), what, str(folder), str(first)]
    paths = f"{support.SOURCES}:{TESTS}"
    with subprocess.Popen(
        command, env={**support.environment(), "PYTHONPATH": paths}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        ready = process.stdout.readline()
        timer = threading.Timer(seconds, process.kill)
        timer.start()
        lines = process.stdout.read().splitlines(keepends=True)
        errors = process.stderr.read()
        timer.join()
    assert ready == "ready\n", errors
    assert process.returncode == -9, errors
    return [line.split() for line in lines if line.endswith("\n")]  # a last line without its end was never said


def check_journal(journal: Journal, words: List[List[str]]) -> None:
    """Every acknowledged fact is there, and every record has its latent, or is one that needs none."""
    records = {record.sample_id: record for record in journal.samples(None, 10**6).result(WAIT_S)[0]}
    codes = {entry.sample_id: entry.code for entry in journal.entries(0, 10**6).result(WAIT_S) if entry.kind == "sample"}
    changing = {words[1] for words in words if words[0] in ("forgetting", "correcting")}
    for act, *facts in words:
        if act == "taught":
            sample_id, shown, number, *label = facts
            if sample_id not in changing:
                assert (records[sample_id].label, records[sample_id].state) == (" ".join(label), "queued")
                assert codes[sample_id] == sample(shown, int(number)).code
        elif act == "forgotten":
            assert (records[facts[0]].state, codes[facts[0]]) == ("forgotten", None)
        elif act == "corrected":
            assert (records[facts[0]].label, records[facts[0]].state) == ("corrected", "queued")
        elif act == "keyed":
            recalled = journal.recall(f"key {facts[0]}").result(WAIT_S)
            assert recalled is not None
            assert len(recalled.records) == int(facts[1])
    assert {record.state for record in records.values()} <= {"queued", "forgotten"}
    assert all(codes[sample_id] is not None for sample_id, record in records.items() if record.state == "queued")
    assert sorted(record.seq for record in records.values()) == [record.seq for record in records.values()]


def check_whole_requests(journal: Journal, words: List[List[str]]) -> None:
    """A request is there with all of its samples, acknowledged or not, and counted."""
    last = {int(word[1]) // LIFE: int(word[1]) for word in words if word[0] == "keyed"}
    numbers = [number for life, end in last.items() for number in range(life * LIFE, end + 30, 10)]
    sizes = {sample("thing", number).code: 1 + number // 10 % 5 for number in numbers}
    taught = [entry for entry in journal.entries(0, 10**6).result(WAIT_S) if entry.kind == "sample"]
    batches = [list(batch) for _, batch in itertools.groupby(taught, key=lambda entry: entry.batch)]
    found = [(len(batch), sizes[batch[0].code]) for batch in batches if batch[0].code in sizes]
    assert len(found) >= len(last)
    assert all(size == whole for size, whole in found)
    labels = [record.label for record in journal.samples(None, 10**6).result(WAIT_S)[0] if record.state == "queued"]
    assert {record.name: record.samples for record in journal.classes()} == {
        record.name: labels.count(record.name) for record in journal.classes()
    }


def test_no_acknowledged_sample_is_lost_by_a_kill_and_the_journal_goes_on_after_it(tmp_path: Path) -> None:
    dice = random.Random(1)
    words: List[List[str]] = []
    for life in range(KILLS):
        words += killed("teach", tmp_path, LIFE * life, dice.random() * LONGEST_S)
        with running_journal(tmp_path) as journal:
            check_journal(journal, words)
            check_whole_requests(journal, words)
    assert sum(word[0] == "taught" for word in words) > 5 * KILLS, "the lives were too short to prove anything"


def test_a_version_is_there_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    dice = random.Random(2)
    said: List[int] = []
    for _ in range(KILLS):
        said += [int(number) for _, number in killed("save", tmp_path, len(said) and said[-1] + 1, dice.random() * LONGEST_S)]
        found = checkpoint.newest(tmp_path, 10**9)
        if said:
            assert found is not None
            arrays, facts = found
            assert facts["version"] in (said[-1], said[-1] + 1)  # the last one may not have come to say it
            assert np.all(arrays["a"] == facts["version"])
            assert facts["seq"] == 3 * facts["version"]
        assert list(tmp_path.glob("*.aside")) == [], "a version was broken"
        assert len(list(tmp_path.iterdir())) <= 5, "what a kill leaves behind does not pile up"
    assert len(said) > 5 * KILLS
