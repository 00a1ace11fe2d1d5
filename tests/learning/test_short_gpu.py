"""A GPU without memory for what a sleep does outside its micro-batches: the learner leaves it, and learns the same on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fake_cuda import FakeCuda
from latentd.learning.adapted import Adapted
from latentd.learning.blocks import RankedBlocks, UpperBlocks
from latentd.learning.place import Place
from learning.test_place import BRIEF, FULL, asleep, assert_same
from sleepers import CODEC, filled, held, run


def full_on_the_gpu(monkeypatch: pytest.MonkeyPatch, fake_cuda: FakeCuda, owner: type, name: str) -> None:
    """Lets this method find no memory wherever it is called on the GPU."""
    whole = getattr(owner, name)

    def full(self: Any, *arguments: Any, **options: Any) -> Any:
        if fake_cuda.current is not None:
            raise RuntimeError(FULL)
        return whole(self, *arguments, **options)

    monkeypatch.setattr(owner, name, full)


@pytest.mark.parametrize(
    ("owner", "name"), [(RankedBlocks, "__init__"), (torch.nn.Linear, "to"), (torch.optim.AdamW, "step"), (RankedBlocks, "frozen")]
)
def test_a_gpu_without_memory_for_what_is_not_a_micro_batch_is_left_too(
    base: UpperBlocks, on_gpu: Place, fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, owner: type, name: str
) -> None:
    adapted = Adapted(base, CODEC, BRIEF, on_gpu)
    full_on_the_gpu(monkeypatch, fake_cuda, owner, name)
    run(adapted.sleep(filled(20), held(4), 20))
    assert (on_gpu.name, on_gpu.reason) == ("cpu", f"the GPU had no memory: {FULL}")
    assert fake_cuda.freed > 0
    if name != "__init__":  # nothing was learned yet that could be void
        assert (adapted.sleeps, adapted.serving) == (0, None)
        asleep(adapted)
    assert adapted.sleeps == 1
    assert_same(adapted, asleep(Adapted(base, CODEC, BRIEF)))


@pytest.mark.parametrize("name", ["__init__", "restore", "frozen"])
def test_a_version_is_read_and_undone_on_the_cpu_where_the_gpu_has_no_memory(
    base: UpperBlocks, on_gpu: Place, fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    plain = asleep(Adapted(base, CODEC, BRIEF))
    full_on_the_gpu(monkeypatch, fake_cuda, RankedBlocks, name)
    adapted = Adapted(base, CODEC, BRIEF, on_gpu)
    assert adapted.restore(*plain.state(), held(4))
    assert on_gpu.name == "cpu"
    assert_same(adapted, plain)
    adapted.forget()
    assert adapted.serving is None


def test_a_step_that_finds_no_memory_on_the_cpu_is_told_to_the_learner(base: UpperBlocks, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(torch.optim.AdamW, "step", full)
    with pytest.raises(MemoryError):
        run(Adapted(base, CODEC, BRIEF).sleep(filled(20), {}, 20))
