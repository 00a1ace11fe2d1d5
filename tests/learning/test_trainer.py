"""What the learner does to its state: the same for the same log, over any restart, and as if what was forgotten had never been."""

from __future__ import annotations

from pathlib import Path
from typing import Callable, Dict, List, Sequence, Set, Tuple

import numpy as np
import pytest
from numpy.typing import NDArray

from latentd.learning import checkpoint
from latentd.learning.adaptive import AdaptiveHead
from latentd.learning.trainer import MIN_TRAIN, Trainer
from latentd.replay.journal import Journal
from latentd.replay.records import Entry
from lessons import WAIT_S, features, sample, teach
from pupils import PROBE, assert_same_predictions, learn, log, make_trainer, names, predictions, requests


def bits(trainer: Trainer) -> Dict[str, bytes]:
    return {name: array.tobytes() for name, array in trainer.state()[0].items()}


def eventful(journal: Journal) -> None:
    """A life with everything in it: three classes, hold-out, duplicates, late labels, corrections, forgetting, a new name."""
    for number in range(12):
        teach(journal, *[(label, number * 4 + i) for i, label in enumerate(("cat", "dog", "cat", "cat"))])
    teach(journal, (None, 900), ("cat", 0), (None, 901))
    journal.relabel("s00000049", "dog").result(WAIT_S)
    journal.relabel("s00000005", "owl").result(WAIT_S)
    for number in range(5):
        teach(journal, *[(label, 100 + number * 3 + i) for i, label in enumerate(("owl", "dog", "cat"))])
    journal.forget("s00000007").result(WAIT_S)
    journal.forget("s00000050").result(WAIT_S)  # a duplicate
    teach(journal, *[("fox", number) for number in range(6)])
    journal.put_class("dog", "wolf").result(WAIT_S)
    journal.forget_class("fox").result(WAIT_S)
    for number in range(4):
        teach(journal, *[(label, 200 + number * 3 + i) for i, label in enumerate(("owl", "wolf", "cat"))])


# --- the same log, the same learner ---


def test_the_same_log_gives_the_same_bits_in_one_go_and_request_by_request(new_journal: Callable[..., Journal]) -> None:
    journal = new_journal(holdout_every=5)
    eventful(journal)
    one = learn(make_trainer(), log(journal))
    other = make_trainer()
    while True:
        entries = journal.entries(other.seq, 1).result(WAIT_S)
        if not entries:
            break
        learn(other, entries)
    assert one.head is not None
    assert bits(one) == bits(other)
    assert one.state()[1] == other.state()[1]
    assert one.seq == journal.status().head_seq


def restarted(journal: Journal, before: Trainer, folder: Path, slots: int) -> Trainer:
    """A trainer made of nothing but a version file and the journal."""
    arrays, facts = before.state()
    checkpoint.write(folder, arrays, facts, keep=1)
    found = checkpoint.newest(folder, 10**6)
    assert found is not None
    after = make_trainer(slots)
    after.restore(*found, [entry for entry in log(journal) if entry.seq <= found[1]["seq"]])
    return after


@pytest.mark.parametrize("slots", [1000, 20])
@pytest.mark.parametrize("settles", [True, False])
def test_a_restart_anywhere_goes_on_to_the_same_bits(
    new_journal: Callable[..., Journal], tmp_path: Path, slots: int, settles: bool
) -> None:
    """settles: the journal has dropped what the version can do without, or a crash came before it could."""
    journal = new_journal(holdout_every=5)
    eventful(journal)
    everything = log(journal)
    whole = learn(make_trainer(slots), everything)
    assert (whole.memory.evictions > 0) == (slots == 20)
    trainer, gone = make_trainer(slots), set()
    for index, request in enumerate(requests(everything)):
        entries = [entry for entry in log(journal, trainer.seq) if entry.batch == request[0].batch]
        learn(trainer, entries)
        if index % 6 == 5:
            before, trainer = trainer, restarted(journal, trainer, tmp_path / "versions", slots)
            assert bits(trainer) == bits(before)
            assert trainer.memory.state() == before.memory.state()
            gone |= set(before.evicted)
            assert settles or set(trainer.evicted) >= {name for name in gone if name not in before.memory} - forgotten(
                everything, trainer.seq
            )
            if settles:
                journal.settle(trainer.seq, trainer.evicted + before.evicted).result(WAIT_S)
    assert bits(trainer) == bits(whole)
    assert trainer.state()[1] == whole.state()[1]
    snapshots = [one.candidate(names(journal), 0.0) for one in (trainer, whole)]
    assert snapshots[0][1] == snapshots[1][1]
    assert snapshots[0][0].predict(PROBE).tobytes() == snapshots[1][0].predict(PROBE).tobytes()


