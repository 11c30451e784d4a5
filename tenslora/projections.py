"""Finds the matrices of a Transformer that can be adapted, by the structure of the model and not by its class."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, cast

from torch import Tensor, nn

from tenslora.constructions import Geometry, adapted_matrices
from tenslora.errors import TensLoRAError

SEPARATE = (("query", "key", "value"), ("q_proj", "k_proj", "v_proj"), ("q_lin", "k_lin", "v_lin"))
FUSED = ("qkv", "c_attn")
"""The names of an attention block's Linear layers: three for query, key and value, or a single one for all of them."""

OUTPUT = ("proj", "o_proj", "out_proj", "out_lin", "c_proj", ".output.dense")
FEED_FORWARD = (
    {"gate": "..mlp.gate_proj", "up": "..mlp.up_proj", "down": "..mlp.down_proj"},
    {"up": "..mlp.fc1", "down": "..mlp.fc2"},
    {"up": "..intermediate.dense", "down": "..output.dense"},
    {"up": "..ffn.lin1", "down": "..ffn.lin2"},
    {"up": "..mlp.c_fc", "down": "..mlp.c_proj"},
)
"""Paths of the other matrices' Linear layers. A path without a leading dot starts at the attention block, a path with
one dot at the module that contains the block, and a path with two dots at the layer."""

_HEAD_COUNTS = ("num_attention_heads", "num_heads", "n_heads", "n_head")
_SAME_INPUT = (("query", "key", "value"), ("output",), ("gate", "up"), ("down",))


@dataclass(frozen=True)
class TargetLinear:
    """A Linear layer (or transformers' Conv1D) that holds adapted matrices.

    Args:
        path: the module's path in the model.
        linear: the module.
        layer: the index of its layer, 0-based.
        group: the matrices that read the same input, as a range of indices in `Geometry.matrices`.
        columns: (index in the group, first output column) of each matrix that the module holds.
        writes_to_stream: whether the module's output goes to the residual stream.
    """

    path: str
    linear: nn.Module
    layer: int
    group: range
    columns: tuple[tuple[int, int], ...]
    writes_to_stream: bool


def features(linear: nn.Module) -> tuple[int, int]:
    """The numbers of inputs and outputs of a Linear, quantised or not, or of a Conv1D."""
    if hasattr(linear, "in_features"):
        return cast(int, linear.in_features), cast(int, linear.out_features)
    inputs, outputs = linear.get_parameter("weight").shape
    return inputs, outputs


def is_plain(linear: nn.Module) -> bool:
    """Whether the weight of a Linear is a plain matrix of floats, to which an update can be added; not if quantised."""
    weight, sizes = getattr(linear, "weight", None), {*features(linear)}
    plain = type(weight) in (nn.Parameter, Tensor)
    return plain and cast(Tensor, weight).is_floating_point() and {*cast(Tensor, weight).shape} == sizes


def find_projections(
    model: nn.Module, adapt: str = "qkv", layers: Collection[int] | None = None
) -> tuple[Geometry, list[TargetLinear]]:
    """Find the matrices to adapt in every layer of a model.

    An attention block is a module with three Linear layers named query/key/value, q_proj/k_proj/v_proj or
    q_lin/k_lin/v_lin, or with one Linear layer named qkv or c_attn. Each such block counts as one layer, and layers are
    numbered in the order of the model's modules. The attention's output and the feed-forward block are looked up by
    name (`OUTPUT`, `FEED_FORWARD`).

    Args:
        model: any Transformer.
        adapt: which matrices, see `constructions.adapted_matrices`.
        layers: which of the model's layers to take, counted from 0; None for all. The layers that are taken are
            numbered anew, from 0 and without gaps.

    Returns:
        The geometry that all layers share, and the Linear layers that hold the matrices, layer by layer.

    Raises:
        TensLoRAError: if there is no attention block, if a layer lacks a matrix that is to be adapted, if the layers
            differ in width or in heads, or if two layers share a weight.
    """
    blocks = list(_attention_blocks(model))
    if not blocks:
        known = ", ".join([*map("/".join, SEPARATE), *FUSED])
        raise TensLoRAError(
            f"{type(model).__name__}: no attention projections found; they must be nn.Linear children named {known}"
        )
    taken = blocks if layers is None else [block for index, block in enumerate(blocks) if index in layers]
    found = [_inspect_layer(model, path, block, names, adapt) for path, block, names in taken]
    for layer in found:
        _require_same_sizes(model, layer, found[0])
    geometry = found[0].sizes.geometry(len(found), adapt)
    targets = [target for index, layer in enumerate(found) for target in _targets(index, layer, geometry)]
    _refuse_shared_weights(targets)
    return geometry, targets


