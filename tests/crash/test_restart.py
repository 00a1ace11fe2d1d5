"""A power cut at the worst moments, played with copies of the state folder: who starts from one ends where the other one was."""

from __future__ import annotations

import shutil
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Sequence, Tuple

import numpy as np
import pytest

from latentd.learning import checkpoint
from latentd.learning.learner import Learner
from latentd.learning.trainer import Trainer
from latentd.replay.journal import Journal
from lessons import CODEC, WAIT_S, features, running_journal, sample, teach
from pupils import PROBE, answers, make_trainer, running_learner, taught

LESSONS: Sequence[Sequence[Tuple[str, int]]] = [[("cat", number), ("dog", number), ("owl", number)] for number in range(30)]


def small() -> Trainer:
    return make_trainer(slots=40)


class View(NamedTuple):
    """All that a restart must bring back."""

    version: int
    watermark: int
    labels: Tuple[str, ...]
    probabilities: bytes
    counted: int
    used: Dict[int, int]
    evictions: int
    states: Tuple[Tuple[str, str], ...]
    holdout: Any


def view(learner: Learner, journal: Journal) -> View:
    records = journal.samples(None, 10**6).result(WAIT_S)[0]
    return View(
        learner.snapshot.version,
        learner.snapshot.seq,
        learner.snapshot.labels,
        learner.snapshot.predict(PROBE).tobytes(),
        learner.accuracy().prequential.count,
        learner.memory().classes,
        learner.memory().evictions,
        tuple((record.sample_id, record.state) for record in records),
        learner.accuracy().holdout,
    )


def changes(learner: Learner, journal: Journal, upto: int) -> None:
    """The second half of a life: corrections and forgetting between lessons; `upto` of its seven acts."""
    acts: List[Callable[[], Future[Any]]] = [
        lambda: journal.relabel(newest(journal, "cat"), "fox"),
        lambda: journal.forget(newest(journal, "owl")),
        lambda: journal.put_class("dog", "wolf"),
        lambda: journal.forget_class("owl"),
        lambda: journal.forget("s00000002"),
        lambda: journal.admit([sample("fox", 7), sample("cat", 70)]),
        lambda: journal.admit([sample("fox", 8), sample("cat", 70)]),
    ]
    for act in acts[:upto]:
        act().result(WAIT_S)
        caught_up(learner, journal)


def newest(journal: Journal, label: str) -> str:
    """The last sample of the class whose latent is stored."""
    return journal.samples(None, 10**6, label, "learned").result(WAIT_S)[0][-1].sample_id


def settled(journal: Journal) -> None:
    """Waits until the learner has saved what it had to forget, and the journal has wiped it."""
    deadline = time.monotonic() + WAIT_S
    while journal._submit(lambda: bool(journal._catalogue._unsettled)).result(WAIT_S):
        assert time.monotonic() < deadline


def power_cut(folder: Path, copy: Path) -> Path:
    """What would be on the disk. The journal and the learner rest while it is copied."""
    return Path(shutil.copytree(folder, copy))


def caught_up(learner: Learner, journal: Journal) -> Learner:
    learner.learned(journal.status().head_seq).result(WAIT_S)
    return learner


@pytest.mark.parametrize("saved_after", [None, 0, 10, 29])
@pytest.mark.parametrize("acts", [0, 2, 7])
def test_a_power_cut_loses_nothing_wherever_the_last_version_was_saved(tmp_path: Path, saved_after: Any, acts: int) -> None:
    """saved_after: the learner was stopped in an orderly way after this lesson, and never since; acts: see `changes`."""
    life = tmp_path / "life"
    with running_journal(life, holdout_every=6) as journal:
        lessons = list(LESSONS)
        if saved_after is not None:
            with running_learner(journal, life, make=small) as learner:
                taught(learner, journal, *lessons[: saved_after + 1])
            lessons = lessons[saved_after + 1 :]
        with running_learner(journal, life, make=small) as learner:
            taught(learner, journal, *lessons)
            changes(learner, journal, acts)
            settled(journal)
            cut = power_cut(life, tmp_path / "cut")
        with running_learner(journal, life, make=small) as learner:
            expected = view(caught_up(learner, journal), journal)
    with running_journal(cut, holdout_every=6) as journal:
        with running_learner(journal, cut, make=small) as learner:
            caught_up(learner, journal)
        with running_learner(journal, cut, make=small) as learner:
            assert view(caught_up(learner, journal), journal) == expected


