"""`import tensorrt` for the processes that a test starts, where this folder's parent is on the path: the version in STANDIN_TENSORRT."""

from __future__ import annotations

import os
import sys

from standin.module import make

sys.modules[__name__] = make(os.environ["STANDIN_TENSORRT"])