def _attention_blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module, tuple[str, ...]]]:
    # Yields the path of each block, the block, and the names of its Linear layers.
    for path, module in model.named_modules():
        for names in (*SEPARATE, *[(name,) for name in FUSED]):
            linears = [getattr(module, name, None) for name in names]
            if not all(map(_is_linear, linears)):
                continue
            if getattr(module, "q_bias", None) is not None and not getattr(module, "qkv_bias_separate", False):
                # timm's BEiT and EVA read the weight and add biases of their own, without calling the Linear.
                raise TensLoRAError(f"{path}: does not call its Linear {names[0]}, so an adapter there has no effect")
            yield path, module, names


def _is_linear(module: object) -> bool:
    # Quantised Linear layers of some packages are no nn.Linear, but have its sizes.
    sizes = isinstance(getattr(module, "in_features", None), int) and isinstance(
        getattr(module, "out_features", None), int
    )
    return isinstance(module, nn.Module) and (sizes or type(module).__name__ == "Conv1D")


@dataclass(frozen=True)
class _Sizes:
    """The sizes that have to be the same in all layers."""

    heads: int
    d_in: int
    query: int
    key: int
    value: int
    d_ff: int | None
    gated: bool

    def geometry(self, layers: int, adapt: str) -> Geometry:
        d_head = self.query // self.heads
        kv_heads = None if self.key == self.query else self.key // d_head
        return Geometry(self.d_in, self.heads, d_head, layers, adapt, kv_heads, self.d_ff, self.gated)


class _Matrix(NamedTuple):
    """The Linear that holds a matrix, the Linear's path, and the matrix's first output column in it."""

    path: str
    linear: nn.Module
    column: int


class _Layer(NamedTuple):
    """The path of a layer's attention block, the layer's sizes, and its matrices by name."""

    path: str
    sizes: _Sizes
    matrices: Mapping[str, _Matrix]


