"""A journal of samples with their tokens, and how much of each it keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Dict

from latentd.replay.journal import Journal
from latentd.replay.records import NewSample
from lessons import WAIT_S, limits
from sleepers import CODEC, D, code, latent


def journal_in(folder: Path) -> Journal:
    journal = Journal(folder / "journal.sqlite", codec=CODEC, feature_width=2 * D, limits=limits())
    journal.start(WAIT_S)
    return journal


def teach(journal: Journal, count: int) -> None:
    for seq in range(1, count + 1):
        features = latent(seq % 2, seq)[0]
        journal.admit([NewSample(("cat", "dog")[seq % 2], code(seq % 2, seq), features, f"{seq:032x}{seq:032x}")]).result(WAIT_S)


def lengths(journal: Journal) -> Dict[str, int]:
    return {entry.sample_id: len(entry.code or b"") for entry in journal.entries(0, 1000).result(WAIT_S)}
