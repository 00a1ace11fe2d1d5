"""One mini-batch at a time: what the learner does to sums, replay memory, hold-out and trained head, without thread or clock.

Deterministic: the same entries in the same order, with the same seed, give the same weights, whether they came over HTTP, from the
journal after a restart or in process. Owned by the learner thread.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, fields, replace
from typing import Any, Dict, Generator, Iterable, Iterator, List, Mapping, Optional, Sequence, Tuple

import numpy as np
from numpy.typing import NDArray

from latentd.config import LearnConfig
from latentd.learning import rehearsal
from latentd.learning.accuracy import AccuracyReport, Prequential, report
from latentd.learning.adapted import Adapted
from latentd.learning.adaptive import AdaptiveHead, TrainedHead
from latentd.learning.analytic import LinearHead, RidgeSums
from latentd.learning.floor import Floor
from latentd.learning.foresight import Foresight
from latentd.learning.gate import Verdict
from latentd.learning.jury import HeldOut, judged, only_of
from latentd.learning.place import Place
from latentd.learning.snapshot import AdaptedHead, Snapshot
from latentd.learning.unknown import UnknownReport, refused
from latentd.replay.latents import LatentCodec
from latentd.replay.memory import DOUBTED, ReplayMemory
from latentd.replay.records import Entry

MIN_TRAIN = 32  # the head is made when this many samples of two classes are there: its normalisation is fixed from them
NEW_SHARE = (
    21 / 128
)  # new latents in a mini-batch (Pellegrini et al. 2020, "Latent replay for real-time continual learning": 21 new + 107 replayed)
STALE = 1.25  # times what had been learned when a sleep began: its classes, and who is asked in its rehearsal, are those of then


@dataclass(frozen=True)
class TrainerSettings:
    """From the configuration; see there. replay_bytes bounds the replay memory, token_bytes the samples with their tokens."""

    replay_bytes: int
    minibatch: int
    epochs: float
    learning_rate: float
    label_smoothing: float
    seed: int
    unknown_rate: float = 0.0
    doubt_nats: float = 0.0
    token_bytes: int = 48 << 20

    @classmethod
    def of(cls, learn: LearnConfig) -> TrainerSettings:
        return cls(**{field.name: getattr(learn, field.name) for field in fields(cls)})


class Trainer:
    """The learner's state, changed by `take` and `sleep` alone.

    adapted: the blocks above the split, where tokens are stored for them. Where the gate does not let them in, the trained head is asked.
    place: where either computes.
    """

    def __init__(
        self, codec: LatentCodec, width: int, settings: TrainerSettings, adapted: Optional[Adapted] = None, place: Optional[Place] = None
    ) -> None:
        self.place = place or Place()
        self._codec = codec
        self._width = width
        self._settings = settings
        self._floor = Floor(codec, width, settings.replay_bytes, settings.seed, settings.doubt_nats, settings.token_bytes)
        self.head: Optional[AdaptiveHead] = None
        self.adapted = adapted
        self.prequential = Prequential()
        self.foresight = Foresight()
        self.version = 0
        self.seq = 0
        self.last_verdict: Optional[Verdict] = None

    @property
    def sums(self) -> RidgeSums:
        return self._floor.sums

    @property
    def memory(self) -> ReplayMemory:
        return self._floor.memory

    @property
    def evicted(self) -> List[str]:
        """Samples that left the replay memory; whoever deals with them clears it."""
        return self._floor.evicted

    @property
    def trimmed(self) -> List[str]:
        """Samples that lost their tokens; whoever deals with them clears it."""
        return self._floor.trimmed

    @property
    def whole(self) -> Optional[ReplayMemory]:
        """Samples with their tokens; None where none are stored."""
        return None if self._floor.whole is None else self._floor.whole.memory

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
        if self._floor.wants_look():
            yield from self._floor.look()
        doubted = {entry.sample_id for entry in fresh if self.memory.standing(entry.sample_id) == DOUBTED}
        fresh = [entry for entry in fresh if entry.sample_id not in doubted]
        if self.foresight.is_due(self.sums):
            yield 0
            self.foresight.renew(self.sums)
        if self.adapted is not None:
            yield 0
            new = [entry for entry in fresh if entry.was is None]  # the others were moved
            codes, class_ids = _codes_and_classes([entry for entry in new if entry.code and self._codec.holds_tokens(entry.code)])
            self.adapted.leave_out(doubted)
            self.adapted.bare += len(new) - len(codes)
            self.adapted.learn(codes, class_ids, self.features(codes), batch[0].seq)
            if self.adapted.wants_rivals():
                yield 0
                self.adapted.set_rivals(self.sums.solve())
        yield from self._train(fresh, batch[0].seq)

    def wants_sleep(self) -> bool:
        """Whether enough was learned since the last sleep for another one to be worth its time."""
        return (
            self.adapted is not None and self.whole is not None and self.adapted.is_due(self._with_tokens(), self.whole, self.memory.slots)
        )

    def _with_tokens(self) -> int:
        """Samples learned so far that had tokens then; of those without, forgotten ones count no more."""
        assert self.adapted is not None and self.whole is not None, "nobody else asks"
        return self.sums.count - min(self.adapted.bare, max(0, self.sums.count - self.whole.used))

    def sleep(self) -> Iterator[int]:
        """One sleep of the adapted blocks; yields between its steps, where `take` may come in between. Its end makes a new version."""
        assert self.adapted is not None and self.whole is not None, "nothing sleeps without adapted blocks"
        sleeps = self.adapted.sleeps
        yield from self._until_stale(self._sleep(self.adapted, self.whole))
        if self.adapted.sleeps > sleeps:
            self.version += 1
            self.adapted.set_rivals(self.sums.solve())

    def _sleep(self, adapted: Adapted, whole: ReplayMemory) -> Generator[int, None, None]:
        if not rehearsal.wanted(adapted) or (yield from rehearsal.rehearse(adapted, self._floor, self._settings.seed)):
            yield from adapted.sleep(whole, self._floor.holdout, self._with_tokens())

    def _until_stale(self, sleep: Generator[int, None, None]) -> Iterator[int]:
        """The same steps; none any more once so much was learned meanwhile that another sleep would know better."""
        stale_at = STALE * self.sums.count
        with closing(sleep):
            for step in sleep:
                yield step
                if self.sums.count > stale_at:
                    return

    def tokens(self, codes: Sequence[bytes]) -> Optional[NDArray[np.float32]]:
        """(B, N, D) decoded tokens; None where one of them has none."""
        if not codes or not all(self._codec.holds_tokens(code) for code in codes):
            return None
        return self._codec.decode_tokens(np.frombuffer(b"".join(codes), dtype=np.uint8).reshape(len(codes), -1))

    def features(self, codes: Sequence[bytes]) -> NDArray[np.float32]:
        """(B, F) decoded latents."""
        return self._floor.features(codes)

    def _apply(self, entry: Entry) -> Generator[int, None, bool]:
        """Changes sums and memory; returns True when the entry brings a sample to train on."""
        if entry.kind == "forget_class" and entry.class_id is not None:
            self.prequential.forget_class(entry.class_id)
            self.foresight.forget(entry.class_id)
            yield from self._floor.forget_class(entry.class_id)
            self._untrain()
        elif entry.kind == "forget" and entry.was is not None:
            yield from self._floor.forget(entry, entry.was)
            if not entry.holdout:
                self._untrain()
            elif self.adapted is not None:
                self.adapted.hold_no_more([entry.sample_id])
        elif entry.kind == "relabel" and entry.was is not None and entry.class_id is not None:
            return self._relabel(entry, entry.was, entry.class_id)
        elif entry.kind in ("sample", "relabel") and entry.code is not None and entry.class_id is not None:
            trimmed = len(self.trimmed)
            self._floor.learn(entry)
            if self.adapted is not None and entry.holdout and self._codec.holds_tokens(entry.code):
                self.adapted.hold_out(entry.sample_id, entry.code)
            if self.adapted is not None:  # last: with little room it is the new one that has lost its tokens
                self.adapted.hold_no_more(self.trimmed[trimmed:])
            return not entry.holdout
        return False

    def _relabel(self, entry: Entry, was: int, class_id: int) -> bool:
        """Moves a learned sample; the head is shown it under its new label."""
        moved = self._floor.relabel(entry, was, class_id)
        if moved and self.adapted is not None and self.whole is not None and entry.sample_id in self.whole:
            # of the others nobody knows whether the adapted sums hold them; sleep makes them anew
            self.adapted.move(entry.sample_id, self.whole.get([entry.sample_id]).tobytes(), was, class_id)
        return moved

    def _untrain(self) -> None:
        """Drops what was made of all samples together: what one of them did to it can't be taken out again."""
        self.head = None
        self.foresight.forget()
        if self.adapted is not None:
            self.adapted.forget()

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
        analytic = only_of(self.sums.solve(), names)
        part, verdict, asked = judged(analytic, self.head, self.adapted, self._held_out(analytic), names)
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
            adapted=part if isinstance(part, AdaptedHead) and verdict.weight else None,
        )
        answers = [analytic.class_ids[int(answer)] for answer in verdict.answers]
        accuracy = report(names, self.prequential, asked.class_ids, answers, self.foresight.drift.of)
        strange = int(refused(analytic, asked.features, below).sum())
        unknown = UnknownReport(self._settings.unknown_rate, below, why_not, len(self.foresight.answers), strange, len(asked.ids))
        return snapshot, replace(accuracy, unknown=unknown)

    def _held_out(self, analytic: LinearHead) -> HeldOut:
        """What is held out of the classes that this head answers."""
        column = {class_id: index for index, class_id in enumerate(analytic.class_ids)}
        held = {sample_id: item for sample_id, item in self._floor.holdout.items() if item[0] in column}
        class_ids = tuple(class_id for class_id, _ in held.values())
        columns = np.array([column[class_id] for class_id in class_ids], dtype=np.int64)
        return HeldOut(tuple(held), class_ids, self.features([code for _, code in held.values()]), columns)

    # --- checkpoint ---------------------------------------------------------------------------------------------------

    def state(self) -> Tuple[Dict[str, NDArray[Any]], Dict[str, Any]]:
        """Arrays and a JSON-able dict that `restore` takes back; the latents of replay memory and hold-out come back from the journal."""
        arrays, floor = self._floor.state()
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
            **floor,
            "adapted": adapted,
            "foresight": foresight,
            "version": self.version,
            "seq": self.seq,
            "steps": steps,
            "prequential": self.prequential.state(),
        }
        return arrays, facts

    def restore(self, arrays: Dict[str, NDArray[Any]], facts: Mapping[str, Any], log: Iterable[Entry]) -> None:
        """Takes back what `state` gave; log: the entries up to the checkpoint."""
        something_lost = self._floor.restore(arrays, facts, log)
        if "head.shift" in arrays:
            self.head = self._new_head(np.zeros(self._width, np.float32), np.ones(self._width, np.float32))
            self.head.restore(arrays, facts["steps"])
        if self.adapted is not None and not (facts.get("adapted") and self.adapted.restore(arrays, facts["adapted"], self._floor.holdout)):
            self.adapted.bare = max(0, self.sums.count - (0 if self.whole is None else self.whole.used))  # what was learned before
        self.version, self.seq = int(facts["version"]), int(facts["seq"])
        self.prequential.restore(facts["prequential"])
        if "foresight" in facts:  # a version from before there was one begins with none
            self.foresight.restore(arrays, facts["foresight"])
        if something_lost:
            self._untrain()

    def holdout_bytes(self) -> int:
        return self._floor.holdout_bytes()


def _codes_and_classes(entries: Sequence[Entry]) -> Tuple[List[bytes], List[int]]:
    """Of those that have both."""
    pairs = [(entry.code, entry.class_id) for entry in entries]
    return [code for code, _ in pairs if code is not None], [class_id for _, class_id in pairs if class_id is not None]


def _teaches(entry: Entry) -> bool:
    """Whether the entry makes a new version: a duplicate, or an image that nobody labelled, does not."""
    if entry.kind == "sample":
        return entry.code is not None and entry.class_id is not None
    return entry.kind != "forget" or entry.was is not None
