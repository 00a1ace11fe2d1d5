"""Work for torch on one device, in order: on the CPU it is done at once; on CUDA it goes through a stream of its own.

Two queues share a GPU: what answers has the higher of torch's two priorities, what learns the lower one, which is also that of the default
stream. So the GPU takes waiting blocks of an answer before those of a training step. A queue belongs to one thread.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any, Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from latentd.trouble import free_cached

ANSWERING, LEARNING = -1, 0  # torch's priorities: lower numbers go first, and there are no others before 2.1


class TorchQueue:
    """device: a torch device, "cpu" or "cuda". cuda: torch.cuda, or what a test puts in its place.

    What another thread may see of a queue's tensors is what was complete at the end of a `work`.
    """

    def __init__(self, device: str = "cpu", priority: int = LEARNING, cuda: Any = torch.cuda) -> None:
        self.device = torch.device(device)
        self._cuda = cuda
        self._stream: Any = cuda.Stream(priority=priority) if self.device.type == "cuda" else None
        # A thread that waits for a training step sleeps; one whose answer is due in a millisecond spins.
        self._done: Any = cuda.Event(blocking=priority == LEARNING) if self.is_cuda else None

    @property
    def is_cuda(self) -> bool:
        return self._stream is not None

    @contextmanager
    def work(self) -> Iterator[None]:
        """All that torch is told inside goes through this queue and is complete at the end, unless something is raised."""
        if self._stream is None:
            yield
            return
        with self._cuda.stream(self._stream):
            yield
            self._done.record(self._stream)
        self._done.synchronize()

    def upload(self, values: NDArray[Any]) -> torch.Tensor:
        """Inside `work`: an array as a tensor on the device, by way of pinned memory. On the CPU it shares the array's memory."""
        host = torch.from_numpy(values)
        return host.pin_memory().to(self.device, non_blocking=True) if self.is_cuda else host

    def download(self, tensor: torch.Tensor) -> NDArray[np.float32]:
        """Inside `work`: a tensor as an array, once it is computed. From the CPU it shares the tensor's memory."""
        found: NDArray[np.float32] = tensor.detach().cpu().numpy()
        return found

    def free(self) -> None:
        """Gives what torch holds for later back to the device. On a board with one memory for all, the next owner may be the CPU."""
        if self.is_cuda:
            free_cached()


def has_gpu() -> bool:
    """Whether torch can use a GPU; False, never an error, where the driver is broken."""
    try:
        return torch.version.cuda is not None and torch.cuda.is_available()
    except RuntimeError:
        return False
