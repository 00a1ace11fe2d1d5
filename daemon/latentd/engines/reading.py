"""The exported graph taken apart: its constants, and where its layers, its attentions, its norms and its embedding are. Needs onnx only.

Found by the names that the exporter gives (`/blocks.3/qkv/MatMul`) and by what is wired to what. Used by whoever rewrites a graph; works in
memory, for a fraction of a second.
"""

from __future__ import annotations

import re
from typing import Any, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import numpy as np
from numpy.typing import NDArray

from latentd.errors import EngineError

_LINEAR = re.compile(r"^(?P<layer>/blocks\.(?P<block>\d+)/(?P<part>qkv|proj|fc1|fc2))/MatMul$")

Floats = NDArray[np.float32]


class Linear:
    """One linear layer of the graph. weight: (K, N), bias: (N,), with the scale after it multiplied in; result: what it writes."""

    def __init__(self, block: int, part: str, layer: str, source: str, weight: Floats, bias: Floats, result: str) -> None:
        self.block, self.part, self.layer, self.source, self.result = block, part, layer, source, result
        self.weight, self.bias = weight, bias

    @property
    def leaving(self) -> str:
        """What its result is called among what a calibration has looked at."""
        return f"{self.layer}/result"


class Attention(NamedTuple):
    """Attention of one block, from what qkv writes (source) to what proj reads (result). nodes: by name, in the order of the graph."""

    block: int
    name: str
    source: str
    result: str
    nodes: List[str]
    tokens: int
    heads: int
    head_width: int


class Norm(NamedTuple):
    """The norm before a layer. stretch, shift: (D,). nodes: by name, in the order of the graph."""

    layer: str
    name: str
    source: str
    result: str
    stretch: Floats
    shift: Floats
    epsilon: float
    nodes: List[str]


class Embedding(NamedTuple):
    """What comes before the blocks. weight: (D, 3, p, p), for pixels less their mean over their std, (3,) in 0..255; lead: what stands
    before the patches, (1+R, D); position: (P, D). nodes: by name, in the order of the graph; result: what they give."""

    weight: Floats
    bias: Floats
    mean: Floats
    std: Floats
    lead: Floats
    position: Floats
    nodes: List[str]
    result: str

    @property
    def patch(self) -> int:
        return int(self.weight.shape[-1])

    @property
    def side(self) -> int:
        """In patches."""
        return int(round(len(self.position) ** 0.5))


