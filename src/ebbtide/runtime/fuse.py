"""Attention that an export wrote out in small operations, put back into one that writes in place.

A plain export computes attention with some hundred operations a layer, and copies the whole cache
for each token. Here each layer's become one GroupQueryAttention, ONNX Runtime's own operation, with
the same inputs and outputs. Where a layer's attention begins and ends is found by what cannot be
otherwise (its past, its present, and heads that are moved); what it computes is learnt by running
it: see `attention`. What is not understood wholly is refused.
"""

from __future__ import annotations

import dataclasses
import mmap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from ebbtide.runtime.attention import (
    DTYPES,
    FOLDER,
    PAST,
    Attention,
    Block,
    Cut,
    NotFusedError,
    Probe,
    operation,
)
from ebbtide.runtime.model_proto import INT32, MalformedError, Model, Node, Tensor, attribute

_HEADS_MOVED: Final = [0, 2, 1, 3]
_PRODUCTS: Final = frozenset({"MatMul", "Gemm", "MatMulNBits", "MatMulInteger"})
_OUTSIDE_FROM: Final = 1024
"""Bytes from which a constant stays in the file that it is in."""

_OWN: Final = "ebbtide."


@dataclasses.dataclass(frozen=True)
class Fused:
    """A graph whose attention was fused.

    Attributes:
        data: The graph, as ONNX; its weights stay in the files of the original's folder, which
            whoever loads it names (see `configure`).
        exact: The same, with as much accuracy as there is where the original allows less: quantised
            products otherwise round their inputs, and no two graphs agree.
        exact_original: The original with that accuracy.
        folder: That folder.
        layers: How many layers have been fused.
        nodes: How many operations there were, and are.
    """

    data: bytes
    exact: bytes
    exact_original: bytes
    folder: Path
    layers: int
    nodes: tuple[int, int]

    def configure(self, options: Any) -> None:
        """Have a session find the weights.

        Args:
            options: ONNX Runtime's session options.
        """
        options.add_session_config_entry(FOLDER, str(self.folder))


def fuse(path: Path, positions: int) -> Fused:
    """Fuse the attention of a plain export of a causal language model.

    Args:
        path: The ONNX file; its data is beside it.
        positions: Tokens that the model can take.

    Raises:
        NotFusedError: It cannot be; says why.
        OSError: The file cannot be read.
    """
    with path.open("rb") as file:
        view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    try:
        return _fuse(Model.read(view), view, path, positions)
    except MalformedError as error:
        raise NotFusedError(str(error)) from None


def _fuse(model: Model, view: memoryview, path: Path, positions: int) -> Fused:
    if any(node.has_graphs for node in model.nodes):
        raise NotFusedError("it has branches")
    if any(node.op == "GroupQueryAttention" for node in model.nodes):
        raise NotFusedError("its attention is fused")
    if model.opsets.get("", 0) < 13:
        raise NotFusedError("its operations are older than opset 13")
    if not {"input_ids", "attention_mask"} <= {one.name for one in model.inputs}:
        raise NotFusedError("it takes no input_ids and attention_mask")
    model.opsets.setdefault("com.microsoft", 1)
    before = len(model.nodes)
    graph = _Graph(model)
    blocks = [graph.block(number) for number in graph.layers()]
    if not blocks:
        raise NotFusedError("it has no past")
    known: dict[tuple[object, ...], Attention] = {}
    found = []
    for block in blocks:
        key = _signature(model, block)
        if key not in known:
            known[key] = Probe(model, block, path.parent, positions).attention()
        found.append((block, known[key]))
    nodes = _rewritten(model, found)
    kept = Model(nodes, model.tensors, model.inputs, model.outputs, model.opsets)
    nodes = kept.part(nodes, model.inputs, {one.name: one.type for one in model.outputs}).nodes
    _check_rest(nodes)
    whole = Model(nodes, model.tensors, model.inputs, model.outputs, model.opsets, model.ir)
    data = _lean(whole, view, path)
    exact = data
    if [one for one in [*nodes, *model.nodes] if one.attributes.pop("accuracy_level", None)]:
        exact = _lean(whole, view, path)
    original = _lean(model, view, path)
    folder = path.parent.absolute()
    return Fused(data, exact, original, folder, len(blocks), (before, len(nodes)))


