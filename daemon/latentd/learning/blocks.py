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
from torch.nn import functional as F

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

    def forward(self, tokens: Tensor) -> Tensor:
        seen: List[Tensor] = []
        for block in self.blocks[:-1]:
            tokens = block(tokens)
            seen.append(tokens[:, :1])
        even = F.layer_norm(tokens, tokens.shape[-1:], eps=self.norm.eps)  # (B, N, D): what every norm of them begins with
        seen.append(_class_token(cast(Block, self.blocks[-1]), tokens[:, :1], even))
        class_tokens = self.norm(torch.cat(seen, dim=1))  # (B, K, D)
        mean = even[:, self.lead :].mean(dim=1) * self.norm.weight + self.norm.bias  # (B, D)
        return torch.cat([class_tokens.flatten(1), mean], dim=1)  # (B, F)

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


def _class_token(block: Block, first: Tensor, even: Tensor) -> Tensor:
    """What a block makes of the class token alone, (B, 1, D), without the keys and values of the others: a seventh of the work or less.

    A score query . (K token) is (K' query) . token, and a sum of values is V times the sum of tokens; so the matrices of keys and values
    meet one vector a head instead of every token. What a bias adds to keys adds the same to all scores of a query: softmax takes it out.

    first: (B, 1, D) the class token as it comes. even: (B, N, D) all tokens through norm1 but for its scale and shift.
    """
    layer, norm, heads = cast(Union[HalfLinear, Ranked], block.qkv), block.norm1, block.heads
    own = norm.bias + even[:, 0] * norm.weight  # (B, D)
    query = layer.by_head(own.expand(heads, -1, -1), _QUERY) + layer.bias_by_head(_QUERY, heads)  # (H, B, E)
    sought = layer.by_head(query * block.head_width**-0.5, _KEY, turned=True) * norm.weight  # (H, B, D)
    weights = torch.softmax(sought.transpose(0, 1) @ even.transpose(1, 2), dim=-1)  # (B, H, N)
    found = (weights @ even).transpose(0, 1) * norm.weight + norm.bias  # (H, B, D)
    mixed = layer.by_head(found, _VALUE) + layer.bias_by_head(_VALUE, heads)  # (H, B, E)
    return block.perceive(block.attended(first, mixed.permute(1, 0, 2).flatten(1)[:, None]))


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
