"""A process that a test kills: it writes to a state folder, and says what it was told is safe, one line each, only after it was told.

Arguments: what to do (teach, save), the state folder, the first number to use. Never ends by itself.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import numpy as np

from latentd.learning import checkpoint
from latentd.replay.records import Idempotency
from lessons import WAIT_S, running_journal, sample


def say(*words: object) -> None:
    sys.stdout.write(" ".join(str(word) for word in words) + "\n")
    sys.stdout.flush()


def teach(folder: Path, first: int) -> None:
    """Requests of one to five samples, several under way at once, with corrections and forgetting between."""
    with running_journal(folder, duplicate_cosine=0.9999) as journal:
        say("ready")
        for number in itertools.count(first, 10):
            labels = [f"class {(number + i) % 3}" for i in range(1 + number // 10 % 5)]
            batch = [sample(label, number + i, shows="thing") for i, label in enumerate(labels)]
            key = Idempotency(f"key {number}", "body", "request", (None,) * len(batch))
            futures = [journal.admit(batch, key), journal.admit([sample("more", number + 7)])]
            for future, shown in zip(futures, ("thing", "more")):
                for i, record in enumerate(future.result(WAIT_S)):
                    say("taught", record.sample_id, shown, number + (i if shown == "thing" else 7), record.label)
            say("keyed", number, len(batch))
            if number // 10 % 4 == 0:
                victim = futures[1].result(WAIT_S)[0].sample_id
                say("forgetting", victim)
                seq = journal.forget(victim).result(WAIT_S).seq
                journal.settle(journal.status().head_seq).result(WAIT_S)
                say("forgotten", victim, seq)
            elif number // 10 % 4 == 1:
                victim = futures[1].result(WAIT_S)[0].sample_id
                say("correcting", victim)
                journal.relabel(victim, "corrected").result(WAIT_S)
                say("corrected", victim)


def save(folder: Path, first: int) -> None:
    """One version after the other."""
    say("ready")
    for number in itertools.count(first):
        arrays = {"a": np.full(20_000, float(number)), "b": np.arange(float(number % 7))}
        checkpoint.write(folder, arrays, {"version": number, "seq": 3 * number}, keep=3)
        say("saved", number)


if __name__ == "__main__":
    {"teach": teach, "save": save}[sys.argv[1]](Path(sys.argv[2]), int(sys.argv[3]))
