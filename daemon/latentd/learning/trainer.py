"""One mini-batch at a time: what the learner does to sums, replay memory, hold-out and trained head, without thread or clock.

Deterministic: the same entries in the same order, with the same seed, give the same weights, whether they came over HTTP, from the
journal after a restart or in process. Owned by the learner thread.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Dict, Generator, Iterable, Iterator, List, Mapping, Optional, Sequence, Tuple, Union

import numpy as np
from numpy.typing import NDArray

from latentd.learning.accuracy import AccuracyReport, Prequential, report
from latentd.learning.adapted import Adapted
from latentd.learning.adaptive import AdaptiveHead, TrainedHead
from latentd.learning.analytic import LinearHead, RidgeSums
from latentd.learning.foresight import Foresight
from latentd.learning.gate import MIN_HOLDOUT, TEMPERATURES, Opinion, Verdict, decide, judge, unless_it_flips
from latentd.learning.place import Place
from latentd.learning.snapshot import AdaptedHead, Snapshot
from latentd.learning.unknown import UnknownReport, refused
from latentd.replay.latents import LatentCodec
from latentd.replay.memory import ReplayMemory
from latentd.replay.records import Entry, seq_of

MIN_TRAIN = 32  # the head is made when this many samples of two classes are there: its normalisation is fixed from them
NEW_SHARE = (
    21 / 128
)  # new latents in a mini-batch (Pellegrini et al. 2020, "Latent replay for real-time continual learning": 21 new + 107 replayed)


@dataclass(frozen=True)
class TrainerSettings:
    """From the configuration; see there. replay_bytes bounds the replay memory."""

    replay_bytes: int
    minibatch: int
    epochs: float
    learning_rate: float
    label_smoothing: float
    seed: int
    unknown_rate: float = 0.0


class Trainer:
    """The learner's state, changed by `take` and `sleep` alone.

    adapted: the blocks above the split, where tokens are stored for them; they take the place of the trained head. place: where either
    computes.
    """

    def __init__(
        self, codec: LatentCodec, width: int, settings: TrainerSettings, adapted: Optional[Adapted] = None, place: Optional[Place] = None
    ) -> None:
        self.place = place or Place()
        self._codec = codec
        self._width = width
        self._settings = settings
        self.sums = RidgeSums(width)
        self.memory = ReplayMemory(str(codec), codec.code_bytes, settings.replay_bytes, settings.seed)
        self.head: Optional[AdaptiveHead] = None
        self.adapted = adapted
        self.prequential = Prequential()
        self.foresight = Foresight()
        self.version = 0
        self.seq = 0
        self.evicted: List[str] = []
        self.last_verdict: Optional[Verdict] = None
        self._holdout: Dict[str, Tuple[int, bytes]] = {}

    # --- learning -----------------------------------------------------------------------------------------------------

    def take(self, batch: Sequence[Entry]) -> Iterator[int]:
        """Learns one request's entries; yields before every step, so that the caller may let others go first.

        A trainer whose `take` was not run to its end is half-taught: it must not be saved.
        """
        self.seq = batch[-1].seq
        if not any(_teaches(entry) for entry in batch):
            return
        self.version += 1
        taught = [entry for entry in batch if entry.code is not None and entry.class_id is not None and entry.was is None]
        self.foresight.look(taught, self.features(_codes_and_classes(taught)[0]))
        fresh: List[Entry] = []
        for entry in batch:
            brings = yield from self._apply(entry)
            fresh += [entry] if brings else []
        if self.foresight.is_due(self.sums):
            yield 0
            self.foresight.renew(self.sums)
        if self.adapted is not None:
            yield 0
            codes, class_ids = _codes_and_classes(fresh)
            self.adapted.learn(codes, class_ids, self.features(codes), batch[0].seq)
            if self.adapted.wants_rivals():
                yield 0
                self.adapted.set_rivals(self.sums.solve())
        else:
            yield from self._train(fresh, batch[0].seq)

    def wants_sleep(self) -> bool:
        """Whether enough was learned since the last sleep for another one to be worth its time."""
        return self.adapted is not None and self.adapted.is_due(self.sums.count, self.memory)

    def sleep(self) -> Iterator[int]:
        """One sleep of the adapted blocks; yields between its steps, where `take` may come in between. Its end makes a new version."""
        assert self.adapted is not None, "nothing sleeps without adapted blocks"
        sleeps = self.adapted.sleeps
        yield from self.adapted.sleep(self.memory, self._holdout, self.sums.count)
        self.version += self.adapted.sleeps - sleeps
        self.adapted.set_rivals(self.sums.solve())

    def tokens(self, codes: Sequence[bytes]) -> Optional[NDArray[np.float32]]:
        """(B, N, D) decoded tokens; None where none are stored."""
        if self._codec.tokens is None or not codes:
            return None
        return self._codec.decode_tokens(np.frombuffer(b"".join(codes), dtype=np.uint8).reshape(len(codes), -1))

    def features(self, codes: Sequence[bytes]) -> NDArray[np.float32]:
        """(B, F) decoded latents."""
        if not codes:
            return np.zeros((0, self._width), np.float32)
        packed = np.frombuffer(b"".join(codes), dtype=np.uint8).reshape(len(codes), -1)
        return self._codec.decode_features(packed)

    def _apply(self, entry: Entry) -> Generator[int, None, bool]:
        """Changes sums and memory; returns True when the entry brings a sample to train on."""
        if entry.kind == "forget_class" and entry.class_id is not None:
            yield from self._forget_class(entry.class_id)
        elif entry.kind == "forget" and entry.was is not None:
            yield from self._forget(entry, entry.was)
        elif entry.kind == "relabel" and entry.was is not None and entry.class_id is not None:
            return self._relabel(entry, entry.was, entry.class_id)
        elif entry.kind in ("sample", "relabel") and entry.code is not None and entry.class_id is not None:
            if not entry.holdout:
                self.sums.add(self.features([entry.code]), [entry.class_id])
            self._keep(entry)
            if self.adapted is not None and entry.holdout:
                self.adapted.hold_out(entry.sample_id, entry.code)
            return not entry.holdout
        return False

    def _keep(self, entry: Entry) -> None:
        assert entry.class_id is not None and entry.code is not None, "only labelled samples with a latent are kept"
        if entry.holdout:
            self._holdout[entry.sample_id] = (entry.class_id, entry.code)
            return
        gone = self.memory.admit(entry.sample_id, entry.class_id, entry.code)
        if gone is not None:
            self.evicted.append(gone)

    def _relabel(self, entry: Entry, was: int, class_id: int) -> bool:
        """Moves a learned sample; the head is shown it under its new label."""
        if entry.sample_id in self._holdout:
            self._holdout[entry.sample_id] = (class_id, self._holdout[entry.sample_id][1])
        if entry.holdout or entry.code is None:
            return False
        self.sums.move(self.features([entry.code]), was, class_id)
        if not self.memory.relabel(entry.sample_id, class_id):
            self.evicted.append(entry.sample_id)  # given up before; its latent was waiting for this entry
        elif self.adapted is not None:
            self.adapted.move(
                entry.code, was, class_id
            )  # of the others nobody knows whether the adapted sums hold them; sleep makes them anew
        return True

    def _drop_kept(self, sample_id: str) -> None:
        self._holdout.pop(sample_id, None)
        self.memory.remove(sample_id)

    def _drop_class(self, class_id: int) -> None:
        self._holdout = {key: value for key, value in self._holdout.items() if value[0] != class_id}
        self.memory.remove_class(class_id)

    def _forget(self, entry: Entry, was: int) -> Iterator[int]:
        """Undoes one sample: exactly where its latent is still there, else by learning the rest again."""
        self._drop_kept(entry.sample_id)
        if entry.holdout:
            return
        if entry.code is not None:
            self.sums.remove(self.features([entry.code]), [was])
        else:
            yield from self._rebuild()
        self._untrain()

    def _forget_class(self, class_id: int) -> Iterator[int]:
        """Undoes a class: exactly where all its latents are still there, else by learning the rest again."""
        whole = self.memory.counts().get(class_id, 0) == self.sums.count_of(class_id)
        for step, chunk in enumerate(self.memory.all() if whole else ()):
            yield step
            chosen = chunk.class_ids == class_id
            self.sums.remove(self._codec.decode_features(chunk.codes[chosen]), chunk.class_ids[chosen].tolist())
        self._drop_class(class_id)
        self.prequential.forget_class(class_id)
        self.foresight.forget(class_id)
        if not whole:
            yield from self._rebuild()
        self._untrain()

    def _untrain(self) -> None:
        """Drops what was made of all samples together: what one of them did to it can't be taken out again."""
        self.head = None
        self.foresight.forget()
        if self.adapted is not None:
            self.adapted.forget()

    def _rebuild(self) -> Iterator[int]:
        """Sums from the replay memory alone: exact as long as nothing was evicted, otherwise without the evicted samples."""
        self.sums = RidgeSums(self._width)
        for step, chunk in enumerate(self.memory.all()):
            yield step
            self.sums.add(self._codec.decode_features(chunk.codes), chunk.class_ids.tolist())

    def _train(self, fresh: Sequence[Entry], first_seq: int) -> Iterator[int]:
        """Latent replay: each new latent about `epochs` times, beside class-balanced replay."""
        if not self._ready() or self._settings.epochs <= 0:
            return
        rng = np.random.Generator(np.random.PCG64([self._settings.seed, first_seq]))
        new_each = max(1, round(self._settings.minibatch * NEW_SHARE))
        if self.head is None:
            self.head = self._new_head(*self.sums.moments())
            steps = round(self._settings.epochs * self.memory.used / new_each)  # catch up with all that is kept
            fresh = []
        elif fresh:
            steps = round(self._settings.epochs * len(fresh) / new_each)
        else:
            return  # duplicates, hold-out, a new name: nothing to train on
        self.head.grow([class_id for class_id in self.sums.class_ids if self.sums.count_of(class_id)])
        codes, new_ids = _codes_and_classes(fresh)
        new = self.features(codes)
        for step in range(max(1, steps)):
            yield step
            self._train_step(new, new_ids, new_each, rng)

    def _train_step(self, new: NDArray[np.float32], new_ids: Sequence[int], new_each: int, rng: np.random.Generator) -> None:
        assert self.head is not None, "the head is made before its first step"
        chosen = rng.permutation(len(new))[:new_each]
        replayed, replayed_ids = self.memory.draw(self._settings.minibatch - len(chosen), rng)
        features = np.concatenate([new[chosen], self._codec.decode_features(replayed)])
        self.head.train_step(features, [new_ids[i] for i in chosen] + replayed_ids.tolist(), rng)

    def _ready(self) -> bool:
        return self.memory.used >= MIN_TRAIN and sum(1 for count in self.memory.counts().values() if count) >= 2

    def _new_head(self, mean: NDArray[np.float32], deviation: NDArray[np.float32]) -> AdaptiveHead:
        rate, smoothing = self._settings.learning_rate, self._settings.label_smoothing
        return AdaptiveHead(mean, deviation, learning_rate=rate, label_smoothing=smoothing, seed=self._settings.seed, place=self.place)

    # --- answering ----------------------------------------------------------------------------------------------------

    def candidate(self, names: Mapping[int, str], published_at: float) -> Tuple[Snapshot, AccuracyReport]:
        """The next snapshot, calibrated and gated on the hold-out, and its accuracy. names: class id -> name now.

        A class without a name was forgotten, and its turn in the log is still to come: nobody is answered with it.
        """
        analytic = _only(self.sums.solve(), names)
        column = {class_id: index for index, class_id in enumerate(analytic.class_ids)}
        held = {sample_id: item for sample_id, item in self._holdout.items() if item[0] in column}
        columns = np.array([column[class_id] for class_id, _ in held.values()], dtype=np.int64)
        features = self.features([code for _, code in held.values()])
        part, opinion = self._trained_part(names, list(held), features)
        verdict = self._weighed(judge(analytic, opinion, features, columns), analytic, features, columns, opinion)
        self.last_verdict = verdict
        labels = tuple(names[class_id] for class_id in analytic.class_ids)
        below, why_not = self.foresight.answers.threshold(self._settings.unknown_rate)
        snapshot = Snapshot(
            version=self.version,
            class_ids=analytic.class_ids,
            labels=labels,
            analytic=analytic,
            trained=part if isinstance(part, TrainedHead) and verdict.weight else None,
            weight=verdict.weight,
            temperature=verdict.temperature,
            unknown_below=below,
            published_at=published_at,
            seq=self.seq,
            adapted=replace(part, temperature=verdict.opinion_temperature) if isinstance(part, AdaptedHead) and verdict.weight else None,
        )
        answers = [analytic.class_ids[int(answer)] for answer in verdict.answers]
        accuracy = report(names, self.prequential, [class_id for class_id, _ in held.values()], answers, self.foresight.drift.of)
        strange = int(refused(analytic, features, below).sum())
        unknown = UnknownReport(self._settings.unknown_rate, below, why_not, len(self.foresight.answers), strange, len(held))
        return snapshot, replace(accuracy, unknown=unknown)

    def _trained_part(
        self, names: Mapping[int, str], held: Sequence[str], features: NDArray[np.float32]
    ) -> Tuple[Union[TrainedHead, AdaptedHead, None], Optional[Opinion]]:
        """What gradients have made, and what it says of the hold-out samples `held` with these features."""
        if self.adapted is not None and self.adapted.serving is not None:
            head = _only(self.adapted.head(), names)
            return AdaptedHead(self.adapted.serving, head, 1.0), self.adapted.opinion(head, held)
        if self.head is None:
            return None, None
        trained = self.head.frozen()
        return trained, Opinion(trained.class_ids, trained.scores(features))

    def _weighed(
        self,
        verdict: Verdict,
        analytic: LinearHead,
        features: NDArray[np.float32],
        columns: NDArray[np.int64],
        opinion: Optional[Opinion],
    ) -> Verdict:
        """The verdict of what was answered before it was learned, where there are adapted blocks and enough of it; the hold-out only
        objects where it would flip too much.
        """
        table = self.adapted.evidence.table(analytic.class_ids) if self.adapted is not None else None
        if opinion is None or table is None or len(table.columns) < MIN_HOLDOUT:
            return verdict
        own = Opinion(analytic.class_ids, table.own, TEMPERATURES)
        found = decide(analytic.class_ids, table.floor, own, table.columns, table.groups, "before learning")
        return unless_it_flips(found, analytic, opinion, features, columns)

    # --- checkpoint ---------------------------------------------------------------------------------------------------

    def state(self) -> Tuple[Dict[str, NDArray[Any]], Dict[str, Any]]:
        """Arrays and a JSON-able dict that `restore` takes back; the latents of replay memory and hold-out come back from the journal."""
        arrays: Dict[str, NDArray[Any]] = dict(self.sums.state())
        arrays["memory.seqs"] = np.array([seq_of(sample_id) for sample_id in self.memory.ids()], dtype=np.int64)
        if self.head is not None:
            arrays.update(self.head.state())
        steps = self.head.steps if self.head is not None else 0
        adapted: Dict[str, Any] = {}
        if self.adapted is not None:
            more, adapted = self.adapted.state()
            arrays.update(more)
        more, foresight = self.foresight.state()
        arrays.update(more)
        facts = {
            "adapted": adapted,
            "foresight": foresight,
            "version": self.version,
            "seq": self.seq,
            "steps": steps,
            "prequential": self.prequential.state(),
            "memory": self.memory.state(),
        }
        return arrays, facts

    def restore(self, arrays: Dict[str, NDArray[Any]], facts: Mapping[str, Any], log: Iterable[Entry]) -> None:
        """Takes back what `state` gave; log: the entries up to the checkpoint, from which memory and hold-out are filled again.

        Samples that had left the memory but whose latents are still stored come out as evicted again: a crash came between.
        """
        inside = set(arrays["memory.seqs"].tolist())
        kept = _survivors(log)
        self._holdout = {sample_id: (class_id, code) for sample_id, (class_id, code, holdout) in kept.items() if holdout}
        others = [(sample_id, class_id, code) for sample_id, (class_id, code, holdout) in kept.items() if not holdout]
        self.evicted += [sample[0] for sample in others if seq_of(sample[0]) not in inside]
        self.evicted += self.memory.restore(facts["memory"], (sample for sample in others if seq_of(sample[0]) in inside))
        self.sums.restore(arrays)
        if "head.shift" in arrays:
            self.head = self._new_head(np.zeros(self._width, np.float32), np.ones(self._width, np.float32))
            self.head.restore(arrays, facts["steps"])
        if self.adapted is not None and facts["adapted"]:
            self.adapted.restore(arrays, facts["adapted"], self._holdout)
        self.version, self.seq = int(facts["version"]), int(facts["seq"])
        self.prequential.restore(facts["prequential"])
        if "foresight" in facts:  # a version from before there was one begins with none
            self.foresight.restore(arrays, facts["foresight"])

    def holdout_bytes(self) -> int:
        return sum(len(code) for _, code in self._holdout.values())