def _lean(model: Model, view: memoryview, path: Path) -> bytes:
    """A graph as ONNX, but for its weights, which stay in the file that they are in."""
    used = {name for node in model.nodes for name in node.inputs}
    base = _address(view)
    tensors = {}
    for name, tensor in model.tensors.items():
        if name in used:
            raw = tensor.raw
            large = isinstance(raw, memoryview) and len(raw) >= _OUTSIDE_FROM
            tensors[name] = tensor.outside(path.name, _address(raw) - base) if large else tensor
    inputs, outputs = model.inputs, model.outputs
    return Model(model.nodes, tensors, inputs, outputs, model.opsets, model.ir).write()


def _address(view: Any) -> int:
    return int(np.frombuffer(view, np.uint8).__array_interface__["data"][0])


class _Graph:
    """A model's tensors, and which nodes make and take them."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.made = {name: node for node in model.nodes for name in node.outputs if name}
        self.taken: dict[str, list[Node]] = {}
        for node in model.nodes:
            for name in node.inputs:
                self.taken.setdefault(name, []).append(node)
        self.inputs = {one.name: one for one in model.inputs}
        self.outputs = {one.name: one for one in model.outputs}
        self.weights = set(model.tensors)

    def layers(self) -> list[int]:
        """The numbers of the layers that have a past."""
        found = set()
        for name in self.inputs:
            match = PAST.fullmatch(name)
            if match:
                found.add(int(match[1]))
            elif name.startswith("past"):
                raise NotFusedError(f"it takes {name}")
        return sorted(found)

    def back(self, starts: Iterable[str], stops: frozenset[str] = frozenset()) -> set[str]:
        """The tensors that some are made of, themselves too; not those that give only a shape."""
        found: set[str] = set()
        left = list(starts)
        while left:
            name = left.pop()
            if not name or name in found:
                continue
            found.add(name)
            node = self.made.get(name)
            if node is not None and node.op != "Shape" and name not in stops:
                left += node.inputs
        return found

    def inside(self, starts: Iterable[str], stops: frozenset[str]) -> set[str]:
        """What some tensors are made of, and what shapes that are asked for are of.

        Where that would be more than arithmetic on shapes and masks, the shape is left out.
        """
        found = self.back(starts, stops)
        while True:
            asked = {
                self.made[one].inputs[0]
                for one in found
                if one in self.made and self.made[one].op == "Shape"
            }
            more: set[str] = set()
            for name in asked - found:
                behind = self.back([name], stops)
                if not any(len(self.model.tensors[one].dims) > 1 for one in behind & self.weights):
                    more |= behind
            if more <= found:
                return found
            found |= more

    def heads_out(self, name: str) -> bool:
        """Whether a tensor is one with its heads moved before its tokens."""
        node = self.made.get(name)
        return (
            node is not None and node.op == "Transpose" and node.attribute("perm") == _HEADS_MOVED
        )

    def starts(self, name: str) -> set[str]:
        """The nearest tensors before one that have had their heads moved."""
        found: set[str] = set()
        seen: set[str] = set()
        left = [name]
        while left:
            one = left.pop()
            if not one or one in seen:
                continue
            seen.add(one)
            if self.heads_out(one):
                found.add(one)
            elif one in self.made and self.made[one].op != "Shape":
                left += self.made[one].inputs
        return found

    def block(self, layer: int) -> Block:
        """One layer's attention."""
        past = [f"past_key_values.{layer}.{one}" for one in ("key", "value")]
        new = []
        for name in past:
            present = name.replace("past_key_values", "present")
            node = self.made.get(present)
            if name not in self.inputs or present not in self.outputs or node is None:
                raise NotFusedError(f"it takes no {name}, or gives no {present}")
            if node.op != "Concat" or len(node.inputs) != 2 or node.inputs[0] != name:
                raise NotFusedError(f"{present} is not {name} with something after it")
            new.append(node.inputs[1])
        info = self.inputs[past[0]]
        if info.type not in DTYPES or len(info.shape) != 4:
            raise NotFusedError(f"{past[0]} is no tensor of floats with 4 dimensions")
        kv_heads, size = info.shape[1], info.shape[3]
        if kv_heads is None or size is None or self.inputs[past[1]].shape[1::2] != (kv_heads, size):
            raise NotFusedError(f"{past[0]} and its value do not have one known size")
        key, value = (self._only(self.starts(one), one) for one in new)
        output, own = self._end(layer, past[1].replace("past_key_values", "present"))
        query = self._only(self.starts(own) - {key, value}, own)
        ends = (own, new[0], new[1])
        starts = (query, key, value)
        cuts = [self._cut(*one, frozenset(starts)) for one in zip(starts, ends, strict=True)]
        stops = frozenset(one.name for one in cuts)
        wanted = [output, *(one.replace("past_key_values", "present") for one in past)]
        inside = self.inside(wanted, stops)
        nodes = [node for node in self.model.nodes if not inside.isdisjoint(node.outputs)]
        nodes = [node for node in nodes if stops.isdisjoint(node.outputs)]
        shaped = {
            node.inputs[0]
            for node in nodes
            if node.op == "Shape" and node.inputs[0] not in inside | set(self.inputs) | stops
        }
        used = {name for node in nodes for name in node.inputs}
        inputs = [one for one in self.model.inputs if one.name in used and one.name not in past]
        return Block(
            layer,
            nodes,
            (cuts[0], cuts[1], cuts[2]),
            output,
            sorted(shaped),
            inputs,
            self._width(output) // size,
            kv_heads,
            size,
            info.type,
        )

    def _only(self, names: set[str], of: str) -> str:
        if len(names) != 1:
            raise NotFusedError(f"{of} is made of {len(names)} tensors of heads, not of one")
        return next(iter(names))

    def _cut(self, start: str, end: str, starts: frozenset[str]) -> Cut:
        """Where what is replaced begins: at the projection, or at what is rotated.

        The second where something else comes before the rotation, as a norm of each head does.
        A rotation is seen by the parts that it takes of one tensor, through which all has to come.
        """
        path = self.back([end], starts)
        parted = {
            self.made[one].inputs[0]
            for one in path
            if one in self.made and self.made[one].op in ("Slice", "Split")
        }
        for name in sorted((parted & path) - starts):
            if start not in self.back([end], starts - {start} | {name}):
                return Cut(name, "heads")
        inner = self.made[start].inputs[0]
        node = self.made.get(inner)
        if node is not None and node.op == "Reshape":
            return Cut(node.inputs[0], "flat")
        return Cut(inner, "tokens")

    def _end(self, layer: int, value: str) -> tuple[str, str]:
        """The output of attention, and the tensor of heads that it is made of."""
        left, seen = [value], {value}
        while left:
            for node in self.taken.get(left.pop(), ()):
                if node.op == "Shape":
                    continue
                for name in node.outputs:
                    if self.heads_out(name):
                        users = self.taken.get(name, [])
                        if len(users) == 1 and users[0].op == "Reshape":
                            return users[0].outputs[0], node.inputs[0]
                    elif name not in seen:
                        seen.add(name)
                        left.append(name)
        raise NotFusedError(f"layer {layer} does not end as attention does")

    def _width(self, output: str) -> int:
        """The last dimension of a tensor: what the next product's weight takes."""
        left, seen = [output], {output}
        while left:
            for node in self.taken.get(left.pop(0), ()):
                if node.op in _PRODUCTS:
                    width = self._taken_by(node)
                    if width:
                        return width
                elif node.op != "Shape":
                    fresh = [name for name in node.outputs if name not in seen]
                    seen.update(fresh)
                    left += fresh
        raise NotFusedError(f"no known product takes {output}")

    def _taken_by(self, node: Node) -> int:
        if node.op == "MatMulNBits":
            return int(node.attribute("K"))
        name, turned = node.inputs[1], bool(node.attribute("transB"))
        while name in self.made and self.made[name].op in ("Transpose", "DequantizeLinear", "Cast"):
            turned ^= self.made[name].op == "Transpose"
            name = self.made[name].inputs[0]
        tensor = self.model.tensors.get(name)
        return tensor.dims[1 if turned else 0] if tensor and len(tensor.dims) == 2 else 0