class Reading:
    """A model taken apart: its constants, its linear layers and the nodes that these replace."""

    def __init__(self, graph: bytes) -> None:
        import onnx

        self.model = onnx.load_from_string(graph)
        self.to_array = onnx.numpy_helper.to_array
        nodes = self.model.graph.node
        self.constants: Dict[str, Any] = {tensor.name: self.to_array(tensor) for tensor in self.model.graph.initializer}
        self.users: Dict[str, List[Any]] = {}
        for node in nodes:
            for name in node.input:
                self.users.setdefault(name, []).append(node)
        self.maker = {name: node for node in nodes for name in node.output}
        self.replaced: Dict[str, Optional[str]] = {}  # node -> the layer that stands in its place; None: nothing does
        self.linears: Dict[str, Linear] = {linear.layer: linear for linear in self._linears()}
        self.is_centred = False  # whether no token has a mean over its channels
        if not self.linears:
            raise EngineError("the graph has no linear layers that could be quantized")

    def _linears(self) -> Iterator[Linear]:
        for node in self.model.graph.node:
            found = _LINEAR.match(node.name)
            if node.op_type != "MatMul" or found is None or node.input[1] not in self.constants:
                continue
            layer, weight = found["layer"], self.constants[node.input[1]]
            self.replaced[node.name] = layer
            (added,) = self.users[node.output[0]]
            bias, result = self._other(added, node.output[0]), added.output[0]
            self.replaced[added.name] = None
            after = self.users.get(result, [])
            if len(after) == 1 and after[0].op_type == "Mul" and self._has_constant(after[0], result):
                scale = self._other(after[0], result)
                weight, bias, result = weight * scale, bias * scale, after[0].output[0]
                self.replaced[after[0].name] = None
            yield Linear(int(found["block"]), found["part"], layer, node.input[0], weight, bias, result)

    def attentions(self) -> Iterator[Attention]:
        """One a block; EngineError where a block has another than the exporter writes."""
        for linear in self.linears.values():
            proj = self.linears.get(f"/blocks.{linear.block}/proj")
            if linear.part == "qkv" and proj is not None:
                nodes = self._between(linear.result, proj.source)
                apart = next((self.maker[node.input[1]] for node in nodes if node.op_type == "Reshape"), None)
                if apart is None or apart.op_type != "Constant":
                    raise EngineError(f"block {linear.block} of the graph does not cut its heads apart where that is looked for")
                _, tokens, heads, width = (int(size) for size in self.to_array(apart.attribute[0].t))
                names = [node.name for node in nodes]
                yield Attention(linear.block, f"/blocks.{linear.block}/attention", linear.result, proj.source, names, tokens, heads, width)

    @property
    def last(self) -> int:
        """The last block."""
        return max(linear.block for linear in self.linears.values())

    def norms(self) -> Iterator[Norm]:
        """Two a block."""
        for linear in self.linears.values():
            if linear.part in ("qkv", "fc1"):
                shift = self.maker[linear.source]
                name = shift.name.rsplit("/", 1)[0]
                nodes = [node for node in self.model.graph.node if node.name.startswith(f"{name}/")]
                inside = {each for node in nodes for each in node.output}
                entering = next(each for node in nodes for each in node.input if each not in inside)
                stretch = next(node for node in nodes if node.op_type == "Mul")
                epsilon = float(self._constant(next(node for node in nodes if node.op_type == "Add")))
                values, names = (self._constant(stretch), self._constant(shift)), [node.name for node in nodes]
                yield Norm(linear.layer, name, entering, linear.source, *values, epsilon, names)

    def embedding(self) -> Embedding:
        by_kind = {node.op_type: node for node in reversed(self.model.graph.node)}  # the first of each
        conv, joined = by_kind["Conv"], by_kind["Concat"]
        std = self.maker[conv.input[0]]
        mean = self.maker[std.input[0]]
        lead, position = (self._constant(self.maker[name]) for name in joined.input)
        nodes = [node.name for node in self._between("pixels", joined.output[0])]
        weight, bias = (self.constants[name] for name in conv.input[1:])
        return Embedding(weight, bias, self._constant(mean).ravel(), self._constant(std).ravel(), lead, position, nodes, joined.output[0])

    def _constant(self, node: Any) -> Any:
        """The one input of a node that is the same for every image."""
        for name in node.input:
            if name in self.constants:
                return self.constants[name]
            if name in self.maker and self.maker[name].op_type == "Constant":
                return self.to_array(self.maker[name].attribute[0].t)
        raise EngineError(f"{node.name} of the graph has no constant where one is looked for")

    def _between(self, first: str, last: str) -> List[Any]:
        """The nodes through which a value becomes another, in the order of the graph."""
        reached = {first}
        found = []
        for node in self.model.graph.node:
            if last not in reached and reached.intersection(node.input):
                found.append(node)
                reached.update(node.output)
        return found

    def replace(self, nodes: Sequence[str], name: str) -> None:
        """What `written` is given under this name stands where the first of the nodes stood; the others go."""
        self.replaced.update({**dict.fromkeys(nodes), nodes[0]: name})

    def gives_tokens_of(self, block: int) -> bool:
        """Whether the tokens that the graph gives are those of this block."""
        are_given = any(value.name == "tokens" for value in self.model.graph.output)
        return are_given and bool(self.maker["tokens"].name.startswith(f"/blocks.{block}/"))

    def drop_output(self, name: str) -> None:
        kept = [value for value in self.model.graph.output if value.name != name]
        del self.model.graph.output[:]
        self.model.graph.output.extend(kept)

    def added_to(self, update: str) -> str:
        """The other summand, where this value is added to what came before."""
        (node,) = self.users[update]
        return str(next(name for name in node.input if name != update))

    def rewire(self, update: str, old: str, new: str) -> None:
        """Where `update` is added to `old`, it is added to `new`."""
        (node,) = self.users[update]
        node.input[list(node.input).index(old)] = new

    def take_bytes(self) -> None:
        """One image at a time, uint8 (1, S, S, 3), goes in."""
        import onnx

        (entering,) = self.model.graph.input
        size = entering.type.tensor_type.shape.dim[-1].dim_value
        entering.CopyFrom(onnx.helper.make_tensor_value_info(entering.name, onnx.TensorProto.UINT8, (1, size, size, 3)))
        for value in self.model.graph.output:
            value.type.tensor_type.shape.dim[0].dim_value = 1

    def _has_constant(self, node: Any, known: str) -> bool:
        return any(name in self.constants for name in node.input if name != known)

    def _other(self, node: Any, known: str) -> Any:
        """The constant that a node combines with a value."""
        (name,) = (name for name in node.input if name != known)
        return self.constants[name]

    def written(self, layers: Mapping[str, List[Any]], constants: Mapping[str, Any], domains: Tuple[str, ...] = ()) -> bytes:
        """The model with these nodes in the place of each layer, and these constants besides its own."""
        import onnx

        nodes: List[Any] = []
        for node in self.model.graph.node:
            if node.name not in self.replaced:
                nodes.append(node)
                continue
            layer = self.replaced[node.name]
            nodes += layers[layer] if layer is not None else []
        used = {name for node in nodes for name in node.input}
        nodes = [node for node in nodes if node.op_type != "Constant" or used.intersection(node.output)]
        made = onnx.ModelProto()
        made.CopyFrom(self.model)
        del made.graph.node[:], made.graph.initializer[:], made.graph.value_info[:]
        made.graph.node.extend(nodes)
        made.graph.initializer.extend(
            onnx.numpy_helper.from_array(np.asarray(value, order="C"), name)
            for name, value in {**self.constants, **constants}.items()
            if name in used
        )
        made.opset_import.extend(onnx.helper.make_opsetid(domain, 1) for domain in domains)
        return bytes(made.SerializeToString())
