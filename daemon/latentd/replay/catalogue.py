"""What the journal knows, and the rules of changing it: labels, duplicates, hold-out, budget, forgetting.

Runs on the journal thread inside its commit groups; nothing here commits. A method validates first and writes after: one that raises a
LatentdError has written nothing that matters (a BudgetFull may have dropped spent records). What is in memory (classes, sketches) is
rebuilt from the store by `load`, at start and after a failed commit; rows that can't be read are set aside then.
"""

from __future__ import annotations

import itertools
import json
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple, cast

import numpy as np
from numpy.typing import NDArray

from latentd.errors import BudgetFull, Conflict, SampleNotFound
from latentd.replay.aside import DAMAGE, Aside
from latentd.replay.class_table import ClassTable
from latentd.replay.duplicates import DuplicateIndex
from latentd.replay.key_table import KeyTable
from latentd.replay.latents import LatentCodec
from latentd.replay.limits import JournalLimits
from latentd.replay.log_table import LogTable, Row
from latentd.replay.records import (
    ChangeRow,
    ClassRecord,
    Entry,
    Idempotency,
    NewSample,
    Recalled,
    SampleRecord,
    SampleRow,
    sample_id_of,
    seq_of,
)
from latentd.replay.store import Store

PRUNE_AGAIN_S = 60.0  # after a search for spent records that found too little
_ROW_BYTES = 800  # of a record with its keys and indexes, rounded up
_PRUNE = 1024
_PASSED_OVER = 4096  # rows that a page of samples may look at in vain: nobody else is served meanwhile


