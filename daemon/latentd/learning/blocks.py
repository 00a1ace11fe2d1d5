"""The blocks above the split as modules: the pretrained ones, and the low-rank change that learning makes to them.

Tokens (B, N, D) go in, and out come features (B, F): the class token after each of the blocks and the mean patch token before the last, all
through the final norm. Owned by the learner thread; `RankedBlocks.frozen` gives what other threads may call. B images, N tokens, D width.
"""

from __future__ import annotations

from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple, cast

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
ROOM_BYTES = 8 << 20  # of widened matrices while blocks learn: those of one block of a ViT-S


class Widened:
    """Room for matrices of half precision at full width, for the training steps of one thread.

    The first ones that fit into ROOM_BYTES stay until `clear`; the others come one after the other into one more place. So a block of a
    ViT-S is widened once a sleep instead of twice a micro-batch. None of the matrices may change meanwhile.
    """

    def __init__(self) -> None:
        self._kept: Dict[int, Tuple[Tensor, Tensor]] = {}  # by identity of the matrix, which therefore must stay alive
        self._passing: Optional[Tuple[Tensor, Tensor]] = None

    def of(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """The matrix, valid until another is asked for."""
        known = self._kept.get(id(weight))
        if known is not None:
            return known[1]
        if self._passing is not None and self._passing[0] is weight:  # the way back begins with what the way forth ended with
            return self._passing[1]
        if self.size_bytes + 4 * weight.numel() <= ROOM_BYTES and self._passing is None:
            self._kept[id(weight)] = (weight, weight.to(dtype))
            return self._kept[id(weight)][1]
        self._passing = None  # its memory is free before the next one needs as much
        self._passing = (weight, weight.to(dtype))
        return self._passing[1]

    @property
    def size_bytes(self) -> int:
        there = [*self._kept.values(), *([self._passing] if self._passing else [])]
        return sum(wide.numel() * wide.element_size() for _, wide in there)

    def clear(self) -> None:
        """Gives the room back until it is needed again."""
        self._kept, self._passing = {}, None


class _Product(torch.autograd.Function):
    """tokens (T, I) @ weight' + bias with a weight (O, I) kept in half precision. Without a room one is whole at a time, even backwards."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor, bias: Tensor, room: Optional[Widened]) -> Tensor:
        ctx.weight, ctx.room = weight, room
        return torch.addmm(bias, tokens, _wide(weight, tokens.dtype, room).t())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tuple[Tensor, None, None, None]:
        return gradient @ _wide(ctx.weight, gradient.dtype, ctx.room), None, None, None


def _wide(weight: Tensor, dtype: torch.dtype, room: Optional[Widened]) -> Tensor:
    return weight.to(dtype) if room is None else room.of(weight, dtype)


class HalfLinear(nn.Module):
    """A pretrained linear layer that never learns: half the bytes, and products in the precision of what comes in."""

    def __init__(self, inward: int, outward: int) -> None:
        super().__init__()
        self.in_features, self.out_features = inward, outward
        self.weight = nn.Parameter(torch.zeros(outward, inward, dtype=torch.float16), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(outward), requires_grad=False)

    def forward(self, tokens: Tensor, room: Optional[Widened] = None) -> Tensor:
        """(..., I) -> (..., O). room: the caller's, where it has one to widen the matrix in."""
        product: Tensor = _Product.apply(tokens.reshape(-1, self.in_features), self.weight, self.bias, room)  # type: ignore[no-untyped-call]
        return product.view(*tokens.shape[:-1], self.out_features)


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
        seen.append(self.blocks[-1](tokens, 1))
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
    """A frozen linear layer plus the product of two thin matrices (Hu et al. 2021, LoRA), shared with nobody.

    room: where the frozen matrix is widened; None where any thread may call.
    """

    def __init__(self, linear: HalfLinear, rank: int, generator: torch.Generator, room: Widened) -> None:
        super().__init__()
        self.linear, self.room = linear, cast(Optional[Widened], room)
        device = linear.weight.device
        inward = torch.randn(linear.in_features, rank, generator=generator) / linear.in_features**0.5
        self.inward = nn.Parameter(inward.to(device))  # from the CPU's generator: the same wherever it learns
        self.outward = nn.Parameter(torch.zeros(rank, linear.out_features, device=device))

    def forward(self, tokens: Tensor) -> Tensor:
        rows = tokens.reshape(-1, self.linear.in_features)  # (T, I)
        out = torch.addmm(self.linear(rows, self.room), rows @ self.inward, self.outward)
        return out.view(*tokens.shape[:-1], self.linear.out_features)


class RankedBlocks(UpperBlocks):
    """The same blocks while they learn: linear layers of the base with a change of low rank each, norms of their own.

    The base's matrices are shared and never changed. At the start it computes what the base computes. Only `frozen` copies may be called by
    several threads: what learns widens matrices in a room of its own.
    """

    def __init__(self, base: UpperBlocks, rank: int, seed: int) -> None:
        nn.Module.__init__(self)
        generator = torch.Generator().manual_seed(seed)
        self.lead, self.features_width = base.lead, base.features_width
        self._room = Widened()
        self.blocks = nn.ModuleList(_ranked(cast(Block, block), rank, generator, self._room) for block in base.blocks)
        self.norm = _own(base.norm)

    def learned(self) -> Iterator[Tuple[str, nn.Parameter]]:
        """What training changes, by name: all but what is the base's."""
        shared = (".linear.weight", ".linear.bias", ".scale1", ".scale2")
        return ((name, parameter) for name, parameter in self.named_parameters() if not name.endswith(shared))

    def frozen(self) -> UpperBlocks:
        """An independent copy of what is learned, for answering; the base stays shared. The room of training is given back."""
        self.rest()
        copy = RankedBlocks.__new__(RankedBlocks)
        nn.Module.__init__(copy)
        copy.lead, copy.features_width, copy._room = self.lead, self.features_width, Widened()
        copy.blocks = nn.ModuleList(_copied(cast(Block, block)) for block in self.blocks)
        copy.norm = _own(self.norm)
        return copy.eval().requires_grad_(False)

    def rest(self) -> None:
        """Gives back the room that training widens matrices in; the next step takes it again."""
        self._room.clear()

    def room_bytes(self) -> int:
        """Bytes of that room."""
        return self._room.size_bytes

    def state(self) -> Dict[str, NDArray[np.float32]]:
        """The arrays of a checkpoint: what is learned, copied; the base is in the backbone's file."""
        return {name: parameter.detach().cpu().numpy().copy() for name, parameter in self.learned()}

    def restore(self, arrays: Dict[str, NDArray[np.float32]]) -> None:
        with torch.no_grad():
            for name, parameter in self.learned():
                parameter.copy_(torch.from_numpy(arrays[name].copy()))


def widened_bytes(sizes: Sequence[int]) -> int:
    """Bytes that training takes to widen matrices of so many numbers each, in the order of a pass: what `Widened` comes to."""
    kept = 0
    for place, size in enumerate(sizes):
        if kept + 4 * size > ROOM_BYTES:
            return kept + 4 * max(sizes[place:])
        kept += 4 * size
    return kept


def parameter_bytes(modules: List[UpperBlocks]) -> int:
    """Bytes of all different parameters of these modules."""
    tensors = {parameter.data_ptr(): parameter for module in modules for parameter in module.parameters()}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _halved(block: Block) -> Block:
    for name in _LAYERS:
        linear = getattr(block, name)
        setattr(block, name, HalfLinear(linear.in_features, linear.out_features))
    return block


def _ranked(block: Block, rank: int, generator: torch.Generator, room: Widened) -> Block:
    twin = _twin(block)
    for name in _LAYERS:
        setattr(twin, name, _Ranked(getattr(block, name), rank, generator, room))
    return twin


def _copied(block: Block) -> Block:
    twin = _twin(block)
    for name in _LAYERS:
        ranked = getattr(block, name)
        copy = _Ranked.__new__(_Ranked)
        nn.Module.__init__(copy)
        copy.linear, copy.room = ranked.linear, None
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
