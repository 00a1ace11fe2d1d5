"""The blocks above the split as modules: the pretrained ones, and the low-rank change that learning makes to them.

Tokens (B, N, D) go in, and out come features (B, F): the class token after each of the blocks and the mean patch token before the last, all
through the final norm. Owned by the learner thread; `RankedBlocks.frozen` gives what other threads may call. B images, N tokens, D width.
"""

from __future__ import annotations

from typing import Any, Dict, Iterator, List, Optional, Tuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from latentd.engines.torch_queue import TorchQueue
from latentd.vision.checkpoints import Backbone, read_weights
from latentd.vision.shape import VitShape
from latentd.vision.vit import Block

_LAYERS = ("qkv", "proj", "fc1", "fc2")
_NORMS = ("norm1", "norm2")


class _Product(torch.autograd.Function):
    """tokens (..., I) @ weight' with a weight (O, I) kept in half precision, of which only one is whole at a time, backwards too."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return tokens @ weight.to(tokens.dtype).t()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return gradient @ weight.to(gradient.dtype), None


class HalfLinear(nn.Module):
    """A pretrained linear layer that never learns: half the bytes, and products in the precision of what comes in."""

    def __init__(self, inward: int, outward: int) -> None:
        super().__init__()
        self.in_features, self.out_features = inward, outward
        self.weight = nn.Parameter(torch.zeros(outward, inward, dtype=torch.float16), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(outward), requires_grad=False)

    def forward(self, tokens: Tensor) -> Tensor:
        product: Tensor = _Product.apply(tokens, self.weight)  # type: ignore[no-untyped-call]
        return product + self.bias


class UpperBlocks(nn.Module):
    """Blocks split+1..depth and the final norm, frozen: (B, N, D) -> (B, F). `lead`: tokens before the patches; `features_width`: F.

    The class tokens of all the blocks are given, not only of the last: a closed-form head on them is several points better, and each block
    gets a gradient of its own. The mean patch token is taken before the last block, which then has to compute nothing but its class token.

    The matrices are kept in half precision.
    """

    def __init__(self, shape: VitShape, split: int) -> None:
        super().__init__()
        self.lead = 1 + shape.registers
        self.features_width = (shape.depth - split + 1) * shape.width
        self.blocks = nn.ModuleList(_halved(Block(shape, index)) for index in range(split, shape.depth))
        self.norm = nn.LayerNorm(shape.width, eps=shape.eps)

    def forward(self, tokens: Tensor) -> Tensor:
        seen: List[Tensor] = []
        for block in self.blocks[:-1]:
            tokens = block(tokens)
            seen.append(tokens[:, :1])
        seen.append(cast(Block, self.blocks[-1]).class_token(tokens))
        class_tokens = self.norm(torch.cat(seen, dim=1))  # (B, K, D)
        return torch.cat([class_tokens.flatten(1), self.norm(tokens[:, self.lead :]).mean(dim=1)], dim=1)  # (B, F)

    def features(self, tokens: NDArray[np.float32], queue: Optional[TorchQueue] = None) -> NDArray[np.float32]:
        """(B, N, D) -> (B, F), without gradients; any thread. queue: the caller's, on the device that the blocks are on; None: the CPU."""
        queue = queue or TorchQueue()
        with torch.inference_mode(), queue.work():
            return queue.download(self(queue.upload(tokens)))

    @staticmethod
    def load(backbone: Backbone, split: int) -> UpperBlocks:
        """The pretrained blocks in eval mode; CheckpointError where the file changed since it was installed."""
        module = UpperBlocks(backbone.shape, split)
        weights = read_weights(backbone)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parts = name.split(".")
                if parts[0] == "blocks":
                    parts[1] = str(int(parts[1]) + split)
                parameter.copy_(torch.from_numpy(np.array(weights[".".join(parts)])))
        return module.eval().requires_grad_(False)