def _signature(model: Model, block: Block) -> tuple[object, ...]:
    """What is equal for two blocks that compute the same."""
    names = {one.name: f"taken {number}" for number, one in enumerate(block.taken)}
    names |= dict.fromkeys(block.shaped, "shaped")
    names |= {name: name for name in (one.name for one in block.inputs)}
    names |= {name: f"past {number}" for number, name in enumerate(block.past)}

    def called(name: str) -> object:
        if name not in names and name in model.tensors:
            tensor = model.tensors[name]
            names[name] = f"{tensor.dims} {tensor.type} {bytes(tensor.raw or name.encode()).hex()}"
        return names.setdefault(name, f"tensor {len(names)}") if name else ""

    found: list[object] = [one.layout for one in block.taken]
    found += [block.heads, block.kv_heads, block.size, block.kind]
    for node in block.nodes:
        given = {key: bytes(one) for key, one in sorted(node.attributes.items())}
        found.append((node.op, tuple(map(called, node.inputs)), tuple(given.items())))
        found.append(tuple(map(called, node.outputs)))
    return tuple(found)


def _rewritten(model: Model, found: Sequence[tuple[Block, Attention]]) -> list[Node]:
    """The nodes with each block's replaced; what nobody needs any more is among them still."""
    added = {
        "ebbtide.axis": np.array([1], np.int64),
        "ebbtide.one": np.array([1], np.int64),
        "ebbtide.last": np.array(1, np.int64),
        "ebbtide.flat": np.array([0, 0, -1], np.int64),
    }
    head = [
        Node("ReduceSum", ["attention_mask", "ebbtide.axis"], ["ebbtide.counts"],
             attributes={"keepdims": attribute("keepdims", 0)}),
        Node("Sub", ["ebbtide.counts", "ebbtide.one"], ["ebbtide.before"]),
        Node("Cast", ["ebbtide.before"], ["ebbtide.seqlens"],
             attributes={"to": attribute("to", INT32)}),
        Node("Shape", ["attention_mask"], ["ebbtide.shape"]),
        Node("Gather", ["ebbtide.shape", "ebbtide.last"], ["ebbtide.length"]),
        Node("Cast", ["ebbtide.length"], ["ebbtide.total"],
             attributes={"to": attribute("to", INT32)}),
    ]  # fmt: skip
    gone: set[str] = set()
    at: dict[str, list[Node]] = {}
    caches: dict[int, list[str]] = {}
    for block, one in found:
        if one.cos is not None and one.sin is not None and id(one) not in caches:
            caches[id(one)] = [f"ebbtide.{kind}.{block.layer}" for kind in ("cos", "sin")]
            added |= dict(zip(caches[id(one)], (one.cos, one.sin), strict=True))
        nodes: list[Node] = []
        names: list[str] = []
        for number, cut in enumerate(block.taken):
            name = cut.name
            if cut.layout == "heads":
                turned = f"{_OWN}{block.layer}.{number}.turned"
                nodes.append(Node("Transpose", [name], [turned]))
                nodes[-1].attributes["perm"] = attribute("perm", _HEADS_MOVED)
                name = nodes[-1].outputs[0]
            if cut.layout != "flat":
                nodes.append(
                    Node("Reshape", [name, "ebbtide.flat"], [f"{_OWN}{block.layer}.{number}"])
                )
                name = nodes[-1].outputs[0]
            names.append(name)
        inputs = [*names, *block.past, "ebbtide.seqlens", "ebbtide.total"]
        outputs = [block.output, *block.present]
        gone.update(outputs)
        nodes.append(operation(block, one, [*inputs, *caches.get(id(one), [])], outputs))
        at[block.output] = nodes
    model.tensors.update({name: Tensor.of(name, array) for name, array in added.items()})
    for node in model.nodes:
        fresh = at.get(node.outputs[0])
        if fresh is not None:
            head += fresh
        elif gone.isdisjoint(node.outputs):
            head.append(node)
    return head


def _check_rest(nodes: Iterable[Node]) -> None:
    """See that only attention looks at the mask and the past: rows are padded at the right now."""
    for node in nodes:
        if node.op == "GroupQueryAttention" or node.outputs[0].startswith("ebbtide."):
            continue
        for name in node.inputs:
            if name == "attention_mask" or name.startswith(("past", "present.")):
                raise NotFusedError(f"{name} is taken by more than its attention")
