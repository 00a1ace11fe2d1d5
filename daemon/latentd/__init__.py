"""latentd: an on-device learning daemon: latent replay on a split vision transformer."""

from __future__ import annotations

__version__ = "0.1.0"