class _Ranked(nn.Module):
    """A frozen linear layer plus the product of two thin matrices (Hu et al. 2021, LoRA), shared with nobody."""

    def __init__(self, linear: HalfLinear, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.linear = linear
        device = linear.weight.device
        inward = torch.randn(linear.in_features, rank, generator=generator) / linear.in_features**0.5
        self.inward = nn.Parameter(inward.to(device))  # from the CPU's generator: the same wherever it learns
        self.outward = nn.Parameter(torch.zeros(rank, linear.out_features, device=device))

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.linear(tokens) + (tokens @ self.inward) @ self.outward
        return out


class RankedBlocks(UpperBlocks):
    """The same blocks while they learn: linear layers of the base with a change of low rank each, norms of their own.

    The base's matrices are shared, never copied and never changed. At the start it computes what the base computes.
    """

    def __init__(self, base: UpperBlocks, rank: int, seed: int) -> None:
        nn.Module.__init__(self)
        generator = torch.Generator().manual_seed(seed)
        self.lead, self.features_width = base.lead, base.features_width
        self.blocks = nn.ModuleList(_ranked(cast(Block, block), rank, generator) for block in base.blocks)
        self.norm = _own(base.norm)

    def learned(self) -> Iterator[Tuple[str, nn.Parameter]]:
        """What training changes, by name: all but what is the base's."""
        shared = (".linear.weight", ".linear.bias", ".scale1", ".scale2")
        return ((name, parameter) for name, parameter in self.named_parameters() if not name.endswith(shared))

    def frozen(self) -> UpperBlocks:
        """An independent copy of what is learned, for answering; the base stays shared."""
        copy = RankedBlocks.__new__(RankedBlocks)
        nn.Module.__init__(copy)
        copy.lead, copy.features_width = self.lead, self.features_width
        copy.blocks = nn.ModuleList(_copied(cast(Block, block)) for block in self.blocks)
        copy.norm = _own(self.norm)
        return copy.eval().requires_grad_(False)

    def state(self) -> Dict[str, NDArray[np.float32]]:
        """The arrays of a checkpoint: what is learned, copied; the base is in the backbone's file."""
        return {name: parameter.detach().cpu().numpy().copy() for name, parameter in self.learned()}

    def restore(self, arrays: Dict[str, NDArray[np.float32]]) -> None:
        with torch.no_grad():
            for name, parameter in self.learned():
                parameter.copy_(torch.from_numpy(arrays[name].copy()))


def parameter_bytes(modules: List[UpperBlocks]) -> int:
    """Bytes of all different parameters of these modules."""
    tensors = {parameter.data_ptr(): parameter for module in modules for parameter in module.parameters()}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _halved(block: Block) -> Block:
    for name in _LAYERS:
        linear = getattr(block, name)
        setattr(block, name, HalfLinear(linear.in_features, linear.out_features))
    return block


def _ranked(block: Block, rank: int, generator: torch.Generator) -> Block:
    twin = _twin(block)
    for name in _LAYERS:
        setattr(twin, name, _Ranked(getattr(block, name), rank, generator))
    return twin


def _copied(block: Block) -> Block:
    twin = _twin(block)
    for name in _LAYERS:
        ranked = getattr(block, name)
        copy = _Ranked.__new__(_Ranked)
        nn.Module.__init__(copy)
        copy.linear = ranked.linear
        copy.inward, copy.outward = (nn.Parameter(getattr(ranked, part).detach().clone()) for part in ("inward", "outward"))
        setattr(twin, name, copy)
    return twin


def _twin(block: Block) -> Block:
    """A block that shares the layers and scales of this one, and has norms of its own."""
    twin = Block.__new__(Block)
    nn.Module.__init__(twin)
    twin.heads, twin.head_width, twin.swiglu = block.heads, block.head_width, block.swiglu
    for name in _NORMS:
        setattr(twin, name, _own(getattr(block, name)))
    twin.scale1, twin.scale2 = block.scale1, block.scale2
    return twin


def _own(norm: nn.Module) -> nn.LayerNorm:
    assert isinstance(norm, nn.LayerNorm), "the blocks have no other norms"
    copy = nn.LayerNorm(norm.normalized_shape, eps=norm.eps).to(norm.weight.device)
    copy.load_state_dict(norm.state_dict())
    return copy.requires_grad_(True)
