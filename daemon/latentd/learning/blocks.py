"""The blocks above the split as modules: the pretrained ones, and the low-rank change that learning makes to them.

Tokens (B, N, D) go in, and out come features (B, F): the class token after each of the blocks and the mean patch token before the last, all
through the final norm. Owned by the learner thread; `RankedBlocks.frozen` gives what other threads may call. B images, N tokens, D width.
"""

from __future__ import annotations

from typing import Dict, Iterator, List, Optional, Tuple, Union, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from latentd.engines.torch_queue import TorchQueue
from latentd.learning.layers import HalfLinear, Ranked, Widened
from latentd.vision.checkpoints import Backbone, read_weights
from latentd.vision.shape import VitShape
from latentd.vision.vit import Block

_LAYERS = ("qkv", "proj", "fc1", "fc2")
_NORMS = ("norm1", "norm2")
_QUERY, _KEY, _VALUE = range(3)


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

    def forward(self, tokens: Tensor, basis: Optional[Tensor] = None) -> Tensor:
        """basis: what rotates these tokens back, (P, n, n), a matrix for each n channels. The last block does without."""
        if len(self.blocks) > 1:
            tokens, basis = _times(tokens, basis), None
        seen: List[Tensor] = []
        for block in self.blocks[:-1]:
            tokens = block(tokens)
            seen.append(tokens[:, :1])
        class_token, mean = _last(cast(Block, self.blocks[-1]), _Normalised(tokens, basis, self.norm.eps), self.lead)
        class_tokens = self.norm(torch.cat([*seen, class_token], dim=1))  # (B, K, D)
        return torch.cat([class_tokens.flatten(1), mean * self.norm.weight + self.norm.bias], dim=1)  # (B, F)

    def features(
        self, tokens: NDArray[np.float32], queue: Optional[TorchQueue] = None, basis: Optional[NDArray[np.float32]] = None
    ) -> NDArray[np.float32]:
        """(B, N, D) -> (B, F), without gradients; any thread. queue: the caller's, on the device that the blocks are on; None: the CPU."""
        queue = queue or TorchQueue()
        with torch.inference_mode(), queue.work():
            return queue.download(self(queue.upload(tokens), None if basis is None else queue.upload(basis)))

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


class _Normalised:
    """Tokens through a norm without its scale and shift, which are never written down: what is asked of them is asked of the tokens.

    tokens: (B, N, D), before `basis` rotates them back. Their variance comes from the squares of norm and mean: good where the mean is no
    more than ten deviations from zero, and in a ViT it is a tenth.
    """

    def __init__(self, tokens: Tensor, basis: Optional[Tensor], eps: float) -> None:
        self._tokens, self._basis = tokens, basis
        width = tokens.shape[-1]
        ones = tokens.new_ones(width) if basis is None else basis.sum(dim=2).flatten()
        self._mean = tokens @ (ones / width)  # (B, N)
        power = torch.linalg.vector_norm(tokens, dim=-1).square() / width
        self._rate = ((power - self._mean.square()).clamp_min(0) + eps).rsqrt()  # (B, N)

    def first(self) -> Tuple[Tensor, Tensor]:
        """The class token as it came, and normalised: (B, D) each."""
        came = _times(self._tokens[:, 0], self._basis)
        return came, (came - self._mean[:, :1]) * self._rate[:, :1]

    def products(self, vectors: Tensor) -> Tensor:
        """(B, K, D) -> (B, K, N), of every vector with every token."""
        rotated = _times(vectors, None if self._basis is None else self._basis.transpose(1, 2))
        shift = vectors.sum(dim=-1, keepdim=True) * self._mean[:, None]
        found: Tensor = (rotated @ self._tokens.transpose(1, 2) - shift) * self._rate[:, None]
        return found

    def sums(self, weights: Tensor) -> Tensor:
        """(B, K, N) -> (B, K, D), of the tokens times each row of weights."""
        weights = weights * self._rate[:, None]
        return _times(weights @ self._tokens, self._basis) - (weights * self._mean[:, None]).sum(dim=-1, keepdim=True)


def _times(values: Tensor, basis: Optional[Tensor]) -> Tensor:
    """(..., D), every n channels times their matrix of the basis (P, n, n)."""
    if basis is None:
        return values
    rows = values.reshape(-1, len(basis), basis.shape[1]).transpose(0, 1)  # (P, R, n)
    return torch.bmm(rows, basis).transpose(0, 1).reshape(values.shape)


def _last(block: Block, tokens: _Normalised, lead: int) -> Tuple[Tensor, Tensor]:
    """What a block makes of the class token, (B, 1, D), and the mean of the normalised patch tokens that it got, (B, D), without keys and
    values of all tokens: a tenth of the work.

    A score query . (K token) is (K' query) . token, and a sum of values is V times the sum of tokens; so the matrices of keys and values
    meet one vector a head instead of every token. What a bias adds to keys adds the same to all scores of a query: softmax takes it out.
    """
    layer, norm, heads = cast(Union[HalfLinear, Ranked], block.qkv), block.norm1, block.heads
    came, normalised = tokens.first()  # (B, D) each
    own = normalised * norm.weight + norm.bias
    query = layer.by_head(own.expand(heads, -1, -1), _QUERY) + layer.bias_by_head(_QUERY, heads)  # (H, B, E)
    sought = layer.by_head(query * block.head_width**-0.5, _KEY, transposed=True) * norm.weight  # (H, B, D)
    weights = torch.softmax(tokens.products(sought.transpose(0, 1)), dim=-1)  # (B, H, N)
    patches = torch.ones_like(weights[:, :1])
    patches[:, :, :lead] = 0
    sums = tokens.sums(torch.cat([weights, patches / (weights.shape[-1] - lead)], dim=1))  # (B, H + 1, D)
    found = sums[:, :heads].transpose(0, 1) * norm.weight + norm.bias  # (H, B, D)
    mixed = layer.by_head(found, _VALUE) + layer.bias_by_head(_VALUE, heads)  # (H, B, E)
    return block.perceive(block.attended(came[:, None], mixed.permute(1, 0, 2).flatten(1)[:, None])), sums[:, heads]


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
        setattr(twin, name, Ranked(getattr(block, name), rank, generator, room))
    return twin


def _copied(block: Block) -> Block:
    twin = _twin(block)
    for name in _LAYERS:
        ranked = getattr(block, name)
        copy = Ranked.__new__(Ranked)
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
