"""What the journal knows, and the rules of changing it: labels, duplicates, hold-out, budget, forgetting.

Runs on the journal thread inside its commit groups. A method validates first and writes after: one that raises has written nothing. The
in-memory part (classes, hashes, sketches) is rebuilt from the store by `load`, at start and after a failed commit.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from dataclasses import dataclass, replace
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple, Union

import numpy as np

from latentd.errors import BudgetFull, ClassNotFound, Conflict, LabelInvalid, SampleNotFound
from latentd.replay.codec import Codec
from latentd.replay.duplicates import DuplicateIndex
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

KEY_LIFETIME_S = 24 * 3600.0
_Row = Union[SampleRow, ChangeRow]


@dataclass(frozen=True)
class JournalLimits:
    """The rules from the configuration. holdout_every: 0 keeps nothing out; duplicate_cosine above 1 finds exact duplicates only."""

    budget_bytes: int
    duplicate_cosine: float
    holdout_every: int
    holdout_per_class: int
    max_label_chars: int
    seed: int = 0


class Catalogue:
    """Samples, classes and changes over a Store; see the module docstring."""

    def __init__(self, store: Store, codec: Codec, feature_width: int, limits: JournalLimits, clock: Callable[[], float]) -> None:
        self._store = store
        self._codec = codec
        self._limits = limits
        self._clock = clock
        self._index = DuplicateIndex(feature_width, limits.seed)
        self._hashes: Dict[Tuple[int, bytes], int] = {}
        self._classes: Dict[int, ClassRecord] = {}
        self._names: Dict[str, int] = {}
        self._unsettled: Dict[int, List[int]] = {}
        self._next_class_id = 0
        self.head_seq = 0
        self.stored = 0

    def load(self) -> None:
        """Rebuilds the in-memory part from the store."""
        for key, value in self._store.scan("c/"):
            body = json.loads(value)
            self._remember_class(ClassRecord(int(key[2:]), body["name"], body["created_at"], body["samples"], body["holdout"], 0))
        meta = json.loads(self._store.get("m/next") or b"{}")
        self._next_class_id = max([meta.get("class_id", 0)] + [class_id + 1 for class_id in self._classes])
        self.head_seq = int(meta.get("seq", 0))
        forgotten: Dict[int, List[int]] = {}
        for row in self._rows():
            self.head_seq = max(self.head_seq, row.seq)
            if isinstance(row, SampleRow):
                if row.state == "forgotten" and row.kept:
                    forgotten.setdefault(-1 if row.class_id is None else row.class_id, []).append(row.seq)
                self._remember_sample(row)
            elif row.kind != "relabel" and not row.settled:
                self._unsettled[row.seq] = (
                    [row.target] if row.target is not None else forgotten.get(-1 if row.class_id is None else row.class_id, [])
                )
        self._expire_keys()

    # --- teaching -----------------------------------------------------------------------------------------------------

    def admit(self, batch: Sequence[NewSample], idempotency: Optional[Idempotency]) -> Tuple[SampleRecord, ...]:
        for sample in batch:
            if sample.label is not None:
                self.check_label(sample.label)
        self._require_budget(sum(len(sample.code) + 600 for sample in batch))
        first = self.head_seq + 1
        rows = [self._admit_one(sample, first) for sample in batch]
        if idempotency is not None:
            stored = {
                "body": idempotency.body_sha256,
                "request_id": idempotency.request_id,
                "slots": idempotency.slots,
                "at": self._clock(),
            }
            self._store.put({_key_of(idempotency.key): json.dumps(dict(stored, seqs=[row.seq for row in rows])).encode()})
        self._write_next()
        return tuple(self._record(row, 0) for row in rows)

    def check_label(self, label: str) -> None:
        """Raises LabelInvalid when the label is empty, too long, or holds characters that can't be shown."""
        if not label.strip() or len(label) > self._limits.max_label_chars:
            raise LabelInvalid(f"a label has 1 to {self._limits.max_label_chars} characters; this one has {len(label.strip())}")
        if not label.isprintable() or label != label.strip():
            raise LabelInvalid("a label may not hold control characters, nor begin or end with spaces")

    def _admit_one(self, sample: NewSample, first: int) -> SampleRow:
        self.head_seq += 1
        class_id = None if sample.label is None else self._class_id(sample.label)
        sketch = self._index.sketch(sample.features)
        row = SampleRow(
            self.head_seq, first, class_id, class_id, self._clock(), sample.sha256, sketch, "held" if class_id is None else "stored"
        )
        row.duplicate_of = None if class_id is None else self._duplicate_of(class_id, sample, sketch)
        if row.duplicate_of is not None:
            row.state, row.kept = "duplicate", False
        elif class_id is not None:
            row.holdout = self._holds_out(self._classes[class_id])
            self._count(class_id, samples=1, holdout=int(row.holdout))
        if row.kept:
            self._store.put({_latent_key(row.seq): sample.code})
        self._write(row)
        self._remember_sample(row)
        return row

    def _duplicate_of(self, class_id: int, sample: NewSample, sketch: bytes) -> Optional[int]:
        same = self._hashes.get((class_id, _short(sample.sha256)))
        if same is not None:
            return same
        near = self._index.candidates(class_id, sketch)
        if not near or self._limits.duplicate_cosine > 1:
            return None
        mine = self._codec.decode(np.frombuffer(sample.code, dtype=np.uint8)[None]).ravel()
        for seq in near:
            code = self._store.get(_latent_key(seq))
            if code is not None:
                other = self._codec.decode(np.frombuffer(code, dtype=np.uint8)[None]).ravel()
                if float(mine @ other) >= self._limits.duplicate_cosine * float(np.linalg.norm(mine) * np.linalg.norm(other)):
                    return seq
        return None

    def _holds_out(self, record: ClassRecord) -> bool:
        every = self._limits.holdout_every
        return every > 0 and record.samples % every == every - 1 and record.holdout < self._limits.holdout_per_class

    # --- changing -----------------------------------------------------------------------------------------------------

    def relabel(self, sample_id: str, label: str, learned_seq: int) -> SampleRecord:
        row = self._sample_row(sample_id)
        self.check_label(label)
        if not row.kept or row.state not in ("stored", "held"):
            raise Conflict(f"{sample_id} is {row.state}: its latent is stored no more", hint="Teach the image again under the right label.")
        class_id, was = self._class_id(label), row.class_id
        if class_id != was:
            self._drop(row)
            row.class_id, row.state = class_id, "stored"
            self._count(class_id, samples=1, holdout=int(row.holdout))
            self._write(row)
            self._remember_sample(row)
            self._append("relabel", row.seq, class_id, was)
        return self._record(row, learned_seq)

    def forget(self, sample_id: str, learned_seq: int) -> SampleRecord:
        row = self._sample_row(sample_id)
        if row.state != "forgotten":
            self._drop(row)
            row.state = "forgotten"
            self._write(row)
            change = self._append("forget", row.seq, None, row.class_id)
            self._unsettled[change] = [row.seq]
        return self._record(row, learned_seq)

    def forget_class(self, name: str) -> ClassRecord:
        record = self._class_named(name)
        rows = [row for row in self._rows() if isinstance(row, SampleRow) and row.class_id == record.class_id and row.state != "forgotten"]
        for row in rows:
            self._drop(row)
            row.state = "forgotten"
            self._write(row)
        self._unsettled[self._append("forget_class", None, record.class_id, None)] = [row.seq for row in rows]
        self._store.delete([f"c/{record.class_id}"])
        del self._classes[record.class_id], self._names[name]
        self._index.remove_class(record.class_id)
        return record

    def put_class(self, name: str, rename_to: Optional[str]) -> Tuple[ClassRecord, bool]:
        self.check_label(name)
        created = name not in self._names
        if rename_to is None:
            return self._classes[self._class_id(name)], created
        self.check_label(rename_to)
        record = self._class_named(name)
        if rename_to != name and rename_to in self._names:
            raise Conflict(f"there is a class named {rename_to} already", hint="Forget one of them, or relabel its samples.")
        del self._names[name]
        record = replace(record, name=rename_to)
        self._remember_class(record)
        self._write_class(record)
        self._append("rename", None, record.class_id, None)
        return record, False

    def evict(self, sample_ids: Sequence[str]) -> None:
        for sample_id in sample_ids:
            row = self._sample_row(sample_id)
            if row.kept and row.state == "stored":
                self._forget_hash(row)
                row.state, row.kept = "evicted", False
                self._stored_less(row)
                self._write(row)
                self._store.delete([_latent_key(row.seq)])

    def settle(self, seq: int) -> None:
        done = [change for change in self._unsettled if change <= seq]
        for change in done:
            for target in self._unsettled.pop(change):
                self._wipe(target)
            data = self._store.get(_entry_key(change))
            if data is not None:
                row = ChangeRow.from_bytes(change, data[1:])
                row.settled = True
                self._write(row)
        if done:
            self._store.commit()
            self._store.purge()

    def _wipe(self, seq: int) -> None:
        """Removes what could tell anything of a forgotten image: the latent, its sketch and its hash."""
        data = self._store.get(_entry_key(seq))
        if data is not None:
            row = SampleRow.from_bytes(seq, data[1:])
            row.kept, row.sketch, row.sha256 = False, b"", ""
            self._write(row)
        self._store.delete([_latent_key(seq)])

    # --- reading ------------------------------------------------------------------------------------------------------

    def sample(self, sample_id: str, learned_seq: int) -> SampleRecord:
        return self._record(self._sample_row(sample_id), learned_seq)

    def page(
        self, after: Optional[str], limit: int, label: Optional[str], state: Optional[str], learned_seq: int
    ) -> Tuple[Tuple[SampleRecord, ...], Optional[str]]:
        start = 0 if after is None else seq_of(after)
        if start is None:
            raise SampleNotFound(f"{after} is no cursor", hint="Use the `next` of the page before.")
        records = (self._record(row, learned_seq) for row in self._rows(start) if isinstance(row, SampleRow))
        wanted = (record for record in records if (label is None or record.label == label) and (state is None or record.state == state))
        found = tuple(itertools.islice(wanted, limit + 1))
        return found[:limit], found[limit - 1].sample_id if len(found) > limit else None

    def recall(self, key: str, learned_seq: int) -> Optional[Recalled]:
        data = self._store.get(_key_of(key))
        body = {} if data is None else json.loads(data)
        if not body or body["at"] < self._clock() - KEY_LIFETIME_S:
            return None
        records = tuple(self.sample(sample_id_of(seq), learned_seq) for seq in body["seqs"])
        return Recalled(body["body"], body["request_id"], tuple(body["slots"]), records)

    def entries(self, after_seq: int, limit: int) -> List[Entry]:
        rows = list(itertools.islice(self._rows(after_seq), limit))
        if rows and isinstance(rows[-1], SampleRow):
            batch = rows[-1].batch
            rest = itertools.takewhile(lambda row: isinstance(row, SampleRow) and row.batch == batch, self._rows(rows[-1].seq))
            rows.extend(rest)
        if not rows:
            return []
        codes = {
            int(key[2:]): code for key, code in self._store.scan("l/", _latent_key(rows[0].seq - 1), -1) if int(key[2:]) <= rows[-1].seq
        }
        return [self._entry(row, codes) for row in rows]

    def class_records(self) -> Tuple[ClassRecord, ...]:
        return tuple(self._classes[class_id] for class_id in sorted(self._classes))

    def size_bytes(self) -> int:
        return self._store.size_bytes()

    def put_counters(self, name: str, data: bytes) -> None:
        self._store.put({f"m/counters/{name}": data})

    def counters(self, name: str) -> Dict[str, Any]:
        found: Dict[str, Any] = json.loads(self._store.get(f"m/counters/{name}") or b"{}")
        return found

    # --- inside -------------------------------------------------------------------------------------------------------

    def _rows(self, after_seq: int = 0) -> Iterator[_Row]:
        """Entries beyond `after_seq` in order, read in pages so that a long log is never in memory at once."""
        key = _entry_key(after_seq)
        while True:
            page = list(self._store.scan("e/", key, 512))
            for key, value in page:
                seq = int(key[2:])
                yield SampleRow.from_bytes(seq, value[1:]) if value[:1] == b"S" else ChangeRow.from_bytes(seq, value[1:])
            if len(page) < 512:
                return

    def _entry(self, row: _Row, codes: Dict[int, bytes]) -> Entry:
        if isinstance(row, SampleRow):
            code = codes.get(row.seq) if row.first_class is not None else None
            return Entry(row.seq, "sample", row.batch, sample_id_of(row.seq), row.first_class, None, row.holdout, code, row.taught_at)
        sample = self._store.get(_entry_key(row.target)) if row.target is not None else None
        holdout = sample is not None and SampleRow.from_bytes(0, sample[1:]).holdout
        code = self._store.get(_latent_key(row.target)) if row.target is not None else None
        sample_id = "" if row.target is None else sample_id_of(row.target)
        return Entry(row.seq, row.kind, row.seq, sample_id, row.class_id, row.was, holdout, code, row.at)

    def _record(self, row: SampleRow, learned_seq: int) -> SampleRecord:
        state = row.state if row.state != "stored" else ("learned" if row.seq <= learned_seq else "queued")
        known = self._classes.get(row.class_id) if row.class_id is not None and row.state != "forgotten" else None
        duplicate_of = None if row.duplicate_of is None else sample_id_of(row.duplicate_of)
        return SampleRecord(
            sample_id_of(row.seq),
            row.seq,
            None if known is None else known.name,
            state,
            row.taught_at,
            row.sha256,
            duplicate_of,
            row.holdout,
        )

    def _sample_row(self, sample_id: str) -> SampleRow:
        seq = seq_of(sample_id)
        data = None if seq is None else self._store.get(_entry_key(seq))
        if seq is None or data is None or data[:1] != b"S":
            raise SampleNotFound(f"there is no sample {sample_id[:40]}")
        return SampleRow.from_bytes(seq, data[1:])

    def _class_named(self, name: str) -> ClassRecord:
        if name not in self._names:
            raise ClassNotFound(f"there is no class named {name[:100]}")
        return self._classes[self._names[name]]

    def _class_id(self, name: str) -> int:
        """The id of the class, created when there is none. An id is never used again."""
        if name not in self._names:
            record = ClassRecord(self._next_class_id, name, self._clock())
            self._next_class_id += 1
            self._remember_class(record)
            self._write_class(record)
            self._write_next()
        return self._names[name]

    def _append(self, kind: str, target: Optional[int], class_id: Optional[int], was: Optional[int]) -> int:
        self.head_seq += 1
        self._write(ChangeRow(self.head_seq, kind, target, class_id, was, self._clock(), settled=kind in ("relabel", "rename")))
        self._write_next()
        return self.head_seq

    def _drop(self, row: SampleRow) -> None:
        """Takes a sample out of its class's counts and indexes."""
        self._forget_hash(row)
        if row.class_id is not None and row.class_id in self._classes:
            if row.state in ("stored", "evicted"):
                self._count(row.class_id, samples=-1, holdout=-int(row.holdout))
            self._stored_less(row)

    def _forget_hash(self, row: SampleRow) -> None:
        if row.class_id is not None:
            self._hashes.pop((row.class_id, _short(row.sha256)), None)
            self._index.remove(row.class_id, row.seq)

    def _stored_less(self, row: SampleRow) -> None:
        if row.class_id is not None and row.class_id in self._classes:
            record = self._classes[row.class_id]
            self._classes[row.class_id] = replace(record, stored=max(0, record.stored - 1))
        self.stored = max(0, self.stored - 1)

    def _remember_class(self, record: ClassRecord) -> None:
        self._classes[record.class_id] = record
        self._names[record.name] = record.class_id

    def _remember_sample(self, row: SampleRow) -> None:
        if row.state == "stored" and row.kept and row.class_id in self._classes:
            self._hashes[(row.class_id, _short(row.sha256))] = row.seq
            self._index.add(row.class_id, row.seq, row.sketch)
            self._classes[row.class_id] = replace(self._classes[row.class_id], stored=self._classes[row.class_id].stored + 1)
            self.stored += 1

    def _count(self, class_id: int, samples: int, holdout: int) -> None:
        record = self._classes[class_id]
        self._classes[class_id] = replace(record, samples=max(0, record.samples + samples), holdout=max(0, record.holdout + holdout))
        self._write_class(self._classes[class_id])

    def _require_budget(self, more_bytes: int) -> None:
        if self._store.size_bytes() + more_bytes > self._limits.budget_bytes:
            self._prune()
            if self._store.size_bytes() + more_bytes > self._limits.budget_bytes:
                raise BudgetFull(f"the journal holds {self._store.size_bytes()} of {self._limits.budget_bytes} bytes")

    def _prune(self) -> None:
        """Drops the oldest records that hold no latent: evicted, forgotten, duplicates, and changes that are done."""
        spent = (row.seq for row in self._rows() if (not row.kept if isinstance(row, SampleRow) else row.settled))
        self._store.delete([_entry_key(seq) for seq in itertools.islice(spent, 4096)])
        self._store.commit()

    def _expire_keys(self) -> None:
        limit = self._clock() - KEY_LIFETIME_S
        self._store.delete([key for key, value in self._store.scan("k/") if json.loads(value)["at"] < limit])

    def _write(self, row: _Row) -> None:
        mark = b"S" if isinstance(row, SampleRow) else b"C"
        self._store.put({_entry_key(row.seq): mark + row.to_bytes()})

    def _write_class(self, record: ClassRecord) -> None:
        body = {"name": record.name, "created_at": record.created_at, "samples": record.samples, "holdout": record.holdout}
        self._store.put({f"c/{record.class_id}": json.dumps(body).encode()})

    def _write_next(self) -> None:
        self._store.put({"m/next": json.dumps({"class_id": self._next_class_id, "seq": self.head_seq}).encode()})


def _entry_key(seq: int) -> str:
    return f"e/{seq:012d}"


def _latent_key(seq: int) -> str:
    return f"l/{seq:012d}"


def _key_of(key: str) -> str:
    return "k/" + hashlib.sha256(key.encode()).hexdigest()


def _short(sha256: str) -> bytes:
    return bytes.fromhex(sha256[:32])
