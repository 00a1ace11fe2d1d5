"""Replay memories for tests, filled with samples whose code says which one it belongs to."""

from __future__ import annotations

from typing import List, Optional

from latentd.replay.memory import ReplayMemory
from latentd.replay.packing import Bytes

CODE_BYTES = 16
SLOT_BYTES = CODE_BYTES + (16 + 4 + 4 + 1) + (4 + 4 + 8) + 8  # code, id row, class row, order


def memory_of(slots: int, seed: int = 0) -> ReplayMemory:
    memory = ReplayMemory("int8 token", CODE_BYTES, slots * SLOT_BYTES, seed)
    assert memory.slots == slots
    return memory


def code_of(number: int) -> bytes:
    """A code that says which sample it belongs to."""
    return number.to_bytes(CODE_BYTES, "little")


def numbers(codes: Bytes) -> List[int]:
    """The samples that these codes belong to."""
    return [int.from_bytes(code.tobytes(), "little") for code in codes]


def fill(memory: ReplayMemory, classes: List[int], start: int = 0) -> List[Optional[str]]:
    return [memory.admit(f"s{start + i:07d}", class_id, code_of(start + i)) for i, class_id in enumerate(classes)]
