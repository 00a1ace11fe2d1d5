"""The frozen stage in ONNX Runtime, on one execution provider. onnxruntime is imported when the first session opens, torch for CUDA only.

On CUDA the arena is bounded and grows by what is asked for, so that a shared memory is left to others, and the stream goes before the
learner's.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Dict, List, Optional, Set, Tuple, Type

import numpy as np
from numpy.typing import NDArray

from latentd.engines.device import answering_stream
from latentd.engines.stage import Encoded, StageSpec, planar
from latentd.errors import EngineError
from latentd.trouble import is_shortage

CPU = "CPUExecutionProvider"
_CUDA = "CUDAExecutionProvider"
_ERRORS_ONLY = 3
CUDA_MEMORY_BYTES = 1 << 30


class OnnxStage:
    """FrozenStage over one session or, on a CPU with several cores, two; opening one takes a fraction of a second.

    Cores that share one image wait for each other after every operator. So they do that only for an image that comes alone; otherwise each
    takes images of its own, from the second session. Raises EngineError where the provider can't serve: ONNX Runtime itself would quietly
    take the CPU instead. alone: images of a batch run one by one, because the graph is for one. A graph whose input is uint8 takes pixels
    as they come.
    """

    def __init__(
        self,
        spec: StageSpec,
        graph: Path,
        provider: str,
        threads: int = 0,
        kind: str = "",
        alone: bool = False,
        cuda_memory_bytes: int = CUDA_MEMORY_BYTES,
    ) -> None:
        self.spec = spec
        self.name = engine_name(provider) + kind
        self._alone = alone
        self.lanes = (threads or usable_cores()) if provider == CPU else 1
        self._errors = runtime_errors()
        self._graph, self._provider = graph, provider
        self._cuda_memory_bytes = cuda_memory_bytes
        self._stream: Optional[Any] = answering_stream() if provider == _CUDA else None  # lives as long as the session
        self._is_short = False
        self._session = self._open(threads)
        self._lane_session = self._open(1) if self.lanes > 1 else self._session
        self._prepare = np.ascontiguousarray if self._session.get_inputs()[0].type == "tensor(uint8)" else planar

    def encode(self, pixels: NDArray[np.uint8], tokens: bool = False, shared: bool = False) -> Encoded:
        outputs = ["features", "tokens"] if tokens else ["features"]
        session = self._lane_session if shared else self._session
        step = 1 if self._alone else max(1, len(pixels))
        parts = [self._prepare(pixels[start : start + step]) for start in range(0, len(pixels), step)]
        try:
            found = [session.run(outputs, {"pixels": part}, self._run_options()) for part in parts]
        except self._errors as cause:
            self._is_short = self._provider == _CUDA and is_shortage(cause)
            raise EngineError(f"{self.name} failed on {len(pixels)} images: {cause}") from cause
        features, *rest = found[0] if len(found) == 1 else [np.concatenate(each) for each in zip(*found)]
        return Encoded(features, rest[0] if tokens else None)

    def close(self) -> None:
        self._session = self._lane_session = None

    def _run_options(self) -> Optional[Any]:
        """After a run without memory: one that gives back what the arena holds in pieces of the wrong sizes."""
        if not self._is_short:
            return None
        import onnxruntime

        self._is_short = False
        options = onnxruntime.RunOptions()
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "gpu:0")
        return options

    def _provider_options(self) -> Dict[str, str]:
        if self._provider != _CUDA:
            return {}
        own = {} if self._stream is None else {"user_compute_stream": str(self._stream.cuda_stream)}
        return {
            "gpu_mem_limit": str(self._cuda_memory_bytes),
            "arena_extend_strategy": "kSameAsRequested",
            "cudnn_conv_algo_search": "HEURISTIC",  # the only convolution is the patches': no search is worth its time and memory
            **own,
        }

    def _open(self, threads: int) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        # Said, because left to itself ONNX Runtime ties its threads to cores: to ones that this process may not use, and to the very one on
        # which its caller or the learner runs. An image takes three times as long then.
        options.intra_op_num_threads = threads or len({_siblings(cpu) for cpu in _affinity()})
        options.log_severity_level = _ERRORS_ONLY
        # Spin between operators, which is fastest, but not after a run: there it would take cores and joules from the learner.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        # Numbers near zero that need a slow path of the processor: an image takes a twentieth longer with them, in INT8 a twelfth.
        options.add_session_config_entry("session.set_denormal_as_zero", "1")
        wanted: List[Any] = [(self._provider, self._provider_options())]
        wanted += [] if self._provider == CPU else [CPU]  # it takes what a device has no kernel for
        try:
            # In a thread that ends: the first session of a process sets that for the thread that makes it, too, and whatever it computes.
            with ThreadPoolExecutor(1) as aside:
                session = aside.submit(onnxruntime.InferenceSession, str(self._graph), options, providers=wanted).result()
        except self._errors as cause:
            raise EngineError(f"{self.name} could not load the graph: {cause}") from cause
        serving = session.get_providers()[0]
        if serving != self._provider:
            raise EngineError(
                f"asked for {self._provider}, ONNX Runtime fell back to {serving}", hint="Its log says which library is missing."
            )
        return session


def usable_cores() -> int:
    """The cores that this process may run on: fewer than the machine has, under a container's or a service's affinity."""
    return len(_affinity())


def _affinity() -> Set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def _siblings(cpu: int) -> str:
    """The same for all hyperthreads of one core, which gain nothing by sharing one image."""
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text(encoding="ascii")
    except (OSError, ValueError):
        return str(cpu)


def engine_name(provider: str) -> str:
    """CPUExecutionProvider -> onnxruntime-cpu."""
    return "onnxruntime-" + provider.replace("ExecutionProvider", "").lower()


def runtime_errors() -> Tuple[Type[Exception], ...]:
    """ONNX Runtime's exceptions share no base class short of Exception: all of them, by name."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    kinds = tuple(kind for kind in vars(state).values() if isinstance(kind, type) and issubclass(kind, Exception))
    return (*kinds, RuntimeError, ValueError)
