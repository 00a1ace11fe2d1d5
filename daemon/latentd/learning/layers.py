"""The layers of blocks that learn: pretrained matrices in half precision, which never change, and a change of low rank beside them.

Owned by the learner thread; a layer without a room to widen its matrix in may be called by any thread. T tokens, I channels in, O out.
"""

from __future__ import annotations

from typing import Any, Dict, Optional, Sequence, Tuple, cast

import torch
from torch import Tensor, nn

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


class _HeadProduct(torch.autograd.Function):
    """inputs (H, B, I) times one matrix (H, I, O) a head, cut from the rows of a weight kept in half precision."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, part: int, transposed: bool, room: Optional[Widened]) -> Tensor:
        ctx.weight, ctx.part, ctx.transposed, ctx.room = weight, part, transposed, room
        return torch.bmm(inputs, _heads_of(weight, part, len(inputs), transposed, inputs.dtype, room))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tuple[Tensor, None, None, None, None]:
        matrices = _heads_of(ctx.weight, ctx.part, len(gradient), not ctx.transposed, gradient.dtype, ctx.room)
        return torch.bmm(gradient, matrices), None, None, None, None


def _heads_of(weight: Tensor, part: int, heads: int, transposed: bool, dtype: torch.dtype, room: Optional[Widened]) -> Tensor:
    """Of a weight (3*H*E, D), queries' rows above keys' above values', one part: (H, D, E), or transposed (H, E, D)."""
    whole = weight if room is None else room.of(weight, dtype)
    rows = whole.view(3, heads, -1, weight.shape[1])[part].to(dtype)
    return rows if transposed else rows.transpose(1, 2)


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

    def by_head(self, inputs: Tensor, part: int, transposed: bool = False, room: Optional[Widened] = None) -> Tensor:
        """Of the layer that makes queries (part 0), keys (1) and values (2), this part of each head, without its bias.

        (H, B, D) -> (H, B, E); transposed, through the same matrices the other way, (H, B, E) -> (H, B, D).
        """
        product: Tensor = _HeadProduct.apply(inputs, self.weight, part, transposed, room)  # type: ignore[no-untyped-call]
        return product

    def bias_by_head(self, part: int, heads: int) -> Tensor:
        """(H, 1, E)."""
        return self.bias.view(3, heads, 1, -1)[part]


class Ranked(nn.Module):
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

    def by_head(self, inputs: Tensor, part: int, transposed: bool = False) -> Tensor:
        """As HalfLinear has it."""
        outward = self.outward.view(len(self.outward), 3, len(inputs), -1)[:, part].transpose(0, 1)  # (H, R, E)
        change = (inputs @ outward.transpose(1, 2)) @ self.inward.t() if transposed else (inputs @ self.inward) @ outward
        return self.linear.by_head(inputs, part, transposed, self.room) + change

    def bias_by_head(self, part: int, heads: int) -> Tensor:
        """(H, 1, E)."""
        return self.linear.bias_by_head(part, heads)


def widened_bytes(sizes: Sequence[int]) -> int:
    """Bytes that training takes to widen matrices of so many numbers each, in the order of a pass: what `Widened` comes to."""
    kept = 0
    for place, size in enumerate(sizes):
        if kept + 4 * size > ROOM_BYTES:
            return kept + 4 * max(sizes[place:])
        kept += 4 * size
    return kept
