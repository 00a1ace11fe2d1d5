"""NVIDIA graphics cards, through the NVML library (the `pynvml` module of nvidia-ml-py, imported only when this meter is tried).

Used by the meter thread alone; a call takes well under a millisecond with a healthy driver. Xavier and Orin have no NVML before L4T 36.
"""

from __future__ import annotations

import importlib
from typing import Any, Callable, List, Optional, Sequence, Tuple

from latentd.energy.meters.reading import Reading
from latentd.errors import MeterUnavailable

# Return codes of nvml.h whose own text does not tell a user what is the matter.
_REASONS = {
    2: "there is no graphics card of that number",
    3: "this graphics card reports neither its energy nor its power",
    4: "the NVIDIA driver refuses permission",
    9: "the NVIDIA driver is not loaded",
    12: "NVML library not found (no NVIDIA driver)",
    15: "the graphics card fell off the bus",
}


def import_pynvml() -> Any:
    """The real module; raises ImportError."""
    return importlib.import_module("pynvml")


class NvmlMeter:
    """Joules of the graphics cards together; each card is a rail ("gpu0").

    gpus: indices in NVML's order (by PCI address, which CUDA_VISIBLE_DEVICES does not change); None: all cards of the machine.
    The driver's energy counter (Volta and later) is "measured". If any chosen card lacks it, the power of all is integrated, "estimated",
    for the driver's power is a moving average.
    """

    source = "nvml"

    def __init__(self, clock: Callable[[], float], gpus: Optional[Sequence[int]] = None, load: Callable[[], Any] = import_pynvml) -> None:
        self._clock = clock
        try:
            self._nvml = load()
        except ImportError as cause:
            raise MeterUnavailable("the module pynvml is not installed (pip install nvidia-ml-py)") from cause
        self._call("nvmlInit")
        try:
            self._cards = self._open(gpus)
            self._has_counter = self._counts_joules()
            self.read()
        except MeterUnavailable:
            self.close()
            raise
        self.scope = f"the graphics card{'s' if len(self._cards) > 1 else ''} ({', '.join(name for name, _ in self._cards)}); nothing else"

    def read(self) -> Reading:
        function = "nvmlDeviceGetTotalEnergyConsumption" if self._has_counter else "nvmlDeviceGetPowerUsage"
        # millijoules since the driver was loaded, or milliwatts
        rails = {name: float(self._call(function, handle)) / 1e3 for name, handle in self._cards}
        total, at_s = sum(rails.values()), self._clock()
        if self._has_counter:
            return Reading(self.source, "measured", at_s, energy_j=total, rails_j=rails)
        return Reading(self.source, "estimated", at_s, power_w=total, rails_w=rails)

    def close(self) -> None:
        try:
            self._nvml.nvmlShutdown()
        except self._nvml.NVMLError:
            pass  # a library that is gone needs no shutting down

    def _open(self, gpus: Optional[Sequence[int]]) -> List[Tuple[str, Any]]:
        count = int(self._call("nvmlDeviceGetCount"))
        chosen = range(count) if gpus is None else gpus
        if not chosen:
            raise MeterUnavailable("NVML sees no graphics card")
        return [(f"gpu{index}", self._call("nvmlDeviceGetHandleByIndex", index)) for index in chosen]

    def _counts_joules(self) -> bool:
        try:
            for _, handle in self._cards:
                self._nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        except self._nvml.NVMLError:
            return False
        return True

    def _call(self, function: str, *arguments: Any) -> Any:
        try:
            return getattr(self._nvml, function)(*arguments)
        except self._nvml.NVMLError as cause:
            code = getattr(cause, "value", None)
            raise MeterUnavailable(_REASONS.get(code, f"NVML: {cause}") if isinstance(code, int) else f"NVML: {cause}") from cause
