"""What a Vision Transformer's weights look like: sizes, never values. Plain data, any thread, nothing blocks, no torch."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Dict, Tuple

from latentd.errors import CheckpointError, ConfigError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class VitShape:
    """Every size that the ViT module needs to be built, and the normalisation that its weights were trained with.

    heads and mlp_width hold one count a block, so that a pruned backbone (fewer heads or neurons in some blocks) is an ordinary shape.
    grid: side of the stored position grid in patches. registers: extra tokens without a place in the image (DINOv2's register tokens; a
    distilled DeiT's distillation token). swiglu: the MLP is gated (DINOv2 giant). mean, std: of RGB in 0..1.
    """

    width: int
    heads: Tuple[int, ...]
    mlp_width: Tuple[int, ...]
    patch: int
    grid: int
    head_width: int = 64
    eps: float = 1e-6
    layer_scale: bool = False
    swiglu: bool = False
    registers: int = 0
    mean: Tuple[float, float, float] = IMAGENET_MEAN
    std: Tuple[float, float, float] = IMAGENET_STD

    @property
    def depth(self) -> int:
        return len(self.heads)

    @property
    def image_size(self) -> int:
        """Side in pixels of the images that the stored position grid was trained for."""
        return self.grid * self.patch

    def side(self, image_size: int) -> int:
        """Patches along one side of an image; ConfigError where the patches do not fill it."""
        if image_size % self.patch or image_size < self.patch:
            nearest = max(1, round(image_size / self.patch)) * self.patch
            raise ConfigError(
                f"image size {image_size} is not a multiple of this backbone's patch of {self.patch} pixels",
                hint=f"Set backbone.image_size to {nearest}.",
            )
        return image_size // self.patch

    def tokens(self, image_size: int) -> int:
        """N: class token, registers and patches of one image."""
        return 1 + self.registers + self.side(image_size) ** 2

    def as_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @staticmethod
    def from_json(text: str) -> VitShape:
        """The shape that as_json wrote; CheckpointError where it is damaged or from a newer latentd."""
        try:
            fields: Dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in json.loads(text).items()}
            return VitShape(**fields)
        except (ValueError, TypeError, AttributeError) as cause:
            raise CheckpointError(f"the shape stored with the weights can't be read: {cause}") from cause
