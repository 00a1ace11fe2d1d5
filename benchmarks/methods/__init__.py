"""The field: continual learners that read the same latents one lesson at a time, behind one protocol.

Each is one small class with the settings that validation chose as its defaults; `registry.make` builds one by name. Deterministic: the same
lessons and seed give the same answers. Nothing here knows the stream or the test.
"""

from __future__ import annotations

from methods.protocol import Labels, Latents, Lesson, Method, Scores

__all__ = ["Labels", "Latents", "Lesson", "Method", "Scores"]
