"""Whatever is admitted, removed, relabelled and forgotten, in any order: the replay memory keeps its promises."""

from __future__ import annotations

from collections import Counter
from typing import Dict

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from replay.memories import code_of, memory_of


class Lives(RuleBasedStateMachine):
    """Any order of calls, against a dict of what must be there."""

    @initialize(slots=st.integers(1, 12), seed=st.integers(0, 100))
    def start(self, slots: int, seed: int) -> None:
        self.memory = memory_of(slots, seed)
        self.there: Dict[str, int] = {}
        self.next = 0

    @rule(class_id=st.integers(0, 4))
    def admit(self, class_id: int) -> None:
        sample_id = f"s{self.next:07d}"
        before = Counter(self.there.values())
        evicted = self.memory.admit(sample_id, class_id, code_of(self.next))
        self.next += 1
        self.there[sample_id] = class_id
        if evicted is not None:
            loser = self.there.pop(evicted)
            assert len(self.there) == self.memory.slots
            emptied = before[loser] == 1 and loser not in self.there.values()
            assert not (emptied and max(before.values()) > 1)

    @precondition(lambda self: self.there)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        sample_id = data.draw(st.sampled_from(sorted(self.there)))
        assert self.memory.remove(sample_id)
        del self.there[sample_id]

    @precondition(lambda self: self.there)
    @rule(data=st.data(), class_id=st.integers(0, 4))
    def relabel(self, data: st.DataObject, class_id: int) -> None:
        sample_id = data.draw(st.sampled_from(sorted(self.there)))
        assert self.memory.relabel(sample_id, class_id)
        self.there[sample_id] = class_id

    @rule(class_id=st.integers(0, 4))
    def remove_class(self, class_id: int) -> None:
        gone = self.memory.remove_class(class_id)
        assert list(gone) == sorted(i for i, c in self.there.items() if c == class_id)
        self.there = {i: c for i, c in self.there.items() if c != class_id}

    @invariant()
    def everything_agrees(self) -> None:
        if not hasattr(self, "memory"):
            return
        memory = self.memory
        assert memory.used_bytes <= memory.budget_bytes
        assert memory.ids() == tuple(sorted(self.there))
        assert memory.counts() == dict(Counter(self.there.values()))
        assert all(memory.seen()[class_id] >= stored for class_id, stored in memory.counts().items())
        for chunk in memory.all(chunk=5):
            assert chunk.class_ids.tolist() == [self.there[sample_id] for sample_id in chunk.ids]
            assert [int.from_bytes(code.tobytes(), "little") for code in chunk.codes] == [int(sample_id[1:]) for sample_id in chunk.ids]


TestAnyOrderOfCalls = Lives.TestCase
TestAnyOrderOfCalls.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
