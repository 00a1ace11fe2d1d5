"""The Vision Transformer, cut at any block. One module for DINOv2, timm ViT, DeiT and Hugging Face weights.

The frozen stage is `embed` and `run(tokens, 0, k)`; the adaptive stage is `run(tokens, k, depth)` and `norm`. Nothing here owns a thread; a
forward pass blocks its caller for as long as it computes. B images, N tokens, D width, H heads, E head width.
"""

from __future__ import annotations

from typing import Mapping, Optional, Tuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from latentd.vision.checkpoints import Backbone, read_weights
from latentd.vision.shape import VitShape as VitShape


class Block(nn.Module):
    """One pre-norm transformer block; (B, N, D) -> (B, N, D) for any B and N. `scale1`, `scale2` are LayerScale, or None."""

    scale1: Optional[nn.Parameter]
    scale2: Optional[nn.Parameter]

    def __init__(self, shape: VitShape, index: int) -> None:
        super().__init__()
        width, inner, hidden = shape.width, shape.heads[index] * shape.head_width, shape.mlp_width[index]
        self.heads, self.head_width, self.swiglu = shape.heads[index], shape.head_width, shape.swiglu
        self.norm1 = nn.LayerNorm(width, eps=shape.eps)
        self.qkv = nn.Linear(width, 3 * inner)
        self.proj = nn.Linear(inner, width)
        self.norm2 = nn.LayerNorm(width, eps=shape.eps)
        self.fc1 = nn.Linear(width, 2 * hidden if shape.swiglu else hidden)
        self.fc2 = nn.Linear(hidden, width)
        for name in ("scale1", "scale2"):
            self.register_parameter(name, nn.Parameter(torch.ones(width)) if shape.layer_scale else None)

    def forward(self, tokens: Tensor, queries: Optional[int] = None) -> Tensor:
        """queries: how many tokens, from the first, go on, (B, queries, D): the class token alone is a quarter of the work. None: all."""
        staying = tokens if queries is None else tokens[:, :queries]
        return self.perceive(self.attended(staying, self.mix(tokens, queries)))

    def mix(self, tokens: Tensor, queries: Optional[int] = None) -> Tensor:
        """Multi-head self-attention up to its projection: what the heads give, side by side, (B, N, D) -> (B, N, H*E).

        queries: how many tokens, from the first, query the others, (B, queries, H*E). None: all of them.
        """
        count = int(tokens.shape[1]) if queries is None else queries
        query, key, value = self.heads_of(tokens)
        query = query if queries is None else query[:, :, :queries]
        if torch.onnx.is_in_onnx_export():
            # Spelled out: exporters differ in how they write the fused operator, and TensorRT 8.5 knows only these parts.
            weights = torch.softmax((query * self.head_width**-0.5) @ key.transpose(-2, -1), dim=-1)  # (B, H, N, N)
            mixed = weights @ value  # (B, H, N, E)
        else:
            mixed = F.scaled_dot_product_attention(query, key, value)  # (B, H, N, E)
        return mixed.transpose(1, 2).reshape(-1, count, self.heads * self.head_width)  # (B, N, H*E)

    def attended(self, tokens: Tensor, mixed: Tensor) -> Tensor:
        """The block's first half, from what its heads gave: (B, N, D), (B, N, H*E) -> (B, N, D)."""
        return tokens + _scaled(self.proj(mixed), self.scale1)

    def perceive(self, tokens: Tensor) -> Tensor:
        """The block's second half, its MLP: (B, N, D) -> (B, N, D)."""
        return tokens + _scaled(self.mlp(self.norm2(tokens)), self.scale2)

    def heads_of(self, tokens: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
        """Query, key and value of every head, (B, H, N, E) each, from the tokens (B, N, D) that enter the block."""
        count = int(tokens.shape[1])
        parts = self.qkv(self.norm1(tokens)).split(self.heads * self.head_width, dim=-1)
        query, key, value = (self._split_heads(part, count) for part in parts)
        return query, key, value

    def _split_heads(self, part: Tensor, count: int) -> Tensor:
        return part.reshape(-1, count, self.heads, self.head_width).transpose(1, 2)  # (B, H, N, E)

    def mlp(self, tokens: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D), from normalised tokens."""
        out: Tensor = self.fc2(self.hidden(tokens))
        return out

    def hidden(self, tokens: Tensor) -> Tensor:
        """The MLP up to its second layer, from normalised tokens: (B, N, D) -> (B, N, its width)."""
        hidden: Tensor = self.fc1(tokens)
        if not self.swiglu:
            return F.gelu(hidden)
        gate, up = hidden.chunk(2, dim=-1)
        return F.silu(gate) * up


class Vit(nn.Module):
    """A ViT for square images of one size; the parameter names are latentd's canonical checkpoint names.

    `position` already has the grid of `image_size`: resizing happened when the weights were loaded, so an exported graph holds a constant.
    """

    def __init__(self, shape: VitShape, image_size: Optional[int] = None) -> None:
        super().__init__()
        size = shape.image_size if image_size is None else image_size
        self.shape, self.image_size, self.count = shape, size, shape.tokens(size)
        self.patch = nn.Conv2d(3, shape.width, kernel_size=shape.patch, stride=shape.patch)
        self.class_token = nn.Parameter(torch.zeros(shape.width))
        self.class_position = nn.Parameter(torch.zeros(shape.width))
        self.registers = nn.Parameter(torch.zeros(shape.registers, shape.width))
        self.position = nn.Parameter(torch.zeros(shape.side(size) ** 2, shape.width))
        self.blocks = nn.ModuleList(Block(shape, index) for index in range(shape.depth))
        self.norm = nn.LayerNorm(shape.width, eps=shape.eps)

    @property
    def depth(self) -> int:
        return self.shape.depth

    def embed(self, pixels: Tensor) -> Tensor:
        """Normalised pixels (B, 3, S, S) -> tokens (B, N, D): class token, registers, patches in reading order."""
        patches = self.patch(pixels).reshape(-1, self.shape.width, self.position.shape[0]).transpose(1, 2)  # (B, P, D)
        lead = torch.cat([(self.class_token + self.class_position)[None], self.registers])  # (1+R, D)
        # A zeroed patch gives the lead tokens their batch axis: three operators in the exported graph, where expand() would bring a dozen.
        return torch.cat([patches[:, :1] * 0 + lead, patches + self.position], dim=1)  # (B, N, D)

    def run(self, tokens: Tensor, first: int, last: int) -> Tensor:
        """Blocks first+1..last applied to the tokens (B, N, D) that block `first` gave (0: the embedding)."""
        for index in range(first, last):
            tokens = self.blocks[index](tokens)
        return tokens

    def frozen(self, pixels: Tensor, split: int, class_tokens: int, whole: bool = False) -> Tuple[Tensor, Tensor]:
        """Normalised pixels (B, 3, S, S) -> features (B, class_tokens*D) and the raw tokens (B, N, D) after block `split`.

        features: the class tokens of the last `class_tokens` blocks, each through the final norm, in block order. The whole depth runs; the
        last block gives its class token alone where it lies above the split. whole: it gives all its tokens, though nobody takes them.
        """
        depth = self.depth
        tokens = self.embed(pixels)
        cut, heads = tokens, []
        for index in range(depth):
            block = self.blocks[index]
            alone = split <= index == depth - 1 and not whole
            tokens = block(tokens, 1 if alone else None)
            cut = tokens if index + 1 == split else cut
            if index + class_tokens >= depth:
                heads.append(tokens[:, :1])  # (B, 1, D)
        features = self.norm(torch.cat(heads, dim=1)).reshape(-1, class_tokens * self.shape.width)  # (B, m*D)
        return features, cut

    def final_tokens(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        """Normalised pixels (B, 3, S, S) -> tokens (B, N, D) of the last block through the final norm, as others define the output."""
        with torch.no_grad():
            tokens: Tensor = self.norm(self.run(self.embed(torch.from_numpy(pixels)), 0, self.depth))
        return tokens.numpy()

    @staticmethod
    def from_weights(weights: Mapping[str, NDArray[np.float32]], shape: VitShape, image_size: Optional[int] = None) -> Vit:
        """The module in eval mode, float32, without gradients, from canonical arrays at the stored grid."""
        with torch.device("meta"):  # no time spent on random numbers that the weights replace
            module = Vit(shape, image_size)
        module = module.to_empty(device="cpu")
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                value = torch.from_numpy(np.array(weights[name]))
                parameter.copy_(resized_position(value, shape.side(module.image_size)) if name == "position" else value)
        return module.eval().requires_grad_(False)

    @staticmethod
    def load(backbone: Backbone, image_size: Optional[int] = None) -> Vit:
        """The installed backbone for images of this size; CheckpointError where its file changed since it was installed."""
        return Vit.from_weights(read_weights(backbone), backbone.shape, image_size)


def resized_position(position: Tensor, side: int) -> Tensor:
    """Position grid (G*G, D) -> (side*side, D), bicubic with align_corners=False, as Hugging Face's DINOv2 does it."""
    count, width = position.shape
    grid = round(count**0.5)
    if grid == side:
        return position
    plane = position.reshape(1, grid, grid, width).permute(0, 3, 1, 2)  # (1, D, G, G)
    plane = F.interpolate(plane, size=(side, side), mode="bicubic", align_corners=False)
    return plane.permute(0, 2, 3, 1).reshape(side * side, width)


def normalised(pixels: Tensor, shape: VitShape) -> Tensor:
    """RGB (B, 3, S, S) in 0..255 -> float32 as the backbone was trained on."""
    mean, std = (torch.tensor(values, device=pixels.device).reshape(1, 3, 1, 1) * 255.0 for values in (shape.mean, shape.std))
    return (pixels - mean) / std


def _scaled(update: Tensor, scale: Optional[Tensor]) -> Tensor:
    return update if scale is None else update * scale