def _codes_and_classes(entries: Sequence[Entry]) -> Tuple[List[bytes], List[int]]:
    """Of those that have both."""
    pairs = [(entry.code, entry.class_id) for entry in entries]
    return [code for code, _ in pairs if code is not None], [class_id for _, class_id in pairs if class_id is not None]


def _teaches(entry: Entry) -> bool:
    """Whether the entry makes a new version: a duplicate, or an image that nobody labelled, does not."""
    if entry.kind == "sample":
        return entry.code is not None and entry.class_id is not None
    return entry.kind != "forget" or entry.was is not None


def _survivors(log: Iterable[Entry]) -> Dict[str, Tuple[int, bytes, bool]]:
    """sample id -> (class, code, hold-out) of what is still kept at the end of the log, in the order it came."""
    kept: Dict[str, Tuple[int, bytes, bool]] = {}
    for entry in log:
        if entry.kind == "forget":
            kept.pop(entry.sample_id, None)
        elif entry.kind == "forget_class":
            kept = {sample_id: item for sample_id, item in kept.items() if item[0] != entry.class_id}
        elif entry.kind in ("sample", "relabel") and entry.code is not None and entry.class_id is not None:
            kept[entry.sample_id] = (entry.class_id, entry.code, entry.holdout)
    return kept


def _only(head: LinearHead, names: Mapping[int, str]) -> LinearHead:
    columns = [column for column, class_id in enumerate(head.class_ids) if class_id in names]
    if len(columns) == len(head.class_ids):
        return head
    return head.only(columns)