def test_a_power_cut_between_a_version_and_what_the_journal_drops_for_it_is_made_up_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    life = tmp_path / "life"
    with running_journal(life) as journal:
        settle = journal.settle

        def cut_before(*arguments: Any) -> Future[None]:
            shutil.rmtree(tmp_path / "cut", ignore_errors=True)
            power_cut(life, tmp_path / "cut")
            return settle(*arguments)

        monkeypatch.setattr(journal, "settle", cut_before)
        with running_learner(journal, life, make=small) as learner:
            taught(learner, journal, *LESSONS)
            evictions = learner.memory().evictions
            assert evictions > 0
            journal.forget("s00000002").result(WAIT_S)
            caught_up(learner, journal)
        expected = view(learner, journal)
    code = sample("dog", 0).code
    assert code in on_disk(tmp_path / "cut")
    assert checkpoint.seq_of(checkpoint.versions(tmp_path / "cut" / "versions")[-1]) == 91
    with running_journal(tmp_path / "cut") as journal:
        with running_learner(journal, tmp_path / "cut", make=small) as learner:
            pass  # it has nothing to learn: the start alone makes up for it
        assert view(learner, journal) == expected
        assert [record.state for record in journal.samples(None, 999).result(WAIT_S)[0]].count("evicted") >= evictions - 1
    assert code not in on_disk(tmp_path / "cut")


def on_disk(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.endswith("-shm"))


@pytest.mark.parametrize("wish", ["sample", "class"])
def test_what_is_forgotten_is_nowhere_on_the_disk_soon_after(tmp_path: Path, wish: str) -> None:
    """Neither its code, nor its decoded features in any number format that we write, nor its hash or sketch."""
    with running_journal(tmp_path) as journal:
        for _ in range(3):  # several versions know it
            with running_learner(journal, tmp_path, checkpoint_s=0.0) as learner:
                head = journal.status().head_seq
                taught(learner, journal, *[[("cat", head + 1), ("dog", head + 1)] for _ in range(2)], [("cat", head + 2)])
        with running_learner(journal, tmp_path) as learner:
            taught(learner, journal, [("dog", 500)])
            traces = [trace for number in (1, 2) for trace in traces_of("cat", number)]
            kept = traces_of("dog", 500)
            assert sum(trace in on_disk(tmp_path) for trace in traces) >= 4
            assert (
                len(checkpoint.versions(tmp_path / "versions")) >= 3
            )  # one that is being written stands beside those that it will push out
            if wish == "class":
                journal.forget_class("cat").result(WAIT_S)
            else:
                for record in journal.samples(None, 99, label="cat").result(WAIT_S)[0]:
                    journal.forget(record.sample_id).result(WAIT_S)
            caught_up(learner, journal)
            settled(journal)
            assert learner.snapshot.labels == ("dog",)
        found = on_disk(tmp_path)
        assert not any(trace in found for trace in traces)
        assert kept[0] in found


def traces_of(label: str, number: int) -> List[bytes]:
    taught_sample = sample(label, number)
    decoded = CODEC.decode_features(np.frombuffer(taught_sample.code, np.uint8)[None])[0]
    hashed = taught_sample.sha256[:32].encode()
    return [taught_sample.code, decoded.tobytes(), decoded.astype(np.float64).tobytes(), hashed]


def test_learning_in_one_go_equals_learning_request_by_request_over_a_restart(tmp_path: Path) -> None:
    """Bit for bit: checkpoint and journal hold the whole state, random numbers included."""
    with running_journal(tmp_path / "go", holdout_every=6) as journal:
        for lesson in LESSONS:
            teach(journal, *lesson)
        with running_learner(journal, tmp_path / "go", make=small) as learner:
            in_one_go = view(caught_up(learner, journal), journal)
    with running_journal(tmp_path / "steps", holdout_every=6) as journal:
        with running_learner(journal, tmp_path / "steps", make=small) as learner:
            taught(learner, journal, *LESSONS[:13])
        with running_learner(journal, tmp_path / "steps", make=small) as learner:
            taught(learner, journal, *LESSONS[13:])
            step_by_step = view(learner, journal)
    # What was evicted before the restart is off the disk already.
    assert in_one_go._replace(states=()) == step_by_step._replace(states=())
    assert in_one_go.counted == sum(len(lesson) for lesson in LESSONS)


def test_an_image_is_known_by_the_same_answer_after_a_restart(tmp_path: Path) -> None:
    with running_journal(tmp_path) as journal:
        with running_learner(journal, tmp_path) as learner:
            taught(learner, journal, *LESSONS[:4])
            before = learner.snapshot.predict(features("cat", 0)[None])
        with running_learner(journal, tmp_path) as learner:
            assert answers(learner, "cat", [0]) == ["cat"]
            np.testing.assert_array_equal(learner.snapshot.predict(features("cat", 0)[None]), before)
