"""CUDA as torch shows it, without a GPU: streams and events that only write down what is asked of them, tensors that stay on the CPU."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any, Iterator, List, Optional

import pytest
import torch

from latentd.engines import torch_queue
from latentd.engines.torch_queue import TorchQueue


class FakeStream:
    def __init__(self, priority: int = 0) -> None:
        self.priority = priority
        self.cuda_stream = 0x5EED + priority
        self.unfinished = 0  # times something was queued since the last wait


class FakeEvent:
    def __init__(self, cuda: FakeCuda, blocking: bool) -> None:
        self.blocking = blocking
        self._cuda = cuda
        self._stream: Optional[FakeStream] = None

    def record(self, stream: FakeStream) -> None:
        assert self._cuda.current is stream, "an event is recorded on the stream that is in use"
        self._stream = stream

    def synchronize(self) -> None:
        assert self._stream is not None, "nothing was recorded"
        self._stream.unfinished = 0
        self._cuda.waits += 1


class FakeCuda:
    """What TorchQueue asks of torch.cuda. current: the stream in use; waits: how often one was waited for; freed: caches emptied."""

    def __init__(self) -> None:
        self.current: Optional[FakeStream] = None
        self.streams: List[FakeStream] = []
        self.events: List[FakeEvent] = []
        self.waits = self.freed = self.pinned = 0

    def Stream(self, priority: int = 0) -> FakeStream:  # noqa: N802 - torch's name
        self.streams.append(FakeStream(priority))
        return self.streams[-1]

    def Event(self, blocking: bool = False) -> FakeEvent:  # noqa: N802 - torch's name
        self.events.append(FakeEvent(self, blocking))
        return self.events[-1]

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before, self.current = self.current, stream
        stream.unfinished += 1
        try:
            yield
        finally:
            self.current = before

    def queue(self, device: str = "cuda", priority: int = 0) -> TorchQueue:
        """A queue that believes it is on a GPU, with its tensors on the CPU; on the CPU where it is asked for."""
        made = TorchQueue(device, priority, self)
        made.device = torch.device("cpu")
        return made


def install(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """The one GPU of a test; its tensors are pinned and its cache is emptied by counting."""
    cuda = FakeCuda()

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        cuda.pinned += 1
        return tensor.clone()  # what is written to the array afterwards must not matter

    def freed() -> None:
        cuda.freed += 1

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch_queue, "free_cached", freed)
    return cuda


def watched(module: torch.nn.Module, cuda: FakeCuda, priority: int) -> torch.nn.Module:
    """The module, which fails when it computes outside a stream of this priority."""

    def check(*_: Any) -> None:
        assert cuda.current is not None and cuda.current.priority == priority, "it computes on the default stream, or on another's"

    module.register_forward_pre_hook(check)
    return module