def forgotten(entries: Sequence[Entry], until: int) -> Set[str]:
    alone = {entry.sample_id for entry in entries if entry.kind == "forget" and entry.seq <= until}
    classes = {entry.class_id for entry in entries if entry.kind == "forget_class" and entry.seq <= until}
    return alone | {entry.sample_id for entry in entries if entry.kind == "sample" and entry.class_id in classes}


def test_a_smaller_memory_after_a_restart_gives_up_what_does_not_fit(new_journal: Callable[..., Journal], tmp_path: Path) -> None:
    journal = new_journal()
    teach(journal, *[("cat", number) for number in range(20)])
    before = learn(make_trainer(50), log(journal))
    after = restarted(journal, before, tmp_path, slots=15)
    assert after.memory.used == 15
    assert len(after.evicted) == 5
    assert set(after.evicted).isdisjoint(after.memory.ids())


def test_a_version_number_counts_the_requests_that_taught_something(new_journal: Callable[..., Journal]) -> None:
    journal = new_journal()
    teach(journal, ("cat", 0), ("cat", 1))
    trainer = learn(make_trainer(), log(journal))
    assert trainer.version == 1
    teach(journal, ("cat", 0))  # a duplicate
    teach(journal, (None, 7))
    journal.forget("s00000004").result(WAIT_S)
    journal.forget("s00000003").result(WAIT_S)
    before = bits(trainer)
    learn(trainer, log(journal, trainer.seq))
    assert (trainer.version, trainer.seq, bits(trainer)) == (1, 6, before)
    journal.put_class("cat", "lynx").result(WAIT_S)
    learn(trainer, log(journal, trainer.seq))
    assert (trainer.version, bits(trainer)) == (2, before)
    assert trainer.candidate(names(journal), 0.0)[0].labels == ("lynx",)


# --- hold-out ---


def test_hold_out_samples_never_enter_sums_memory_or_head(new_journal: Callable[..., Journal], monkeypatch: pytest.MonkeyPatch) -> None:
    journal = new_journal(holdout_every=4)
    seen: List[bytes] = []
    step = AdaptiveHead.train_step

    def spy(self: AdaptiveHead, some: NDArray[np.float32], ids: Sequence[int], rng: np.random.Generator) -> float:
        seen.extend(row.tobytes() for row in some)
        return step(self, some, ids, rng)

    monkeypatch.setattr(AdaptiveHead, "train_step", spy)
    for number in range(40):
        teach(journal, ("cat", 2 * number), ("dog", 2 * number + 1))
    held = [entry for entry in log(journal) if entry.holdout]
    assert len(held) == 20
    journal.relabel(held[0].sample_id, "owl").result(WAIT_S)
    trainer = learn(make_trainer(slots=70, epochs=2), log(journal))
    assert seen
    assert {trainer.features([entry.code or b""])[0].tobytes() for entry in held}.isdisjoint(seen)
    assert {entry.sample_id for entry in held}.isdisjoint(trainer.memory.ids())
    assert (trainer.sums.count, trainer.sums.count_of(2)) == (60, 0)
    report = trainer.candidate(names(journal), 0.0)[1]
    assert report.holdout.count == 19, "the relabelled one is of a class that nothing was learned of yet"
    assert trainer.holdout_bytes() == 20 * len(held[0].code or b"")
    for entry in held[1:]:
        journal.forget(entry.sample_id).result(WAIT_S)
    learn(trainer, log(journal, trainer.seq))
    assert trainer.sums.count == 60
    assert trainer.holdout_bytes() == len(held[0].code or b"")


# --- corrections and late labels ---


def test_a_correction_leaves_what_teaching_it_right_would_have_left(new_journal: Callable[..., Journal]) -> None:
    journal, right = new_journal(), new_journal()
    batch: List[Tuple[str, int]] = [(label, number) for number in range(10) for label in ("cat", "dog")]
    teach(journal, *batch)
    journal.admit([sample("cat", 99, shows="dog")]).result(WAIT_S)
    teach(right, *batch, ("dog", 99))
    wrong = learn(make_trainer(epochs=0), log(journal))
    journal.relabel("s00000021", "dog").result(WAIT_S)
    learn(wrong, log(journal, wrong.seq))
    assert_same_predictions(predictions(wrong, journal), predictions(learn(make_trainer(epochs=0), log(right)), right))
    assert wrong.memory.counts() == {0: 10, 1: 11}


