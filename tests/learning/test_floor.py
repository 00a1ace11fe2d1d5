"""The room for samples with their tokens: how it is shared, and who gives way."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from latentd.errors import ConfigError
from latentd.learning.floor import HELD_SHARE, Whole
from latentd.replay.memory import slot_bytes
from latentd.replay.records import sample_id_of
from sleepers import CODEC, code


def test_of_many_hold_out_samples_the_oldest_of_the_largest_classes_give_way_in_one_look() -> None:
    rng = np.random.default_rng(0)
    packed = code(0, 1)
    holdout = {sample_id_of(seq): (int(rng.integers(5) ** 2), packed) for seq in range(1, 61)}
    gone = Whole(CODEC, 20 * HELD_SHARE * CODEC.code_bytes, 0).outstay(holdout)
    left = dict(holdout)
    for sample_id in gone:
        sizes = Counter(class_id for class_id, _ in left.values())
        largest = [class_id for class_id, size in sizes.items() if size == max(sizes.values())]
        assert sample_id == next(each for each, (class_id, _) in left.items() if class_id in largest)
        del left[sample_id]
    assert len(left) == 20


def test_the_least_budget_for_tokens_that_the_message_names_is_enough() -> None:
    slot = slot_bytes(CODEC.code_bytes)
    with pytest.raises(ConfigError) as refused:
        Whole(CODEC, slot - 1, 0)
    assert f"Set learn.token_bytes to {slot} or more" in refused.value.hint
    assert Whole(CODEC, slot, 0).memory.slots == 1
