"""A tiny backbone, a stopwatch that is quick, and no meter."""

from __future__ import annotations

from pathlib import Path

import pytest

import tiny
from latentd.energy.joulemeter import Joulemeter
from latentd.energy.meters import Choice
from latentd.learning.tuning.stopwatch import Stopwatch
from latentd.vision.checkpoints import Backbone


@pytest.fixture
def tiny_backbone(tmp_path: Path) -> Backbone:
    return tiny.backbone(tmp_path)


@pytest.fixture
def stopwatch() -> Stopwatch:
    return Stopwatch(0.001, Joulemeter(Choice(None, {"rapl": "no sensor here"}), period_s=0.2, gap_s=2.0))
