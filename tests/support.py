"""What several tests need: a real daemon in a process of its own, and photographs made from a seed."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import List, Mapping, Optional, Tuple, Type

import httpx
import numpy as np
from PIL import Image, ImageDraw

SOURCES = Path(__file__).parents[1] / "daemon"
START_S = 180.0  # a first start also exports the backbone to ONNX and checks it
STOP_S = 30.0
LISTENING = re.compile(r"listening on (http://\S+)")


class DaemonProcess:
    """`python -m latentd serve` on a free loopback port, started by the constructor and ready when it returns.

    Raises RuntimeError with the daemon's log when it ends, or is not ready in START_S seconds. Leaving the `with` block kills it.
    """

    def __init__(self, state_dir: Path, cache_dir: Path, *flags: str, environ: Optional[Mapping[str, str]] = None) -> None:
        self._lines: List[str] = []
        self._address: Optional[str] = None
        self._known = threading.Event()  # set with the address, and at the end of the log
        command = [sys.executable, "-m", "latentd", "serve", "--bind", "127.0.0.1:0"]
        folders = ["--state-dir", str(state_dir), "--cache-dir", str(cache_dir)]
        self.process = subprocess.Popen(
            [*command, *folders, *flags],
            env=environment(environ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            universal_newlines=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            self.url = self._await_ready(time.monotonic() + START_S)
        except BaseException:
            self.kill()
            raise

    @property
    def log(self) -> str:
        """All that it wrote to stdout and stderr so far."""
        return "".join(self._lines)

    def kill(self) -> None:
        """SIGKILL: the end without any farewell, as a power cut. Does nothing when it has ended."""
        self.process.kill()
        self._ended(STOP_S)

    def stop(self) -> int:
        """SIGTERM; the exit code of an orderly end, which must come within STOP_S seconds."""
        self.process.send_signal(signal.SIGTERM)
        return self._ended(STOP_S)

    def _ended(self, timeout_s: float) -> int:
        code = self.process.wait(timeout_s)
        self._reader.join(timeout_s)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.append(line)
            found = LISTENING.search(line)
            if found:
                self._address = found.group(1)
                self._known.set()
        self._known.set()

    def _await_ready(self, deadline: float) -> str:
        self._known.wait(max(0.0, deadline - time.monotonic()))
        if self._address is None:
            raise RuntimeError(f"the daemon did not say where it listens; its log:\n{self.log}")
        with httpx.Client(base_url=self._address, trust_env=False, timeout=10.0) as client:
            while client.get("/readyz").status_code != 200:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"the daemon did not become ready; its log:\n{self.log}")
                threading.Event().wait(0.05)
        return self._address

    def __enter__(self) -> DaemonProcess:
        return self

    def __exit__(self, kind: Optional[Type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]) -> None:
        self.kill()


def environment(changes: Optional[Mapping[str, str]] = None) -> Mapping[str, str]:
    """The environment of a child process that runs this checkout, with no configuration but what `changes` says."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LATENTD_")}
    paths = [str(SOURCES), *filter(None, [kept.get("PYTHONPATH")])]
    return {**kept, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", **(changes or {})}


def photo(seed: int, motif: str = "discs", size: Tuple[int, int] = (320, 240), format: str = "JPEG") -> bytes:
    """An encoded picture with soft light, shapes and grain; another seed is another picture of the same kind of thing.

    motif: "discs", "stripes" or "rings", which a vision model tells apart. size: (width, height) in pixels. format: Pillow's name of it.
    """
    dice = np.random.default_rng(seed)
    patches = dice.integers(60, 196, 3) + dice.integers(-30, 31, (4, 5, 3))
    light = Image.fromarray(patches.astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(light)
    for _ in range(int(dice.integers(5, 9))):
        _shape(draw, motif, dice, size)
    grain = dice.normal(0.0, 6.0, (size[1], size[0], 3))
    pixels = np.clip(np.asarray(light, dtype=np.float64) + grain, 0, 255).astype(np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, format)
    return encoded.getvalue()


def _shape(draw: ImageDraw.ImageDraw, motif: str, dice: np.random.Generator, size: Tuple[int, int]) -> None:
    colour = tuple(int(value) for value in dice.integers(0, 256, 3))
    x, y = (int(dice.integers(0, side)) for side in size)
    reach = int(dice.integers(min(size) // 12 + 2, min(size) // 5 + 3))
    box = (x - reach, y - reach, x + reach, y + reach)
    if motif == "discs":
        draw.ellipse(box, fill=colour)
    elif motif == "rings":
        draw.ellipse(box, outline=colour, width=max(2, reach // 4))
    elif motif == "stripes":
        draw.line((x - size[0], y - reach, x + size[0], y + reach), fill=colour, width=max(2, reach // 2))
    else:
        raise ValueError(f"there is no motif {motif}")
