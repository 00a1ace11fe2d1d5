"""Where what learns computes: on a GPU while that has memory for it, otherwise on the CPU.

Owned by the learner thread. Other threads call the blocks that answer; `answering` gives each of them a queue of its own, which goes before
the learner's.
"""

from __future__ import annotations

import copy
import logging
import threading
from typing import Any, Dict, Optional, TypeVar

import torch

from latentd.engines.torch_queue import ANSWERING, LEARNING, TorchQueue, has_gpu
from latentd.errors import ConfigError
from latentd.trouble import FAILURES, is_shortage

logger = logging.getLogger(__name__)
Module = TypeVar("Module", bound=torch.nn.Module)


class Place:
    """queue: what the learner computes through. reason: why that is the CPU's, where a GPU was wanted."""

    def __init__(self, queue: Optional[TorchQueue] = None, reason: Optional[str] = None) -> None:
        self.queue = queue or TorchQueue()
        self.reason = reason

    @staticmethod
    def of(wanted: str) -> Place:
        """wanted: learn.device. A GPU that does not work in this process (any more) is no reason not to learn.

        Raises ConfigError where "cuda" is wanted and torch finds none.
        """
        if wanted == "cpu" or (wanted == "auto" and not has_gpu()):
            return Place()
        if not has_gpu():
            raise ConfigError("learn.device = cuda, but torch finds no GPU", hint="`latentd doctor` says why; auto takes the CPU instead.")
        try:
            queue = TorchQueue("cuda", LEARNING)
            with queue.work():
                queue.download(torch.zeros(1, device=queue.device))
        except RuntimeError as cause:  # a lost context, or no memory for as much as that
            logger.error("learning goes on on the CPU, for the GPU can't be used: %s", cause)
            return Place(reason=f"the GPU can't be used: {cause}")
        return Place(queue)

    def taking(self, module: Module) -> Module:
        """A copy of the module on the device that learns; the module itself where that is the CPU."""
        if not self.queue.is_cuda:
            return module
        try:
            with self.queue.work():
                return copy.deepcopy(module).to(self.queue.device)
        except FAILURES as error:
            if not self.leaves(error):
                raise
        return module

    @property
    def name(self) -> str:
        return "cuda" if self.queue.is_cuda else "cpu"

    def leaves(self, error: BaseException) -> bool:
        """Whether this failure is a reason to go on on the CPU, and the same work would not be on the CPU already."""
        if not self.queue.is_cuda or not is_shortage(error):
            return False
        logger.error("learning goes on on the CPU until the next start, for the GPU has no memory: %s", error)
        self.queue.free()
        self.queue, self.reason = TorchQueue(), f"the GPU had no memory: {error}"
        return True


class _OfThread(threading.local):
    def __init__(self) -> None:
        self.queues: Dict[str, TorchQueue] = {}


_own = _OfThread()


def answering(module: torch.nn.Module, make: Any = TorchQueue) -> TorchQueue:
    """The calling thread's queue for answers, on the device of this module."""
    device = next(module.parameters()).device.type
    if device not in _own.queues:
        _own.queues[device] = make(device, ANSWERING)
    return _own.queues[device]
