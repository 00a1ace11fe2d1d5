"""What decoding takes of the memory at most and gives back: measured in a child process, beside what the plan says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Dict, NamedTuple

import numpy as np
import pytest
from PIL import Image

from latentd.config import Config, HttpConfig
from latentd.service import memory_plan
from latentd.service.memory_plan import DINOV2_SMALL
from support import environment

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="what is resident at most is asked of Linux")
SIDE = 3600
PIXELS = SIDE * SIDE
SLACK = 16 << 20
DECODE_TWO_AT_ONCE = """
import json, os, re, sys, threading
from pathlib import Path
from latentd.config import HttpConfig
from latentd.service.building import decoder

def resident(name):
    return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10

def taken(data):
    decode = decoder(HttpConfig(max_pixels=int(sys.argv[1]), max_image_bytes=int(sys.argv[2])), 224)
    threads = [threading.Thread(target=decode, args=(data,)) for _ in range(2)]
    Path("/proc/self/clear_refs").write_text("5")  # the most that was resident is counted anew
    before = resident("VmRSS")
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return resident("VmHWM") - before, resident("VmRSS") - before

for path in sorted(Path(sys.argv[3]).iterdir()):
    if os.fork() == 0:  # what is kept of one image must not make the next one cheaper
        print(json.dumps([path.name, *taken(path.read_bytes())]), flush=True)
        os._exit(0)
    os.wait()
"""


class Taken(NamedTuple):
    most_bytes: int
    left_bytes: int


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one of each kind that takes much to decode."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    photo = Image.fromarray(rng.integers(0, 256, (64, 64, 4), dtype=np.uint8)).resize((SIDE, SIDE))
    grey = np.asarray(photo.convert("L")).astype(np.uint16)
    photo.convert("RGB").save(folder / "photo.webp", method=0)
    photo.save(folder / "exact.webp", lossless=True, method=0, quality=0)
    photo.save(folder / "clear.png", compress_level=1)
    photo.convert("LA").save(folder / "clear-grey.png", compress_level=1)
    photo.convert("P").save(folder / "clear-palette.png", compress_level=1, transparency=1)
    photo.convert("RGB").save(folder / "clear-colour.png", compress_level=1, transparency=(1, 2, 3))
    Image.fromarray(grey * 257).save(folder / "deep.png", compress_level=1)
    photo.convert("CMYK").save(folder / "print.jpg", progressive=True, subsampling=0)
    return folder


@pytest.fixture(scope="module")
def http(pictures: Path) -> HttpConfig:
    """Limits that are as large as the largest of the pictures."""
    return HttpConfig(max_pixels=PIXELS, max_image_bytes=max(path.stat().st_size for path in pictures.iterdir()))


@pytest.fixture(scope="module")
def taken(pictures: Path, http: HttpConfig) -> Dict[str, Taken]:
    """By picture, what two threads took that decoded it at once."""
    command = [sys.executable, "-c", DECODE_TWO_AT_ONCE, str(http.max_pixels), str(http.max_image_bytes), str(pictures)]
    child = subprocess.run(command, env=environment(), stdout=subprocess.PIPE, check=True)
    return {name: Taken(most, left) for name, most, left in map(json.loads, child.stdout.splitlines())}


def test_all_threads_together_take_what_is_planned_for_them(http: HttpConfig, taken: Dict[str, Taken]) -> None:
    plan = memory_plan.plan_for(Config(http=http), DINOV2_SMALL, "eager-cpu")
    share = next(part.planned_bytes for part in plan.parts if part.name == "decoders")
    assert len(taken) == 8
    assert max(each.most_bytes for each in taken.values()) <= share + SLACK, taken
    assert taken["photo.webp"].most_bytes > 0.5 * memory_plan.PIXEL_BYTES * PIXELS, "the plan is twice what is needed"


def test_of_a_transparent_picture_no_more_than_two_copies_are_held_at_a_time(taken: Dict[str, Taken]) -> None:
    assert max(each.most_bytes for name, each in taken.items() if name.startswith("clear")) <= 9 * PIXELS + SLACK, taken


def test_what_a_large_picture_took_is_given_back(taken: Dict[str, Taken]) -> None:
    # glibc keeps up to 64 MiB at the top of a thread's heap
    assert max(each.left_bytes for each in taken.values()) <= 5 * SLACK, taken
