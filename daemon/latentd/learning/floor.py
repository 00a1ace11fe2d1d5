"""The floor and what it is made of: sums, replay memory and hold-out, always in step, and the samples whose label is doubted.

Of two memories one keeps the features of every sample, from which the floor can be made again, and the other, where blocks above the split
learn, the tokens of as many as fit (`Whole`). What is doubted stays stored, but in no sum and in no replay, until another look or a person
clears it. Everything here is the same whenever the same log is learned. Owned by the learner thread; nothing blocks.
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import AbstractSet, Any, Dict, Iterable, Iterator, List, Mapping, Sequence, Set, Tuple

import numpy as np
from numpy.typing import NDArray

from latentd.learning.analytic import RidgeSums
from latentd.learning.doubt import Doubts
from latentd.replay.latents import LatentCodec
from latentd.replay.memory import DOUBTED, PLAIN, VOUCHED, ReplayMemory
from latentd.replay.packing import Bytes
from latentd.replay.records import Entry, seq_of

logger = logging.getLogger(__name__)

HELD_SHARE = 8  # of the bytes for tokens, one part in so many is the hold-out's
Held = Mapping[str, Tuple[int, bytes]]  # sample id -> class, code
LOOK_FIRST = 80  # samples before the first look for doubtful labels
LOOK_APART = 256  # and between two: at 1,536 features the two solutions of a look take about as long as ten images in the frozen stage;
# of many samples, going over them takes longer: some seconds at 31,000, every 15 % more
_AT_ONCE = 64  # samples that sums take or give in one step: their rank-64 update costs as much as one of rank 1
LOOK_GROWTH = 1.15  # of what was learned between two


class Whole:
    """Samples with their tokens in a budget of bytes: a memory of those that blocks learn from, and an eighth of it for the hold-out."""

    def __init__(self, codec: LatentCodec, token_bytes: int, seed: int) -> None:
        """Raises ConfigError where the budget holds not one latent."""
        held = token_bytes // HELD_SHARE
        self._codec = codec
        self._most_held = held // codec.code_bytes
        self.memory = ReplayMemory(str(codec), codec.code_bytes, token_bytes - held, seed, key="learn.token_bytes")

    def crowds(self, holdout: Held) -> bool:
        """Whether more samples of the hold-out have their tokens than there is room for."""
        return sum(1 for _, code in holdout.values() if self._codec.holds_tokens(code)) > self._most_held

    def outstays(self, holdout: Held) -> str:
        """Whose tokens go: the oldest of the class that has most."""
        having = [(sample_id, class_id) for sample_id, (class_id, code) in holdout.items() if self._codec.holds_tokens(code)]
        counts = Counter(class_id for _, class_id in having)
        most = max(counts.values())
        return next(sample_id for sample_id, class_id in having if counts[class_id] == most)


class Floor:
    """sums: of everything learned but what is doubted. memory: features of samples. whole: samples with their tokens; None where none are
    stored. holdout: sample id -> (class, code). evicted: ids given up since somebody cleared the list; trimmed: those whose tokens were.
    """

    def __init__(self, codec: LatentCodec, width: int, replay_bytes: int, seed: int, doubt_nats: float = 0.0, token_bytes: int = 0) -> None:
        """doubt_nats: see Doubts; 0 doubts nothing."""
        self.sums = RidgeSums(width)
        self.memory = ReplayMemory(str(codec.features.spec), codec.features_bytes, replay_bytes, seed)
        self.whole = None if codec.tokens is None else Whole(codec, token_bytes, seed)
        self.holdout: Dict[str, Tuple[int, bytes]] = {}
        self.evicted: List[str] = []
        self.trimmed: List[str] = []
        self._codec = codec
        self._doubts = Doubts(doubt_nats) if doubt_nats else None
        self._nats = doubt_nats
        self._looked_at = 0  # samples learned at the last look

    def features(self, codes: Sequence[bytes]) -> NDArray[np.float32]:
        """(B, F) decoded latents."""
        return self._codec.features_of(codes)

    def decode(self, codes: Bytes) -> NDArray[np.float32]:
        """The same of codes (B, bytes) in one array."""
        return self._codec.decode_features(codes)

    # --- one entry of the log at a time -------------------------------------------------------------------------------

    def learn(self, entry: Entry) -> None:
        """A sample with its first label."""
        assert entry.class_id is not None and entry.code is not None, "only labelled samples with a latent are learned"
        if entry.holdout:
            self.holdout[entry.sample_id] = (entry.class_id, entry.code)
            if self.whole is not None and self.whole.crowds(self.holdout):
                self._trim_held(self.whole.outstays(self.holdout))
            return
        self.sums.add(self.features([entry.code]), [entry.class_id])
        gone = self.memory.admit(entry.sample_id, entry.class_id, entry.code[: self._codec.features_bytes])
        if gone is not None:
            self.evicted.append(gone)
        if self.whole is not None:
            if gone is not None:
                self.whole.memory.remove(gone)
            if gone != entry.sample_id and self._codec.holds_tokens(entry.code):
                self._keep_whole(self.whole, entry)

    def _keep_whole(self, whole: Whole, entry: Entry) -> None:
        assert entry.class_id is not None and entry.code is not None, "the caller has looked"
        gone = whole.memory.admit(entry.sample_id, entry.class_id, entry.code)
        if gone is not None:
            self.trimmed.append(gone)

    def _trim_held(self, sample_id: str) -> None:
        class_id, code = self.holdout[sample_id]
        self.holdout[sample_id] = (class_id, code[: self._codec.features_bytes])
        self.trimmed.append(sample_id)

    def relabel(self, entry: Entry, was: int, class_id: int) -> bool:
        """Moves a sample; True where it was one to learn from. What a person said twice is never doubted."""
        if entry.sample_id in self.holdout:
            self.holdout[entry.sample_id] = (class_id, self.holdout[entry.sample_id][1])
        if entry.holdout or entry.code is None:
            return False
        if self.memory.standing(entry.sample_id) == DOUBTED:
            self.sums.add(self.features([entry.code]), [class_id])
        else:
            self.sums.move(self.features([entry.code]), was, class_id)
        for memory in self._memories():
            memory.judge(entry.sample_id, VOUCHED)
        if not self.memory.relabel(entry.sample_id, class_id):
            self.evicted.append(entry.sample_id)  # given up before; its latent was waiting for this entry
        if self.whole is not None:
            self.whole.memory.relabel(entry.sample_id, class_id)
        return True

    def _memories(self) -> List[ReplayMemory]:
        return [self.memory] if self.whole is None else [self.memory, self.whole.memory]

    def forget(self, entry: Entry, was: int) -> Iterator[int]:
        """Undoes one sample: exactly where its latent is still there, else by learning the rest again."""
        doubted = self.memory.standing(entry.sample_id) == DOUBTED
        self.holdout.pop(entry.sample_id, None)
        for memory in self._memories():
            memory.judge(entry.sample_id, PLAIN)
            memory.remove(entry.sample_id)
        if entry.holdout or doubted:
            return
        if entry.code is not None:
            self.sums.remove(self.features([entry.code]), [was])
        else:
            yield from self._rebuild()
        self._looked_at = min(self._looked_at, self.sums.count)

    def forget_class(self, class_id: int) -> Iterator[int]:
        """Undoes a class: exactly where all its latents are still there, else by learning the rest again."""
        whole = self.memory.counts().get(class_id, 0) - self.memory.doubted(class_id) == self.sums.count_of(class_id)
        for step, chunk in enumerate(self.memory.all() if whole else ()):
            yield step
            chosen = (chunk.class_ids == class_id) & (chunk.standing != DOUBTED)
            self.sums.remove(self.decode(chunk.codes[chosen]), chunk.class_ids[chosen].tolist())
        self.holdout = {key: value for key, value in self.holdout.items() if value[0] != class_id}
        for memory in self._memories():
            memory.remove_class(class_id)
        if not whole:
            yield from self._rebuild()
        self._looked_at = min(self._looked_at, self.sums.count)

    def _rebuild(self) -> Iterator[int]:
        """Sums from the replay memory alone: exact as long as nothing was evicted, otherwise without the evicted samples."""
        self.sums = RidgeSums(self.sums.width)
        for step, chunk in enumerate(self.memory.all()):
            yield step
            sure = chunk.standing != DOUBTED
            self.sums.add(self.decode(chunk.codes[sure]), chunk.class_ids[sure].tolist())

    # --- doubt --------------------------------------------------------------------------------------------------------

    def wants_look(self) -> bool:
        """Whether enough was learned since the last look for doubtful labels."""
        if self._doubts is None or len(self.memory.counts()) < 2:
            return False
        due = max(self._looked_at + LOOK_APART, LOOK_GROWTH * self._looked_at) if self._looked_at else LOOK_FIRST
        return self.sums.count >= due

    def look(self) -> Iterator[int]:
        """Takes out of the sums what is doubted now, and puts back what is no more; yields between its steps."""
        assert self._doubts is not None, "nothing is looked at by nobody who doubts"
        before = set(self.memory.ids_of(DOUBTED))
        self._looked_at = self.sums.count
        found = yield from self._doubts.look(self.memory, self.sums, self.decode)
        yield from self._judge(sorted(found - before), DOUBTED)
        yield from self._judge(sorted(before - found), PLAIN)
        if found != before:
            logger.info("%d taught samples look wrongly labelled and are left out: GET /v1/samples?doubted=true shows them", len(found))

    def _judge(self, ids: Sequence[str], standing: int) -> Iterator[int]:
        """Out of the sums with these stored samples, or back into them."""
        for start in range(0, len(ids), _AT_ONCE):
            yield start
            some = ids[start : start + _AT_ONCE]
            features, class_ids = self.decode(self.memory.get(some)), [self.memory.class_of(sample_id) for sample_id in some]
            (self.sums.remove if standing == DOUBTED else self.sums.add)(features, class_ids)
            for sample_id in some:
                for memory in self._memories():
                    memory.judge(sample_id, standing)

    # --- checkpoint ---------------------------------------------------------------------------------------------------

    def state(self) -> Tuple[Dict[str, NDArray[Any]], Dict[str, Any]]:
        """Arrays and JSON-able facts that `restore` takes back; the latents of memory and hold-out come back from the journal."""
        arrays: Dict[str, NDArray[Any]] = dict(self.sums.state())
        arrays["memory.seqs"] = np.array([seq_of(sample_id) for sample_id in self.memory.ids()], dtype=np.int64)
        facts = {"memory": self.memory.state(), "looked_at": self._looked_at, "doubt_nats": self._nats}
        if self.whole is not None:
            held = (sample_id for sample_id, (_, code) in self.holdout.items() if self._codec.holds_tokens(code))
            arrays["whole.seqs"] = np.array([seq_of(sample_id) for sample_id in (*self.whole.memory.ids(), *held)], dtype=np.int64)
            facts["whole"] = self.whole.memory.state()
        return arrays, facts

    def restore(self, arrays: Dict[str, NDArray[Any]], facts: Mapping[str, Any], log: Iterable[Entry]) -> bool:
        """Takes back what `state` gave; log: the entries up to the checkpoint, from which memory and hold-out are filled again. True where
        something had been learned that must not be known any more.

        Samples that had left the memory but whose latents are still stored come out as evicted again, and as trimmed those that had
        lost their tokens: a crash came between. Where the journal has lost the label of a sample, the sums are made again without it: by no
        label could it be taken out of them.
        """
        inside = set(arrays["memory.seqs"].tolist())
        kept, unlabelled = _survivors(log)
        self.holdout = {sample_id: (class_id, code) for sample_id, (class_id, code, holdout) in kept.items() if holdout}
        others = [(sample_id, class_id, code) for sample_id, (class_id, code, holdout) in kept.items() if not holdout]
        self.evicted += [sample[0] for sample in others if seq_of(sample[0]) not in inside]
        features = self._codec.features_bytes
        stored = ((sample_id, class_id, code[:features]) for sample_id, class_id, code in others if seq_of(sample_id) in inside)
        self.evicted += self.memory.restore(facts["memory"], stored)
        self._restore_whole(arrays, facts, others)
        self.sums.restore(arrays)
        self._looked_at = int(facts.get("looked_at", 0)) if facts.get("doubt_nats") == self._nats else 0  # another measure: look again soon
        lost = {sample_id for sample_id in unlabelled if seq_of(sample_id) in inside} - set(facts["memory"].get("doubted", ()))
        self._leave_out(lost)
        if self._doubts is None:
            for _ in self._judge(self.memory.ids_of(DOUBTED), PLAIN):
                pass
        return bool(lost)

    def _restore_whole(
        self, arrays: Mapping[str, NDArray[Any]], facts: Mapping[str, Any], others: Sequence[Tuple[str, int, bytes]]
    ) -> None:
        """Tokens of what had them; all others that are stored with tokens are trimmed: a crash came between, or there is no room."""
        everything = [*(seq_of(sample_id) for sample_id in self.holdout), *arrays["memory.seqs"].tolist()]
        inside = set(arrays["whole.seqs"].tolist() if "whole.seqs" in arrays else everything)  # an older version knew one memory
        for sample_id, (_, code) in list(self.holdout.items()):
            if len(code) > self._codec.features_bytes and seq_of(sample_id) not in inside:
                self._trim_held(sample_id)
        long = [sample for sample in others if len(sample[2]) > self._codec.features_bytes]
        known = [sample for sample in long if self.whole is not None and seq_of(sample[0]) in inside and sample[0] in self.memory]
        self.trimmed += sorted({sample[0] for sample in long} - {sample[0] for sample in known})
        if self.whole is not None:
            self.trimmed += self.whole.memory.restore(facts.get("whole") or self.whole.memory.state(), known)
            while self.whole.crowds(self.holdout):  # a smaller budget
                self._trim_held(self.whole.outstays(self.holdout))

    def _leave_out(self, unlabelled: AbstractSet[str]) -> None:
        """Out of the sums with samples that they hold, but the memory does not."""
        if not unlabelled:
            return
        for _ in self._rebuild():
            pass
        self._looked_at = min(self._looked_at, self.sums.count)
        logger.warning(
            "%d learned samples lost their label to damaged rows of the journal, first %s: the closed-form head is made again from the %d "
            "samples of the replay memory; latentd samples --state held lists them, latentd label teaches them again",
            len(unlabelled),
            min(unlabelled),
            self.sums.count,
        )

    def holdout_bytes(self) -> int:
        return sum(len(code) for _, code in self.holdout.values())


def _survivors(log: Iterable[Entry]) -> Tuple[Dict[str, Tuple[int, bytes, bool]], Set[str]]:
    """sample id -> (class, code, hold-out) of what is still kept at the end of the log, in the order it came; and the ids of samples that
    have no label since their row was damaged.
    """
    kept: Dict[str, Tuple[int, bytes, bool]] = {}
    unlabelled: Set[str] = set()
    for entry in log:
        if entry.kind == "forget":
            kept.pop(entry.sample_id, None)
        elif entry.kind == "forget_class":
            kept = {sample_id: item for sample_id, item in kept.items() if item[0] != entry.class_id}
        elif entry.kind == "damaged":
            unlabelled.add(entry.sample_id)
        elif entry.sample_id in unlabelled and entry.was is not None:
            continue  # a correction from before the damage: the journal knows of it no more
        elif entry.kind in ("sample", "relabel") and entry.code is not None and entry.class_id is not None:
            kept[entry.sample_id] = (entry.class_id, entry.code, entry.holdout)
            unlabelled.discard(entry.sample_id)
    return kept, unlabelled