class Catalogue:
    """Samples, classes and changes over a Store; see the module docstring.

    stored: labelled samples whose latent is kept. purge_due: deleted bytes may still lie in the store's log.
    """

    def __init__(self, store: Store, codec: LatentCodec, feature_width: int, limits: JournalLimits, clock: Callable[[], float]) -> None:
        self._store = store
        self._aside = Aside(store)
        self._log = LogTable(store, self._aside, lambda code: self._index.sketch(self._latent(code)))
        self._classes = ClassTable(store, clock, self._aside)
        self._keys = KeyTable(store, clock, self._aside)
        self._codec = codec
        self._limits = limits
        self._clock = clock
        self._index = DuplicateIndex(feature_width, limits.seed, limits.duplicate_cosine)
        self._unsettled: Dict[int, Sequence[int]] = {}  # sequence number of a wish to forget -> the samples to wipe
        self._prunable_seq = 0
        self._prune_at = 0.0
        self.head_seq = 0
        self.stored = 0
        self.purge_due = True

    def load(self) -> None:
        """Rebuilds what is in memory from the store."""
        self._classes.load()
        self.head_seq = self._aside.number("m/seq") or 0
        forgotten: Dict[Optional[int], List[int]] = {}
        for row in self._log.rows():
            self.head_seq = max(self.head_seq, row.seq)
            if isinstance(row, SampleRow):
                self._remember(row)
                self._classes.recount(row)
                if row.state == "forgotten" and (row.kept or row.sha256):
                    forgotten.setdefault(row.class_id, []).append(row.seq)
            elif not row.settled:
                self._unsettled[row.seq] = [row.target] if row.target is not None else forgotten.get(row.class_id, [])
        wished = {target for targets in self._unsettled.values() for target in targets}
        orphans = [target for targets in forgotten.values() for target in targets if target not in wished]
        if orphans:  # the wish to forget them is a row that was damaged
            self._unsettled[self.head_seq] = orphans

    # --- teaching -----------------------------------------------------------------------------------------------------

    def admit(self, batch: Sequence[NewSample], idempotency: Optional[Idempotency]) -> Tuple[SampleRecord, ...]:
        for sample in batch:
            if sample.label is not None:
                self._limits.check_label(sample.label)
        slots = [] if idempotency is None else idempotency.slots
        self._require_budget(sum(len(sample.code) + _ROW_BYTES for sample in batch) + len(json.dumps(slots)))
        first = self.head_seq + 1
        rows = [self._admit_one(sample, first) for sample in batch]
        if idempotency is not None:
            self._keys.write(idempotency, [row.seq for row in rows])
        self._write_seq()
        return tuple(self._record(row, 0) for row in rows)

    def _admit_one(self, sample: NewSample, first: int) -> SampleRow:
        self.head_seq += 1
        class_id = None if sample.label is None else self._classes.made(sample.label).class_id
        sketch = self._index.sketch(sample.features)
        state = "held" if class_id is None else "stored"
        row = SampleRow(self.head_seq, first, class_id, class_id, self._clock(), sample.sha256, sketch, state)
        if class_id is not None:
            row.duplicate_of = self._duplicate_of(class_id, sample, sketch)
        if row.duplicate_of is not None:
            row.state, row.kept = "duplicate", False
        else:
            row.holdout = self._holds_out(class_id)
            self._log.put_latent(row.seq, sample.code)
            self._enrol(row)
        self._log.write(row)
        return row

    def _duplicate_of(self, class_id: int, sample: NewSample, sketch: bytes) -> Optional[int]:
        """The sample of the class taught from the same bytes, kept or not, or the nearest kept one that is almost the same."""
        same = self._log.image_owner(class_id, sample.sha256)
        if same is not None or self._limits.duplicate_cosine > 1:
            return same
        near = self._index.candidates(class_id, sketch)
        mine = self._latent(sample.code) if near else np.zeros(0, np.float32)
        for seq in near:
            code = self._log.latent(seq)
            if code is not None:
                other = self._latent(code)
                if float(mine @ other) >= self._limits.duplicate_cosine * float(np.linalg.norm(mine) * np.linalg.norm(other)):
                    return seq
        return None

    def _latent(self, code: bytes) -> NDArray[np.float32]:
        return cast("NDArray[np.float32]", self._codec.features_of([code])[0])

    def _holds_out(self, class_id: Optional[int]) -> bool:
        """Whether the next sample of the class is kept out of training: never more than one in `holdout_every`, also after forgetting."""
        record, every = self._classes.get(class_id), self._limits.holdout_every
        if record is None or every < 1 or record.holdout >= self._limits.holdout_per_class:
            return False
        return (record.holdout + 1) * every <= record.samples + 1

    # --- changing -----------------------------------------------------------------------------------------------------

    def relabel(self, sample_id: str, label: str, learned_seq: int, again: bool = False) -> SampleRecord:
        row = self._sample_row(sample_id)
        self._limits.check_label(label)
        if not row.kept or row.state not in ("stored", "held"):
            raise Conflict(f"{sample_id} is {row.state}: its latent is stored no more", hint="Teach the image again under the right label.")
        known = self._classes.find(label)
        heard = row.changed <= learned_seq  # or the learner is about to hear of it
        if (again and heard) or known is None or known.class_id != row.class_id:
            self._require_budget(_ROW_BYTES)
            was, class_id = row.class_id, self._classes.made(label).class_id
            self._strike(row)
            row.class_id, row.state = class_id, "stored"
            row.changed = self._append("relabel", row.seq, class_id, was)
            self._enrol(row)
            self._log.write(row)
        return self._record(row, learned_seq)

    def forget(self, sample_id: str, learned_seq: int) -> SampleRecord:
        row = self._sample_row(sample_id)
        if row.state != "forgotten":
            was = row.class_id if row.state in ("stored", "evicted") else None  # a duplicate was never learned
            self._strike(row)
            row.state = "forgotten"
            self._log.write(row)
            self._unsettled[self._append("forget", row.seq, None, was)] = [row.seq]
        return self._record(row, learned_seq)

    def forget_class(self, name: str) -> ClassRecord:
        record = self._classes.named(name)
        self._classes.remove(record)
        rows = [
            row for row in self._log.rows() if isinstance(row, SampleRow) and row.class_id == record.class_id and row.state != "forgotten"
        ]
        for row in rows:
            self._strike(row)
            row.state = "forgotten"
            self._log.write(row)
        self._unsettled[self._append("forget_class", None, record.class_id, None)] = [row.seq for row in rows]
        return record

    def put_class(self, name: str, rename_to: Optional[str]) -> Tuple[ClassRecord, bool]:
        self._limits.check_label(name)
        if rename_to is None:
            known = self._classes.find(name)
            if known is not None:
                return known, False
            self._require_budget(_ROW_BYTES)
            return self._classes.made(name), True
        self._limits.check_label(rename_to)
        record = self._classes.named(name)
        if rename_to == name:
            return record, False
        if self._classes.find(rename_to) is not None:
            raise Conflict(f"there is a class named {rename_to} already", hint="Forget one of them, or relabel its samples.")
        self._require_budget(_ROW_BYTES)
        self._append("rename", None, record.class_id, None)
        return self._classes.rename(record, rename_to), False

    def settle(self, seq: int, evicted: Sequence[str], prunable_seq: int, trimmed: Sequence[str] = ()) -> None:
        """The learner's state up to `seq` is durable: wipes what was forgotten before, and drops the latents and tokens it gave up.

        prunable_seq: every version on the disk has learned the log up to here.
        """
        for sample_id in trimmed:
            self._log.trim_latent(seq_of(sample_id), self._codec.features_bytes)
        for sample_id in evicted:
            row = self._log.sample(seq_of(sample_id))
            if row is not None and row.kept and row.state == "stored" and row.changed <= seq:  # a relabel to come needs the latent
                self._drop_latent(row)
        for change in [change for change in self._unsettled if change <= seq]:
            for target in self._unsettled.pop(change):
                self._wipe(target)
            wish = self._log.change(change)
            if wish is not None:
                wish.settled = True
                self._log.write(wish)
            self.purge_due = True
        self._prunable_seq, self._prune_at = max(self._prunable_seq, prunable_seq), 0.0

    def drop_tokens(self) -> None:
        self._log.trim_latents(self._codec.features_bytes)

    def _drop_latent(self, row: SampleRow) -> None:
        self._unindex(row)
        row.state, row.kept = "evicted", False
        self._log.write(row)
        self._log.delete_latent(row.seq)

    def _wipe(self, seq: int) -> None:
        """Removes what could tell anything of a forgotten image: the latent, its sketch and its hash."""
        row = self._log.sample(seq)
        if row is not None:
            row.kept, row.sketch, row.sha256 = False, b"", ""
            self._log.write(row)
        self._log.delete_latent(seq)
        self._log.drop_damaged(seq)

    # --- reading ------------------------------------------------------------------------------------------------------

    def sample(self, sample_id: str, learned_seq: int) -> SampleRecord:
        return self._record(self._sample_row(sample_id), learned_seq)

    def samples_of(self, sample_ids: Sequence[str], learned_seq: int) -> Tuple[SampleRecord, ...]:
        """These samples in their order, without those that are gone."""
        rows = (self._log.sample(seq_of(sample_id)) for sample_id in sample_ids)
        return tuple(self._record(row, learned_seq) for row in rows if row is not None)

    def page(
        self, after: Optional[str], limit: int, label: Optional[str], state: Optional[str], learned_seq: int
    ) -> Tuple[Tuple[SampleRecord, ...], Optional[str]]:
        """At most `limit` samples and the next cursor: fewer, or none, where many others lay between."""
        start = 0 if after is None else seq_of(after)
        if start is None:
            raise SampleNotFound(f"{after} is no cursor", hint="Use the `next` of the page before.")
        found: List[SampleRecord] = []
        if label is not None and self._classes.find(label) is None:
            return (), None
        for looked, row in enumerate(self._log.rows(start), 1):
            record = self._record(row, learned_seq) if isinstance(row, SampleRow) else None
            if record is not None and label in (None, record.label) and state in (None, record.state):
                if len(found) == limit:
                    return tuple(found), found[-1].sample_id
                found.append(record)
            elif looked - len(found) >= _PASSED_OVER:
                return tuple(found), sample_id_of(row.seq)
        return tuple(found), None

    def recall(self, key: str, learned_seq: int) -> Optional[Recalled]:
        body = self._keys.find(key)
        if body is None:
            return None
        rows = [(seq, self._log.sample(seq)) for seq in body["seqs"]]
        records = (SampleRecord.pruned(seq, body["at"]) if row is None else self._record(row, learned_seq) for seq, row in rows)
        return Recalled(body["body"], body["request_id"], tuple(body["slots"]), tuple(records))

    def entries(self, after_seq: int, limit: int) -> List[Entry]:
        return self._log.entries(after_seq, limit)

    def class_records(self) -> Tuple[ClassRecord, ...]:
        return self._classes.records()

    def size_bytes(self) -> int:
        return self._store.size_bytes()

    @property
    def set_aside(self) -> int:
        """Damaged rows that lie aside."""
        return self._aside.count

    def put_counters(self, name: str, data: bytes) -> None:
        self._store.put({f"m/counters/{name}": data})

    def counters(self, name: str) -> Dict[str, Any]:
        key = f"m/counters/{name}"
        data = self._store.get(key) or b"{}"
        try:
            return dict(json.loads(data))
        except DAMAGE as cause:
            self._aside.take(key, data, cause, "it is counted anew")
            return {}

    def expire_keys(self) -> None:
        """Drops the idempotency keys that are too old to be recalled."""
        self._keys.expire()

    # --- inside -------------------------------------------------------------------------------------------------------

    def _record(self, row: SampleRow, learned_seq: int) -> SampleRecord:
        state = row.state if row.state != "stored" else ("learned" if max(row.seq, row.changed) <= learned_seq else "queued")
        known = self._classes.get(row.class_id) if row.state != "forgotten" else None
        label = None if known is None else known.name
        duplicate_of = None if row.duplicate_of is None else sample_id_of(row.duplicate_of)
        return SampleRecord(sample_id_of(row.seq), row.seq, label, state, row.taught_at, row.sha256, duplicate_of, row.holdout)

    def _sample_row(self, sample_id: str) -> SampleRow:
        row = self._log.sample(seq_of(sample_id))
        if row is None:
            raise SampleNotFound(f"there is no sample {sample_id[:40]}")
        return row

    def _append(self, kind: str, target: Optional[int], class_id: Optional[int], was: Optional[int]) -> int:
        self.head_seq += 1
        settled = kind in ("relabel", "rename")  # nothing has to be wiped after them
        self._log.write(ChangeRow(self.head_seq, kind, target, class_id, was, self._clock(), settled))
        self._write_seq()
        return self.head_seq

    def _enrol(self, row: SampleRow) -> None:
        """Counts a sample that is taught now, and makes its image known."""
        if row.state == "stored":
            self._classes.count(row.class_id, samples=1, holdout=int(row.holdout))
            self._log.own_image(row)
            self._remember(row)

    def _remember(self, row: SampleRow) -> None:
        if row.state == "stored" and row.kept and row.class_id is not None:
            self._index.add(row.class_id, row.seq, row.sketch)
            self._classes.count(row.class_id, stored=1)
            self.stored += 1

    def _strike(self, row: SampleRow) -> None:
        """Takes a sample that is about to change out of counts and indexes."""
        if row.state in ("stored", "evicted"):
            self._log.disown_image(row)
            self._classes.count(row.class_id, samples=-1, holdout=-int(row.holdout))
        self._unindex(row)

    def _unindex(self, row: SampleRow) -> None:
        if row.state == "stored" and row.kept and row.class_id is not None:
            self._index.remove(row.class_id, row.seq)
            self._classes.count(row.class_id, stored=-1)
            self.stored -= 1

    def _require_budget(self, more_bytes: int) -> None:
        if self._lacks(more_bytes) and not 0 < self._prune_at - self._clock() <= PRUNE_AGAIN_S:  # more: the clock was set back
            self._prune(more_bytes)
        if self._lacks(more_bytes):
            raise BudgetFull(f"the journal holds {self._store.size_bytes()} of {self._limits.budget_bytes} bytes")

    def _lacks(self, more_bytes: int) -> bool:
        return self._store.size_bytes() + more_bytes > self._limits.budget_bytes

    def _prune(self, more_bytes: int) -> None:
        """Makes room: old idempotency keys, then the oldest records without a latent, then the oldest images that nobody labelled."""
        self.expire_keys()
        spent = self._spent()
        while self._lacks(more_bytes):
            rows = list(itertools.islice(spent, _PRUNE))
            if not rows:
                break
            self._log.delete(rows)
        held = (row for row in self._log.rows() if isinstance(row, SampleRow) and row.state == "held")
        while self._lacks(more_bytes):
            few = list(itertools.islice(held, _PRUNE // 16))
            if not few:
                self._prune_at = self._clock() + PRUNE_AGAIN_S
                break
            for row in few:
                self._drop_latent(row)

    def _spent(self) -> Iterator[Row]:
        """Records that nobody will read again: no latent, nothing left to do, and learned by every version on the disk."""
        for row in self._log.rows():
            if row.seq > self._prunable_seq:
                return
            if not row.kept if isinstance(row, SampleRow) else row.settled and not self._still_moves(row):
                yield row

    def _still_moves(self, row: ChangeRow) -> bool:
        """A relabel is part of how a restart finds the class of a latent, for as long as there is the latent."""
        target = self._log.sample(row.target)
        return target is not None and target.kept

    def _write_seq(self) -> None:
        self._store.put({"m/seq": str(self.head_seq).encode()})