def test_a_correction_is_shown_to_the_trained_head(new_journal: Callable[..., Journal], monkeypatch: pytest.MonkeyPatch) -> None:
    journal = new_journal()
    teach(journal, *[(label, number) for number in range(30) for label in ("cat", "dog")])
    trainer = learn(make_trainer(), log(journal))
    shown: List[Tuple[bytes, int]] = []
    monkeypatch.setattr(AdaptiveHead, "train_step", lambda self, some, ids, rng: shown.extend(zip([row.tobytes() for row in some], ids)))
    journal.relabel("s00000001", "owl").result(WAIT_S)
    (entry,) = log(journal, trainer.seq)
    learn(trainer, [entry])
    assert (trainer.features([entry.code or b""])[0].tobytes(), 2) in shown
    assert trainer.head is not None
    assert 2 in trainer.head.class_ids


def test_an_image_labelled_late_is_learned_then(new_journal: Callable[..., Journal]) -> None:
    journal = new_journal()
    teach(journal, ("cat", 0), (None, 1))
    trainer = learn(make_trainer(), log(journal))
    assert trainer.sums.count == 1
    journal.relabel("s00000002", "dog").result(WAIT_S)
    learn(trainer, log(journal, trainer.seq))
    assert (trainer.sums.count_of(1), trainer.memory.ids()) == (1, ("s00000001", "s00000002"))


def test_a_correction_of_a_sample_that_the_memory_gave_up_is_exact_and_then_gives_it_up_again(new_journal: Callable[..., Journal]) -> None:
    journal = new_journal()
    teach(journal, *[("cat", number) for number in range(30)])
    trainer = learn(make_trainer(slots=10), log(journal))
    victim = trainer.evicted[0]
    journal.relabel(victim, "dog").result(WAIT_S)
    journal.settle(30, trainer.evicted).result(WAIT_S)
    trainer.evicted.clear()
    (entry,) = log(journal, trainer.seq)
    assert entry.code is not None
    learn(trainer, [entry])
    assert (trainer.sums.count_of(0), trainer.sums.count_of(1)) == (29, 1)
    assert trainer.evicted == [victim]


# --- steps ---


def test_a_new_class_of_one_image_is_answered_at_once_though_the_trained_head_never_saw_it(new_journal: Callable[..., Journal]) -> None:
    journal = new_journal(holdout_every=4)
    teach(journal, *[(label, number) for number in range(150) for label in ("cat", "dog")])
    trainer = learn(make_trainer(), log(journal))
    teach(journal, ("owl", 0))
    learn(trainer, log(journal, trainer.seq))
    snapshot = trainer.candidate(names(journal), 0.0)[0]
    rows = np.stack([features(label, 0) for label in ("owl", "cat", "dog")])
    assert snapshot.decide(rows, snapshot.predict(rows)) == ["owl", "cat", "dog"]


def test_the_head_is_made_when_there_is_enough_of_two_classes(new_journal: Callable[..., Journal]) -> None:
    journal = new_journal()
    teach(journal, *[("cat", number) for number in range(MIN_TRAIN + 5)])
    assert learn(make_trainer(), log(journal)).head is None
    teach(journal, ("dog", 0))
    trainer = learn(make_trainer(), log(journal))
    assert trainer.head is not None
    assert trainer.head.class_ids == [0, 1]
    steps = trainer.head.steps
    assert steps == round((MIN_TRAIN + 6) / round(16 * 21 / 128))
    teach(journal, *[("dog", number) for number in range(1, 10)])
    learn(trainer, log(journal, trainer.seq))
    assert trainer.head.steps == steps + 3


@pytest.mark.parametrize("kind", ["teach", "forget evicted", "forget class"])
def test_long_work_comes_in_steps(new_journal: Callable[..., Journal], kind: str) -> None:
    journal = new_journal()
    teach(journal, *[(label, number) for number in range(70) for label in ("cat", "dog", "owl")])
    trainer = make_trainer(150)
    if kind != "teach":
        learn(trainer, log(journal))
        journal.settle(210, trainer.evicted).result(WAIT_S)
        journal.forget(trainer.evicted[0]).result(WAIT_S) if kind == "forget evicted" else journal.forget_class("cat").result(WAIT_S)
    steps = sum(1 for _ in trainer.take(log(journal, trainer.seq)))
    assert steps >= 5
    assert trainer.head is not None
