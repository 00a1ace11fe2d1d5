"""A latentd in a process of its own, as benchmarks, the demo and tests use it: started on a free port, taught and asked over HTTP, killed.

Runs in the main thread of whoever uses it; everything here blocks.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple, Type

import httpx

from latentd.energy import board

BATCH = 16
READY_S = 180.0  # a first start also exports the backbone to ONNX and checks it
END_S = 60.0


class DaemonProcess:
    """`latentd serve` on a free loopback port with the given state folder; ready when the constructor returns.

    flags: of the verb. environ: the whole environment; None: that of this process. ready_s: seconds from the start of the process to
    /readyz. Leaving a `with` block kills it. Raises RuntimeError with the log's end when it does not come up.
    """

    def __init__(self, state_dir: Path, *flags: str, environ: Optional[Mapping[str, str]] = None) -> None:
        state_dir.mkdir(parents=True, exist_ok=True)
        self._log = open(state_dir / "daemon.log", "ab")  # noqa: SIM115 - closed at its end
        self._address = state_dir / "address"
        if self._address.exists():
            self._address.unlink()
        started = time.perf_counter()
        command = [sys.executable, "-m", "latentd", "serve", "--bind", "127.0.0.1:0", "--state-dir", str(state_dir), *flags]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=self._log, stdout=self._log, env=environ)
        self.client = httpx.Client(timeout=120.0, trust_env=False)
        try:
            self.url = self._wait_ready(started + READY_S)
        except BaseException:
            self.kill()
            raise
        self.ready_s = time.perf_counter() - started
        self.client.base_url = httpx.URL(self.url)

    def __enter__(self) -> DaemonProcess:
        return self

    def __exit__(self, kind: Optional[Type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]) -> None:
        self.kill()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def log(self) -> str:
        """All that daemons with this state folder wrote to stdout and stderr so far."""
        return Path(self._log.name).read_text(errors="replace")

    def kill(self) -> None:
        """SIGKILL: what a power cut looks like to the process. Does nothing when it has ended."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    def rss_bytes(self) -> Tuple[int, int]:
        """Resident memory now and at its peak, in bytes (Linux)."""
        fields = dict(line.split(":", 1) for line in Path(f"/proc/{self.pid}/status").read_text().splitlines() if ":" in line)
        return int(fields["VmRSS"].split()[0]) * 1024, int(fields["VmHWM"].split()[0]) * 1024

    def teach(self, photos: Sequence[bytes], labels: Sequence[str], wait_s: int = 0) -> List[Dict[str, Any]]:
        """One request; the results, one a photo."""
        files = [("image", (f"{index}.png", photo, "image/png")) for index, photo in enumerate(photos)]
        headers = {"Prefer": f"wait={wait_s}"} if wait_s else {}
        answer = self.client.post("/v1/learn", files=files, data={"label": list(labels)}, headers=headers)
        return _results(answer)

    def ask(self, photos: Sequence[bytes]) -> List[str]:
        """The most probable label of each of any number of photos, trusted or not, sixteen a request."""
        labels: List[str] = []
        for start in range(0, len(photos), BATCH):
            files = [("image", (f"{index}.png", photo, "image/png")) for index, photo in enumerate(photos[start : start + BATCH])]
            labels += [result["predictions"][0]["label"] for result in _results(self.client.post("/v1/classify", files=files))]
        return labels

    def get(self, path: str) -> Dict[str, Any]:
        found: Dict[str, Any] = self.client.get(path).raise_for_status().json()
        return found

    def wait_until_learned(self, timeout_s: float = 120.0) -> None:
        """Returns when nothing waits for the learner."""
        deadline = time.monotonic() + timeout_s
        learner = self.get("/v1/learner")
        while learner["lag_samples"]:
            if time.monotonic() > deadline:
                raise RuntimeError(f"the learner did not catch up: it is {learner['state']}, {learner['reason'] or 'and gives no reason'}")
            time.sleep(0.05)
            learner = self.get("/v1/learner")

    def wait_until_rested(self, timeout_s: float = 900.0) -> float:
        """Returns when the learner has learned and slept all that it wants to; the seconds that this took."""
        self.wait_until_learned()
        started, calm = time.monotonic(), 0
        while calm < 2:  # between learning and sleeping it may look idle for a moment
            calm = calm + 1 if self.get("/v1/learner")["state"] == "idle" else 0
            if time.monotonic() > started + timeout_s:
                raise RuntimeError(f"the learner does not come to rest: {self.get('/v1/learner')}")
            time.sleep(0.2)
        return time.monotonic() - started

    def _wait_ready(self, deadline: float) -> str:
        while time.perf_counter() < deadline and self._process.poll() is None:
            if self._address.exists():
                url = self._address.read_text().strip()
                with suppress(httpx.TransportError):  # it does not listen yet
                    if self.client.get(url + "/readyz").status_code == 200:
                        return url
            time.sleep(0.02)
        raise RuntimeError("latentd did not start:\n" + self.log[-3000:])

    def _end(self, sign: signal.Signals) -> None:
        if self._process.poll() is None:
            self._process.send_signal(sign)
            self._process.wait(END_S)
        self.client.close()
        self._log.close()


def scratch_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="latentd-bench-"))


def mini_batches(items: Sequence[int]) -> Iterator[Sequence[int]]:
    for start in range(0, len(items), BATCH):
        yield items[start : start + BATCH]


def machine() -> Dict[str, Any]:
    """What a figure was measured on, and how fast it was allowed to run at that moment."""
    now = board.read(Path("/"))
    names = [line.split(":", 1)[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "power_mode": now.power_mode,
        "cores_online": now.cores_online,
        "clocks": {unit: clock._asdict() for unit, clock in now.clocks.items()},
        "throttled": dict(now.throttled),
    }


def save_json(path: Path, result: Dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")


def energy_text(energy: Dict[str, Any]) -> str:
    """Joules so far, or why there are none."""
    if energy["energy_j"] is None:
        return f"unavailable: {energy['meter']['reason']}"
    return f"{energy['energy_j']:.1f} J ({energy['source']}, {energy['quality']})"


def _results(answer: httpx.Response) -> List[Dict[str, Any]]:
    if answer.status_code >= 300:
        raise RuntimeError(f"{answer.request.url.path} answered {answer.status_code}: {answer.text[:500]}")
    results: List[Dict[str, Any]] = answer.json()["results"]
    for result in results:
        if "problem" in result:
            raise RuntimeError(f"an image was refused: {result['problem']}")
    return results


def _cpuinfo() -> List[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []
