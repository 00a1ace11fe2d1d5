"""The seam between the daemon and whatever computes the frozen stage. Plain types; no engine is imported here.

The inference threads own the one FrozenStage that serves: only they call `encode` and `close`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Optional, Protocol

import numpy as np
from numpy.typing import NDArray

from latentd.config import Config
from latentd.errors import ConfigError
from latentd.vision.checkpoints import Backbone


@dataclass(frozen=True)
class StageSpec:
    """What a frozen stage computes; two stages with equal specs give interchangeable latents.

    split: last frozen block, 1..depth. class_tokens: m, how many last blocks give a class token. width: D. tokens: N.
    """

    backbone_name: str
    backbone_sha256: str
    image_size: int
    split: int
    class_tokens: int
    width: int
    tokens: int

    @property
    def features_width(self) -> int:
        return self.width * self.class_tokens


class Encoded(NamedTuple):
    """features (B, m*D): class tokens of the last m blocks, in block order, each through the final norm. tokens (B, N, D): raw, after block
    `split`; None unless asked for. Both float32."""

    features: NDArray[np.float32]
    tokens: Optional[NDArray[np.float32]]


class FrozenStage(Protocol):
    """One loaded engine. `encode` blocks for as long as it computes and raises EngineError when the engine fails.

    lanes: how many threads may call `encode` at the same time, all with `shared` set; 1 for an engine that fills its device alone.
    """

    @property
    def name(self) -> str: ...

    @property
    def spec(self) -> StageSpec: ...

    @property
    def lanes(self) -> int: ...

    def encode(self, pixels: NDArray[np.uint8], tokens: bool = False, shared: bool = False) -> Encoded:
        """RGB pixels (B, S, S, 3), B >= 1 -> features, and tokens where asked for. shared: other lanes run beside it."""
        ...

    def close(self) -> None: ...


def stage_spec(config: Config, backbone: Backbone) -> StageSpec:
    """The spec that the configuration asks of this backbone; ConfigError where it has too few blocks, or patches do not fill the image."""
    wanted, depth = config.backbone, backbone.shape.depth
    for key, value in (("split", wanted.split), ("class_tokens", wanted.class_tokens)):
        if not -depth < value <= depth:
            least = f"{1 - depth} to " if key == "split" else "1 to "
            raise ConfigError(
                f"backbone.{key} = {value}, but {backbone.name} has {depth} blocks", hint=f"Set backbone.{key} to {least}{depth}."
            )
    return StageSpec(
        backbone_name=backbone.name,
        backbone_sha256=backbone.sha256,
        image_size=wanted.image_size,
        split=split_of(wanted.split, depth),
        class_tokens=wanted.class_tokens,
        width=backbone.shape.width,
        tokens=backbone.shape.tokens(wanted.image_size),
    )


def split_of(split: int, depth: int) -> int:
    """backbone.split as a number of blocks, 1 to depth: from the end where it is not positive."""
    return split if split > 0 else depth + split


def planar(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """uint8 (B, S, S, 3) -> contiguous float32 (B, 3, S, S), values still 0..255."""
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2), dtype=np.float32)
