"""Runs first in the processes that a test starts with this folder on the path: they have no GPU, and their device memory is the CPU's."""

from __future__ import annotations

from typing import Any

from latentd.engines import device


def _host_memory() -> Any:
    from standin.host import HostMemory

    return HostMemory()


device.CudaMemory = _host_memory  # type: ignore[assignment,misc]