def _inspect_layer(model: nn.Module, path: str, block: nn.Module, names: tuple[str, ...], adapt: str) -> _Layer:
    def path_of(name: str) -> str:
        return f"{path}.{name}".lstrip(".")

    heads = _head_count(path, block, model)
    qkv = ("query", "key", "value")
    if len(names) == 1:
        linear = getattr(block, names[0])
        d_in, outputs = features(linear)
        d_head = getattr(block, "head_dim", None)
        # The second condition holds for multi-query attention, as in StarCoder.
        if outputs % 3 or (isinstance(d_head, int) and outputs != 3 * heads * d_head):
            raise TensLoRAError(f"{path_of(names[0])}: its {outputs} outputs do not divide into query, key and value")
        widths = [outputs // 3] * 3
        matrices = {name: _Matrix(path_of(names[0]), linear, index * widths[0]) for index, name in enumerate(qkv)}
    else:
        linears = [getattr(block, name) for name in names]
        d_in, widths = features(linears[0])[0], [features(linear)[1] for linear in linears]
        matrices = {
            matrix: _Matrix(path_of(name), linear, 0) for matrix, name, linear in zip(qkv, names, linears, strict=True)
        }
        for name, linear in zip(names, linears, strict=True):
            if features(linear)[0] != d_in:
                raise TensLoRAError(
                    f"{path_of(name)}: has {features(linear)[0]} inputs, but {path_of(names[0])} has {d_in}; the "
                    f"projections of a layer must have the same number of inputs"
                )
    query, key, value = widths
    if query % heads:
        raise TensLoRAError(f"{path}: the output width {query} does not divide into {heads} heads")
    if key != value or key > query or key % (query // heads):
        raise TensLoRAError(
            f"{path}: query, key and value are {query}, {key} and {value} wide; key and value must be equally wide, "
            f"consist of whole heads, and be no wider than query"
        )
    wanted = adapted_matrices(adapt)
    d_ff, gated = None, False
    if "output" in wanted:
        matrices |= _look_up(model, path, [{"output": name} for name in OUTPUT], adapt)
    if "up" in wanted:
        feed_forward = _look_up(model, path, FEED_FORWARD, adapt)
        matrices |= feed_forward
        d_ff, gated = features(feed_forward["up"].linear)[1], "gate" in feed_forward
    expected = {"output": (query, d_in), "gate": (d_in, d_ff), "up": (d_in, d_ff), "down": (d_ff, d_in)}
    for name, matrix in matrices.items():
        if name in expected and features(matrix.linear) != expected[name]:
            raise TensLoRAError(
                f"{matrix.path}: (inputs, outputs) is {features(matrix.linear)}, but must be {expected[name]} for the "
                f"{name} matrix"
            )
    return _Layer(path, _Sizes(heads, d_in, query, key, value, d_ff, gated), matrices)


def _head_count(path: str, block: nn.Module, model: nn.Module) -> int:
    for owner in (block, getattr(block, "config", None), getattr(model, "config", None)):
        for name in _HEAD_COUNTS:
            count = getattr(owner, name, None)
            if isinstance(count, int):
                return count
    raise TensLoRAError(f"{path}: the number of heads is not known; expected an attribute {', '.join(_HEAD_COUNTS)}")


def _look_up(model: nn.Module, path: str, choices: Iterable[Mapping[str, str]], adapt: str) -> dict[str, _Matrix]:
    # Returns the first choice whose modules all exist. A layer's path ends at the last number in its block's path.
    modules = dict(model.named_modules())
    steps = path.split(".")
    number = max((index for index, step in enumerate(steps) if step.isdigit()), default=-1)
    bases = {0: path, 1: ".".join(steps[:-1]), 2: ".".join(steps[: number + 1])}
    tried: list[str] = []
    names: Iterable[str] = ()
    for choice in choices:
        names, paths = choice, {}
        for name, place in choice.items():
            dots = len(place) - len(place.lstrip("."))
            paths[name] = f"{bases[dots]}.{place.lstrip('.')}".lstrip(".")
        if all(_is_linear(modules.get(each)) for each in paths.values()):
            return {name: _Matrix(each, modules[each], 0) for name, each in paths.items()}
        tried.append("/".join(paths.values()))
    raise TensLoRAError(
        f"adapt={adapt}: {path}: its {' and '.join(names)} cannot be found; looked for {', '.join(tried)}"
    )


def _require_same_sizes(model: nn.Module, layer: _Layer, first: _Layer) -> None:
    for name, value in vars(layer.sizes).items():
        if value != getattr(first.sizes, name):
            raise TensLoRAError(
                f"{type(model).__name__}: layers are uneven, {name} is {value} at {layer.path} and "
                f"{getattr(first.sizes, name)} at {first.path}; tensors need the same dimensions in every layer"
            )


def _targets(index: int, layer: _Layer, geometry: Geometry) -> Iterator[TargetLinear]:
    names = geometry.matrices
    columns: dict[str, dict[str, int]] = {}  # by the path of a Linear, the matrices that it holds
    for name in names:
        columns.setdefault(layer.matrices[name].path, {})[name] = layer.matrices[name].column
    for path, held in columns.items():
        first = next(iter(held))
        members = [name for name in next(group for group in _SAME_INPUT if first in group) if name in names]
        start = names.index(members[0])
        yield TargetLinear(
            path,
            layer.matrices[first].linear,
            index,
            range(start, start + len(members)),
            tuple((members.index(name), column) for name, column in held.items()),
            writes_to_stream=first in ("output", "down"),
        )


def _refuse_shared_weights(targets: Iterable[TargetLinear]) -> None:
    # Layers may be tied, or one feed-forward block may follow two attention blocks.
    owners: dict[int, TargetLinear] = {}
    for target in targets:
        owner = owners.setdefault(id(target.linear.weight), target)
        if owner is not target:
            raise TensLoRAError(
                f"{target.path}: would be adapted twice, for layers {owner.layer} and {target.layer} (there as "
                f"{owner.path}), but a weight can take only one update; choose the matrices with adapt"
            )
