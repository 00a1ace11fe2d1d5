"""What HTTP, the journal and the learner cost on top of the bare engine, as ratios in one run on the same photographs.

Measured: classify latency at one client against decode + a bare ONNX Runtime call; throughput of sixteen clients and of learn against the
bare engine at its best batch size; warm start to /readyz; resident memory over 2,000 requests. Writes out/serving.json and
out/serving.png.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import os
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Sequence
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

import elpv_cells
import harness
from latentd import config
from latentd.engines.artefacts import Artefacts
from latentd.engines.stage import planar, stage_spec
from latentd.vision import checkpoints, images

console = Console()
ROUNDS = 5
LATENCY_IMAGES = 40  # a round
CLIENTS = 16
CLIENT_IMAGES = 256  # a round
BATCHES = (1, 2, 4, 8, 16)
REQUESTS = 2000


class BareEngine:
    """ONNX Runtime with its default options on the same graph: what there would be without latentd."""

    def __init__(self, settings: config.Config) -> None:
        import onnxruntime

        backbone = checkpoints.pull(settings.cache_dir, progress=console.print)
        spec = stage_spec(settings, backbone)
        graph = Artefacts(backbone, spec, settings.cache_dir).graph()
        self._make: Callable[[], Any] = lambda: onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
        self._size = spec.image_size
        self._limits = images.ImageLimits(1 << 24, 1 << 26, 1)
        self._session: Any = None

    def __enter__(self) -> BareEngine:
        self._session = self._make()
        return self

    def __exit__(self, *_: object) -> None:
        self._session = None  # its threads would spin beside the daemon's

    def pixels(self, photo: bytes) -> NDArray[np.uint8]:
        return images.decode(photo, self._size, self._limits)

    def run(self, pixels: NDArray[np.uint8]) -> None:
        self._session.run(["features"], {"pixels": planar(pixels)})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="out/serving.json")
    parser.add_argument("--requests", type=int, default=REQUESTS, help="requests of the memory measurement")
    arguments = parser.parse_args()
    settings = config.load(os.environ, {})
    bare = BareEngine(settings)
    cells = elpv_cells.load(settings.cache_dir)
    state = harness.scratch_folder()
    daemon = harness.DaemonProcess(state)
    cold_s = daemon.ready_s
    fresh = iter(cells)
    _learn(daemon, fresh, 64)
    asked = [cell.png for cell in itertools.islice(fresh, CLIENT_IMAGES)]
    result: Dict[str, Any] = {"machine": harness.machine(), "first_start_s": cold_s}
    result["classify_one_client"] = _latency(daemon, bare, asked[:LATENCY_IMAGES])
    result["throughput"] = _throughput(daemon, bare, asked, fresh)
    result["memory"] = _memory(daemon, asked, arguments.requests)
    daemon.stop()
    result["warm_start_s"] = _warm_starts(state)
    harness.save_json(Path(arguments.out), result)
    _plot(result, Path(arguments.out).with_suffix(".png"))
    _say(result)
    return 0


def _latency(daemon: harness.DaemonProcess, bare: BareEngine, photos: Sequence[bytes]) -> Dict[str, Any]:
    """Milliseconds of each call, the two ways in turns."""
    console.print("classify, one client …")
    client = Client(daemon.url)
    over_http: List[float] = []
    alone: List[float] = []
    for _ in range(ROUNDS):
        with bare:
            alone += _timed_calls(lambda photo: bare.run(bare.pixels(photo)[None]), photos)
        over_http += _timed_calls(lambda photo: client.post("/v1/classify", photo), photos)
    median_bare, median_http = statistics.median(alone), statistics.median(over_http)
    return {
        "bare_median_ms": 1e3 * median_bare,
        "http_median_ms": 1e3 * median_http,
        "http_p95_ms": 1e3 * float(np.quantile(over_http, 0.95)),
        "ratio": median_http / median_bare,
        "calls": len(over_http),
    }


def _throughput(
    daemon: harness.DaemonProcess, bare: BareEngine, photos: Sequence[bytes], fresh: Iterator[elpv_cells.Cell]
) -> Dict[str, Any]:
    """Images per second: the bare engine at each batch size, sixteen clients, and learning; in turns."""
    console.print("throughput …")
    pixels = np.stack([bare.pixels(photo) for photo in photos[:64]])
    alone: Dict[int, List[float]] = {batch: [] for batch in BATCHES}
    served: List[float] = []
    learned: List[float] = []
    for _ in range(ROUNDS):
        with bare:
            for batch in BATCHES:
                alone[batch].append(_bare_rate(bare, pixels, batch))
        served.append(_served_rate(daemon.url, photos))
        learned.append(_learn(daemon, fresh, 192))
        daemon.wait_until_rested()  # a sleep would run beside the bare engine
    medians = {batch: statistics.median(rates) for batch, rates in alone.items()}
    best = max(medians, key=lambda batch: medians[batch])
    return {
        "bare_images_per_s": medians,
        "bare_best_batch": best,
        "clients16_images_per_s": statistics.median(served),
        "clients16_ratio": statistics.median(served) / medians[best],
        "learn_images_per_s": statistics.median(learned),
        "learn_ratio": statistics.median(learned) / medians[best],
        "learn_kept_samples": daemon.get("/v1/memory")["used"],
    }


def _bare_rate(bare: BareEngine, pixels: NDArray[np.uint8], batch: int) -> float:
    bare.run(pixels[:batch])
    started = time.perf_counter()
    for start in range(0, len(pixels), batch):
        bare.run(pixels[start : start + batch])
    return len(pixels) / (time.perf_counter() - started)


def _served_rate(url: str, photos: Sequence[bytes]) -> float:
    """Sixteen clients, one photograph a request, each on a connection of its own."""
    todo = iter(photos)
    lock = threading.Lock()
    gate = threading.Barrier(CLIENTS + 1)

    def work() -> None:
        client = Client(url)
        gate.wait()
        while True:
            with lock:
                photo = next(todo, None)
            if photo is None:
                return
            client.post("/v1/classify", photo)

    threads = [threading.Thread(target=work) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    gate.wait()
    started = time.perf_counter()
    for thread in threads:
        thread.join()
    return len(photos) / (time.perf_counter() - started)


def _learn(daemon: harness.DaemonProcess, fresh: Iterator[elpv_cells.Cell], count: int) -> float:
    """Teaches photographs that were never taught before, sixteen a request; images per second until the last 202."""
    cells = list(itertools.islice(fresh, count))
    started = time.perf_counter()
    for batch in harness.mini_batches(range(len(cells))):
        daemon.teach([cells[i].png for i in batch], [cells[i].kind for i in batch])
    return len(cells) / (time.perf_counter() - started)


def _memory(daemon: harness.DaemonProcess, photos: Sequence[bytes], requests: int) -> Dict[str, Any]:
    """Resident bytes before, every hundred requests, and after."""
    console.print(f"memory over {requests} requests …")
    client = Client(daemon.url)
    course = [daemon.rss_bytes()[0]]
    for index in range(requests):
        client.post("/v1/classify", photos[index % len(photos)])
        if index % 100 == 99:
            course.append(daemon.rss_bytes()[0])
    half = len(course) // 2
    return {
        "start_bytes": course[0],
        "end_bytes": course[-1],
        "peak_bytes": daemon.rss_bytes()[1],
        "second_half_growth_bytes": course[-1] - course[half],
        "course_bytes": course,
    }


def _warm_starts(state: Path) -> List[float]:
    console.print("warm starts …")
    found = []
    for _ in range(3):
        daemon = harness.DaemonProcess(state)
        found.append(daemon.ready_s)
        daemon.stop()
    return found


class Client:
    """One keep-alive connection, as light as Python has it: what the clients cost is not what is measured."""

    def __init__(self, url: str) -> None:
        self._connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=120)

    def post(self, path: str, body: bytes) -> bytes:
        self._connection.request("POST", path, body, {"Content-Type": "image/png"})
        answer = self._connection.getresponse()
        content = answer.read()
        if answer.status != 200:
            raise RuntimeError(f"{path} answered {answer.status}: {content[:300]!r}")
        return content


def _timed_calls(call: Callable[[bytes], object], photos: Sequence[bytes]) -> List[float]:
    """Seconds of one call a photograph, after one that warms up and is not counted."""
    call(photos[0])
    seconds = []
    for photo in photos:
        started = time.perf_counter()
        call(photo)
        seconds.append(time.perf_counter() - started)
    return seconds


def _say(result: Dict[str, Any]) -> None:
    one, many, memory = result["classify_one_client"], result["throughput"], result["memory"]
    console.print(f"classify, one client: {one['http_median_ms']:.1f} ms against {one['bare_median_ms']:.1f} ms bare: {one['ratio']:.3f} x")
    console.print(
        f"16 clients: {many['clients16_images_per_s']:.1f} images/s: {many['clients16_ratio']:.3f} x "
        f"the bare engine at batch {many['bare_best_batch']}"
    )
    console.print(f"learn: {many['learn_images_per_s']:.1f} images/s: {many['learn_ratio']:.3f} x")
    console.print(f"warm start: {', '.join(f'{seconds:.2f}' for seconds in result['warm_start_s'])} s")
    console.print(
        f"resident memory: start {memory['start_bytes'] / 1e6:.0f}, peak {memory['peak_bytes'] / 1e6:.0f}, "
        f"end {memory['end_bytes'] / 1e6:.0f} MB"
    )


def _plot(result: Dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    many = result["throughput"]
    names = [f"bare, batch {batch}" for batch in many["bare_images_per_s"]] + ["16 clients", "learn"]
    values = [*many["bare_images_per_s"].values(), many["clients16_images_per_s"], many["learn_images_per_s"]]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.5))
    left.bar_label(left.barh(names, values, color=["lightgrey"] * len(BATCHES) + ["tab:blue", "tab:green"]), fmt="%.1f")
    left.set(xlabel="images per second")
    course = [value / 1e6 for value in result["memory"]["course_bytes"]]
    right.plot(range(0, 100 * len(course), 100), course)
    right.set(xlabel="requests", ylabel="resident memory (MB)", ylim=(0, max(course) * 1.1))
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
