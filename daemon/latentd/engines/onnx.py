"""The frozen stage in ONNX Runtime, on one execution provider. onnxruntime is imported when the first session opens, torch never."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Tuple, Type

import numpy as np
from numpy.typing import NDArray

from latentd.engines.stage import Encoded, StageSpec, planar
from latentd.errors import EngineError

_CPU = "CPUExecutionProvider"
_ERRORS_ONLY = 3


class OnnxStage:
    """FrozenStage over one session; opening it takes a fraction of a second on a CPU.

    Raises EngineError where the provider can't serve: ONNX Runtime itself would quietly take the CPU instead.
    """

    def __init__(self, spec: StageSpec, graph: Path, provider: str, threads: int = 0) -> None:
        import onnxruntime

        self.spec = spec
        self.name = engine_name(provider)
        self._errors = _runtime_errors()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = _ERRORS_ONLY
        # Spin between operators, which is fastest, but not after a run: there it would take cores and joules from the learner.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        wanted = [provider] if provider == _CPU else [provider, _CPU]  # the CPU takes the nodes that a device has no kernel for
        try:
            self._session: Any = onnxruntime.InferenceSession(str(graph), options, providers=wanted)
        except self._errors as cause:
            raise EngineError(f"{self.name} could not load the graph: {cause}") from cause
        serving = self._session.get_providers()[0]
        if serving != provider:
            raise EngineError(f"asked for {provider}, ONNX Runtime fell back to {serving}", hint="Its log says which library is missing.")

    def encode(self, pixels: NDArray[np.uint8], tokens: bool = False) -> Encoded:
        outputs = ["features", "tokens"] if tokens else ["features"]
        try:
            found = self._session.run(outputs, {"pixels": planar(pixels)})
        except self._errors as cause:
            raise EngineError(f"{self.name} failed on {len(pixels)} images: {cause}") from cause
        return Encoded(found[0], found[1] if tokens else None)

    def close(self) -> None:
        self._session = None


def engine_name(provider: str) -> str:
    """CPUExecutionProvider -> onnxruntime-cpu."""
    return "onnxruntime-" + provider.replace("ExecutionProvider", "").lower()


def _runtime_errors() -> Tuple[Type[Exception], ...]:
    """ONNX Runtime's exceptions share no base class short of Exception: all of them, by name."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    kinds = tuple(kind for kind in vars(state).values() if isinstance(kind, type) and issubclass(kind, Exception))
    return (*kinds, RuntimeError, ValueError)
