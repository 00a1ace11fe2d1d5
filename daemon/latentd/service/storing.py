"""How this daemon stores latents: the codec of its configuration, calibrated once, and what its codes are of.

Runs once, at start, on the main thread, before anything serves; blocks on the disk and, at the first start of a state folder with a codec
that needs calibration, on the frozen stage.
"""

from __future__ import annotations

from typing import Any, Callable, Dict

import numpy as np
from numpy.typing import NDArray

from latentd.config import Config
from latentd.engines.stage import FrozenStage, StageSpec
from latentd.errors import ConfigError
from latentd.replay import calibration
from latentd.replay.codec import CodecSpec, calibrated
from latentd.replay.journal import holds_anything
from latentd.replay.latents import LatentCodec, TokenPool, make_latent_codec
from latentd.vision.checkpoints import Backbone
from latentd.vision.drawn import drawn_images
from latentd.vision.probe import probe_images

_MEASURED = ("tensor", "scattered")
_AT_ONCE = 8  # images; divides the number of drawn ones, so that a mean of means is a mean


def latent_codec(config: Config, spec: StageSpec, backbone: Backbone, stage: Callable[[], FrozenStage]) -> LatentCodec:
    """Class tokens, and with a split below the full depth the tokens after it as well. stage: asked for only where latents are measured.

    Raises ConfigError for keys that do not go together, and for a calibration that was lost.
    """
    learn, features = config.learn, (spec.class_tokens, spec.width)
    try:
        pool = None
        if spec.split < backbone.shape.depth:
            pool = TokenPool(1 + backbone.shape.registers, backbone.shape.side(spec.image_size), learn.token_grid)

        def parameters(wanted: CodecSpec) -> NDArray[np.float32]:
            return _kept(config, spec, wanted, stage) if wanted.kind in _MEASURED else calibrated(wanted)

        if pool is None:
            return make_latent_codec(learn.codec, learn.codec_kind, features, None, learn.seed, parameters)
        kind = learn.token_codec_kind
        if pool.side < 2:  # one patch has no neighbours
            kind = {"spatial": "rotated"}.get(kind, kind)
        own, stored = (learn.codec, learn.codec_kind), (pool.tokens, spec.width)
        return make_latent_codec(learn.token_codec, kind, features, stored, learn.seed, parameters, pool, features_as=own)
    except ValueError as cause:
        chosen = f"learn.codec_kind = {learn.codec_kind}, learn.token_grid = {learn.token_grid}"
        raise ConfigError(f"{chosen}: {cause}", hint="Change these keys; `latentd config show` lists what they may be.") from cause


def origin(spec: StageSpec) -> Dict[str, Any]:
    """What features are of: those of two origins have nothing in common."""
    return {
        "backbone": spec.backbone_name,
        "backbone_sha256": spec.backbone_sha256,
        "image_size": spec.image_size,
        "class_tokens": spec.class_tokens,
    }


def tokens_of(spec: StageSpec, codec: LatentCodec) -> Dict[str, Any]:
    """What stored tokens are of, and how they are stored."""
    return {"split": None if codec.tokens is None else spec.split, **codec.tokens_identity()}


def _kept(config: Config, spec: StageSpec, wanted: CodecSpec, stage: Callable[[], FrozenStage]) -> NDArray[np.float32]:
    """The parameters of this state folder, from the latents of images that nobody taught, at its first start."""

    def latents(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        return stage().encode(pixels).features.reshape(-1, spec.class_tokens, spec.width)

    def measured() -> NDArray[np.float32]:
        if wanted.kind == "tensor":
            return calibrated(wanted, latents(probe_images(spec.image_size)))
        drawn = drawn_images(spec.image_size)
        means = [latents(drawn[start : start + _AT_ONCE]).mean(axis=0) for start in range(0, len(drawn), _AT_ONCE)]
        return calibrated(wanted, np.stack(means))

    facts = {**origin(spec), "codec": str(wanted), "shape": [wanted.tokens, wanted.width]}
    taught = holds_anything(config.state_dir / "journal.sqlite")
    return calibration.kept(config.state_dir / calibration.FILE, facts, taught, measured)
