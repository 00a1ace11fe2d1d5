"""Which meter serves: the first of the configured ones that gives a reading, and why each one before it did not.

The meter thread runs this; a candidate may take seconds to give its first reading (tegrastats), so waiting is done by the caller's `wait`.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from latentd.energy.meters.ina3221 import Ina3221Meter
from latentd.energy.meters.nvml import NvmlMeter, import_pynvml
from latentd.energy.meters.rapl import RaplMeter
from latentd.energy.meters.reading import Meter
from latentd.energy.meters.tegrastats import TegrastatsMeter
from latentd.errors import ConfigError, MeterUnavailable

NAMES = ("ina3221", "tegrastats", "nvml", "rapl")
_POLL_S = 0.05


class Choice(NamedTuple):
    """The meter that serves, or None; and for each that was tried and passed over, the reason, in the order of trying. errors: what they
    raised that nobody foresaw; whoever chooses counts and logs it.
    """

    meter: Optional[Meter]
    passed_over: Mapping[str, str]
    errors: Tuple[Exception, ...] = ()

    @property
    def reason(self) -> str:
        """Every reason in one line, as status shows it when no meter serves."""
        return "; ".join(self.passed_over.values()) or "no meter is configured (energy.meters is empty)"


def check_names(names: Sequence[str]) -> None:
    """Raises ConfigError where a name is not a meter's."""
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise ConfigError(f"energy.meters names an unknown meter: {', '.join(unknown)}", hint=f"The meters are {', '.join(NAMES)}.")


def choose_meter(
    names: Sequence[str],
    root: Path,
    *,
    clock: Callable[[], float],
    wait: Callable[[float], bool],
    period_s: float = 0.2,
    tegrastats: Optional[Path] = None,
    gpus: Optional[Sequence[int]] = None,
    load_nvml: Callable[[], Any] = import_pynvml,
) -> Choice:
    """The first meter of `names` that gives a reading.

    root: root of the filesystem that holds sys and proc. clock: seconds, growing. wait: waits that many seconds and answers True when
    the caller wants to stop. tegrastats: its path; None: usr/bin/tegrastats under root. gpus: NVML indices; None: all cards.
    Raises ConfigError for an unknown name.
    """
    check_names(names)
    executable = tegrastats if tegrastats is not None else root / "usr/bin/tegrastats"
    makers: Dict[str, Callable[[], Meter]] = {
        "ina3221": lambda: Ina3221Meter(root, clock),
        "tegrastats": lambda: TegrastatsMeter(executable, clock, period_s),
        "nvml": lambda: NvmlMeter(clock, gpus, load_nvml),
        "rapl": lambda: RaplMeter(root, clock),
    }
    passed_over: Dict[str, str] = {}
    errors: List[Exception] = []
    for name in names:
        try:
            meter = _proven(makers[name](), wait)
        except MeterUnavailable as cause:
            passed_over[name] = cause.detail
        except Exception as cause:  # noqa: BLE001  the border of a candidate: whatever it does, the others are tried
            passed_over[name] = f"{name} failed: {cause!r}"
            errors.append(cause)
        else:
            return Choice(meter, passed_over, tuple(errors))
    return Choice(None, passed_over, tuple(errors))


def _proven(meter: Meter, wait: Callable[[float], bool]) -> Meter:
    """The meter once it gave a reading; closed again if it does not. A meter says by itself when it has been silent for too long."""
    with ExitStack() as on_failure:
        on_failure.callback(meter.close)
        while meter.read() is None:
            if wait(_POLL_S):
                raise MeterUnavailable(f"{meter.source} was not awaited: latentd stops")
        on_failure.pop_all()
    return meter
