"""The journal's log in the store: rows by sequence number, their latents, and the hashes of their images. Owned by the journal thread."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Callable, Dict, Iterator, List, Optional, Sequence, Union

from latentd.replay.aside import DAMAGE, Aside
from latentd.replay.records import ChangeRow, Entry, SampleRow, sample_id_of
from latentd.replay.store import Store

Row = Union[SampleRow, ChangeRow]
_PAGE = 512


class LogTable:
    """Rows as values. Writes are queued for the store's next commit, and seen by reads at once.

    A row that can't be read is set aside, and another takes its place, so that the log has no hole that the learner would wait at.
    """

    def __init__(self, store: Store, aside: Aside, sketch: Callable[[bytes], bytes]) -> None:
        """sketch: of a latent's code, as duplicates are found by."""
        self._store, self._aside, self._sketch = store, aside, sketch

    # --- rows ---

    def rows(self, after_seq: int = 0) -> Iterator[Row]:
        """Rows beyond `after_seq` in order, read in pages so that a long log is never in memory at once."""
        key = _entry_key(after_seq)
        while True:
            page = list(self._store.scan("e/", key, limit=_PAGE))
            for key, value in page:
                row = self._read(key, value)
                if row is not None:
                    yield row
            if len(page) < _PAGE:
                return

    def _read(self, key: str, value: bytes) -> Optional[Row]:
        digits = key[2:]
        try:
            seq = int(digits)
            return SampleRow.from_bytes(seq, value[1:]) if value[:1] == b"S" else ChangeRow.from_bytes(seq, value[1:])
        except DAMAGE as cause:
            if not digits.isdigit():
                self._aside.take(key, value, cause, "nobody knows what it was")
                return None
            row = self._stand_in(int(digits), value[:1])
            lost = "a correction, a new name or a wish to forget is lost"
            self._aside.take(key, value, cause, _unlabelled(row) if isinstance(row, SampleRow) else lost)
            self.write(row)
            return row

    def _stand_in(self, seq: int, mark: bytes) -> Row:
        """For a damaged row: a change that changes nothing, or a sample that waits for a label, if its latent is there."""
        if mark == b"C":
            return ChangeRow(seq, "damaged", None, None, None, 0.0, settled=True)
        code = self.latent(seq)
        row = SampleRow.stand_in(seq)
        return row if code is None else replace(row, sketch=self._sketch(code), state="held", kept=True)

    def drop_damaged(self, seq: int) -> None:
        """Forgets the bytes of a row that was set aside."""
        self._aside.drop(_entry_key(seq))

    def sample(self, seq: Optional[int]) -> Optional[SampleRow]:
        data = None if seq is None else self._store.get(_entry_key(seq))
        return None if seq is None or data is None or data[:1] != b"S" else SampleRow.from_bytes(seq, data[1:])

    def change(self, seq: int) -> Optional[ChangeRow]:
        data = self._store.get(_entry_key(seq))
        return None if data is None or data[:1] != b"C" else ChangeRow.from_bytes(seq, data[1:])

    def write(self, row: Row) -> None:
        mark = b"S" if isinstance(row, SampleRow) else b"C"
        self._store.put({_entry_key(row.seq): mark + row.to_bytes()})

    def delete(self, rows: Sequence[Row]) -> None:
        """Removes rows that keep no latent, with the hashes they own."""
        for row in rows:
            if isinstance(row, SampleRow):
                self.disown_image(row)
        self._store.delete([_entry_key(row.seq) for row in rows])

    # --- latents ---

    def latent(self, seq: int) -> Optional[bytes]:
        return self._store.get(_latent_key(seq))

    def put_latent(self, seq: int, code: bytes) -> None:
        self._store.put({_latent_key(seq): code})

    def trim_latent(self, seq: Optional[int], length: int) -> None:
        """Leaves the first bytes of a latent, if it is there and longer."""
        code = None if seq is None else self.latent(seq)
        if seq is not None and code is not None and len(code) > length:
            self.put_latent(seq, code[:length])

    def trim_latents(self, length: int) -> None:
        """The same with every latent."""
        self._store.cut("l/", length)

    def delete_latent(self, seq: int) -> None:
        self._store.delete([_latent_key(seq)])

    # --- images: which sample of a class was taught from these very bytes ---

    def image_owner(self, class_id: int, sha256: str) -> Optional[int]:
        owner = self._store.get(_image_key(class_id, sha256))
        row = None if owner is None else self.sample(int(owner))
        return row.seq if row is not None and row.sha256 == sha256 else None  # a damaged row was replaced by one without an image

    def own_image(self, row: SampleRow) -> None:
        """Remembers the image of a row, unless an older row of its class has it."""
        if row.class_id is not None and row.sha256 and self.image_owner(row.class_id, row.sha256) is None:
            self._store.put({_image_key(row.class_id, row.sha256): str(row.seq).encode()})

    def disown_image(self, row: SampleRow) -> None:
        if row.class_id is not None and row.sha256 and self.image_owner(row.class_id, row.sha256) == row.seq:
            self._store.delete([_image_key(row.class_id, row.sha256)])

    # --- as the learner reads it ---

    def entries(self, after_seq: int, limit: int) -> List[Entry]:
        """The log beyond `after_seq` in order; the last request is whole, so that it may pass `limit`."""
        rows = list(itertools.islice(self.rows(after_seq), limit))
        if rows and isinstance(rows[-1], SampleRow):
            batch = rows[-1].batch
            rows.extend(itertools.takewhile(lambda row: isinstance(row, SampleRow) and row.batch == batch, self.rows(rows[-1].seq)))
        if not rows:
            return []
        codes = self._store.scan("l/", after=_latent_key(rows[0].seq - 1), before=_latent_key(rows[-1].seq + 1))
        latents = {int(key[2:]): code for key, code in codes}
        return [self._entry(row, latents) for row in rows]

    def _entry(self, row: Row, latents: Dict[int, bytes]) -> Entry:
        if isinstance(row, SampleRow):
            code = latents.get(row.seq) if row.first_class is not None else None
            kind = "damaged" if row.stands_in else "sample"
            return Entry(row.seq, kind, row.batch, sample_id_of(row.seq), row.first_class, None, row.holdout, code, row.taught_at)
        target = self.sample(row.target)
        if target is None:
            return Entry(row.seq, row.kind, row.seq, "", row.class_id, row.was, False, None, row.at)
        code = self.latent(target.seq)
        return Entry(row.seq, row.kind, row.seq, sample_id_of(target.seq), row.class_id, row.was, target.holdout, code, row.at)


def _unlabelled(row: SampleRow) -> str:
    sample_id = sample_id_of(row.seq)
    return f"sample {sample_id} has no label until it is given one" if row.kept else f"sample {sample_id}, whose latent was stored no more"


def _entry_key(seq: int) -> str:
    return f"e/{seq:012d}"


def _latent_key(seq: int) -> str:
    return f"l/{seq:012d}"


def _image_key(class_id: int, sha256: str) -> str:
    return f"h/{class_id}/{sha256[:32]}"
