"""`import tensorrt` for tests, where this folder's parent is on the path: the version in STANDIN_TENSORRT."""

from __future__ import annotations

import os
import sys

from standin.module import make

made = make(os.environ["STANDIN_TENSORRT"])
made.__spec__ = __spec__
sys.modules[__name__] = made
