"""Finds the matrices of a Transformer's layers that can be adapted, by structure, not by class."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from tenslora.constructions import Geometry, adapted_matrices
from tenslora.errors import TensLoRAError

SEPARATE = (("query", "key", "value"), ("q_proj", "k_proj", "v_proj"), ("q_lin", "k_lin", "v_lin"))
FUSED = ("qkv", "c_attn")
# Where the others lie, seen from the attention block: a leading dot is the module around it, two dots the layer.
OUTPUT = ("proj", "o_proj", "out_proj", "out_lin", "c_proj", ".output.dense")
FEED_FORWARD = (
    {"gate": "..mlp.gate_proj", "up": "..mlp.up_proj", "down": "..mlp.down_proj"},
    {"up": "..mlp.fc1", "down": "..mlp.fc2"},
    {"up": "..intermediate.dense", "down": "..output.dense"},
    {"up": "..ffn.lin1", "down": "..ffn.lin2"},
    {"up": "..mlp.c_fc", "down": "..mlp.c_proj"},
)
_HEAD_COUNTS = ("num_attention_heads", "num_heads", "n_heads", "n_head")
_GROUPS = (("query", "key", "value"), ("output",), ("gate", "up"), ("down",))
"""Matrices that read the same tensor."""


@dataclass(frozen=True)
class TargetLinear:
    """One Linear (or transformers' Conv1D) that holds adapted matrices of a layer.

    path: its module path in the model. linear: the module. layer: 0-based. group: which of the geometry's matrices read
    the same input as it does. places: of the matrices that it holds, (which of the group, first output column).
    writes: whether its output goes to the residual stream.
    """

    path: str
    linear: nn.Module
    layer: int
    group: range
    columns: tuple[tuple[int, int], ...]
    writes_to_stream: bool


def features(linear: nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of a Linear or a Conv1D."""
    if isinstance(linear, nn.Linear):
        return linear.in_features, linear.out_features
    inputs, outputs = linear.weight.shape  # type: ignore[union-attr,misc]
    return int(inputs), int(outputs)


def find_projections(model: nn.Module, adapt: str = "qkv") -> tuple[Geometry, list[TargetLinear]]:
    """The matrices to adapt in every layer of `model`, and the geometry that all layers share.

    An attention block is a module whose children are three Linear layers named query/key/value,
    q_proj/k_proj/v_proj or q_lin/k_lin/v_lin, or one named qkv or c_attn. Layers are numbered in module order. The
    attention's output and the feed-forward block are found by name from there (`OUTPUT`, `FEED_FORWARD`).

    Args:
        model: any Transformer.
        adapt: see `constructions.adapted_matrices`.

    Raises TensLoRAError if there is no such block, if what is to be adapted is not found in a layer, if the layers
    differ in width or in heads, or if two of them share a weight.
    """
    blocks = list(_attention_blocks(model))
    if not blocks:
        known = ", ".join([*map("/".join, SEPARATE), *FUSED])
        raise TensLoRAError(
            f"{type(model).__name__}: no attention projections found; they must be nn.Linear children named {known}"
        )
    found = [_layer(model, path, module, names, adapt) for path, module, names in blocks]
    first_path, first = blocks[0][0], found[0][0]
    for layer, (path, _, _) in enumerate(blocks):
        _compare(model, found[layer][0], path, first, first_path)
    geometry = first.geometry(len(blocks), adapt)
    names = geometry.matrices
    groups = {name: [n for n in group if n in names] for group in _GROUPS for name in group}
    targets = []
    for layer, (_, matrices) in enumerate(found):
        linears: dict[str, tuple[nn.Module, dict[str, int]]] = {}
        for name in names:
            path, linear, column = matrices[name]
            linears.setdefault(path, (linear, {}))[1][name] = column
        for path, (linear, columns) in linears.items():
            members = groups[next(iter(columns))]
            start = names.index(members[0])
            held = tuple((members.index(name), column) for name, column in columns.items())
            group = range(start, start + len(members))
            targets.append(TargetLinear(path, linear, layer, group, held, members[0] in ("output", "down")))
    _refuse_shared(targets)
    return geometry, targets


def _refuse_shared(targets: Iterable[TargetLinear]) -> None:
    # Such as tied layers, or a feed-forward block behind two attention blocks.
    owners: dict[int, TargetLinear] = {}
    for target in targets:
        owner = owners.setdefault(id(target.linear.weight), target)
        if owner is not target:
            raise TensLoRAError(
                f"{target.path}: would be adapted twice, for layers {owner.layer} and {target.layer} (there as "
                f"{owner.path}); one weight takes one update. adapter.adapt chooses the matrices"
            )


def check_geometry(declared: Geometry | None, found: Geometry) -> None:
    """Raise TensLoRAError where a backbone is not as its config file declares it; None declares nothing."""
    for name, value in vars(declared).items() if declared else ():
        if name in ("d_ff", "gated") and found.d_ff is None:  # not adapted, and so not looked at
            continue
        if value != getattr(found, name):
            raise TensLoRAError(
                f"model.geometry.{name}={value}: the backbone that was loaded has {getattr(found, name)}; is "
                f"model.checkpoint another model's? If it is meant, set model.geometry=null"
            )


@dataclass(frozen=True)
class _Sizes:
    """Of one layer: what has to be the same in all."""

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
        feed_forward = {"d_ff": self.d_ff, "gated": self.gated} if self.d_ff else {}
        return Geometry(self.d_in, self.heads, d_head, layers, adapt, kv_heads, **feed_forward)  # type: ignore[arg-type]


def _attention_blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module, tuple[str, ...]]]:
    for path, module in model.named_modules():
        for names in (*SEPARATE, *[(name,) for name in FUSED]):
            linears = [getattr(module, name, None) for name in names]
            if not all(map(_is_linear, linears)):
                continue
            if getattr(module, "q_bias", None) is not None and not getattr(module, "qkv_bias_separate", False):
                # timm's BEiT and EVA read the weight and add biases of their own: they never call the Linear.
                raise TensLoRAError(f"{path}: does not call its Linear {names[0]}, so that no adapter can act on it")
            yield path, module, names


def _is_linear(module: object) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


# The sizes of a layer, and for each matrix its Linear's path, the Linear, and its first output column there.
_Found = tuple[_Sizes, dict[str, tuple[str, nn.Module, int]]]


def _layer(model: nn.Module, path: str, module: nn.Module, names: tuple[str, ...], adapt: str) -> _Found:
    def at(name: str) -> str:
        return f"{path}.{name}".lstrip(".")

    heads = _heads(path, module, model)
    matrices: dict[str, tuple[str, nn.Module, int]] = {}
    qkv = ("query", "key", "value")
    if len(names) == 1:
        linear = getattr(module, names[0])
        d_in, together = features(linear)
        d_head = getattr(module, "head_dim", None)
        if together % 3 or (isinstance(d_head, int) and together != 3 * heads * d_head):  # multi-query, as in StarCoder
            raise TensLoRAError(f"{at(names[0])}: its {together} outputs do not divide into query, key and value")
        widths = [together // 3] * 3
        matrices = {name: (at(names[0]), linear, place * widths[0]) for place, name in enumerate(qkv)}
    else:
        linears = [getattr(module, name) for name in names]
        d_in, widths = features(linears[0])[0], [features(linear)[1] for linear in linears]
        matrices = {name: (at(own), linear, 0) for name, own, linear in zip(qkv, names, linears, strict=True)}
        for own, linear in zip(names, linears, strict=True):
            if features(linear)[0] != d_in:
                raise TensLoRAError(
                    f"{at(own)}: reads {features(linear)[0]} numbers and {at(names[0])} {d_in}; tensors need the same "
                    f"d_in in every projection"
                )
    if widths[0] % heads:
        raise TensLoRAError(f"{path}: the output width {widths[0]} does not divide into {heads} heads")
    if widths[1] != widths[2] or widths[1] > widths[0] or widths[1] % (widths[0] // heads):
        raise TensLoRAError(
            f"{path}: query, key and value are {widths[0]}, {widths[1]} and {widths[2]} wide; key and value may be "
            f"narrower together, by whole heads"
        )
    wanted = adapted_matrices(adapt)
    d_ff, gated = None, False
    if "output" in wanted:
        matrices["output"] = (*_lookup(model, path, [{"output": name} for name in OUTPUT])["output"], 0)
    if "up" in wanted:
        feed_forward = _lookup(model, path, FEED_FORWARD)
        matrices |= {name: (*found, 0) for name, found in feed_forward.items()}
        d_ff, gated = features(feed_forward["up"][1])[1], "gate" in feed_forward
    sides = {"output": (widths[0], d_in), "gate": (d_in, d_ff), "up": (d_in, d_ff), "down": (d_ff, d_in)}
    for name, (own, linear, _) in matrices.items():
        if name in sides and features(linear) != sides[name]:
            raise TensLoRAError(f"{own}: maps {features(linear)}, where the {name} matrix should map {sides[name]}")
    query, key, value = widths
    return _Sizes(heads, d_in, query, key, value, d_ff, gated), matrices


def _lookup(model: nn.Module, path: str, choices: Iterable[Mapping[str, str]]) -> dict[str, tuple[str, nn.Module]]:
    modules = dict(model.named_modules())
    steps = path.split(".")
    number = max((index for index, step in enumerate(steps) if step.isdigit()), default=-1)
    bases = {0: path, 1: ".".join(steps[:-1]), 2: ".".join(steps[: number + 1])}
    tried: list[str] = []
    wanted: Iterable[str] = ()
    for choice in choices:
        wanted, paths = choice, {}
        for name, where in choice.items():
            dots = len(where) - len(where.lstrip("."))
            paths[name] = f"{bases[dots]}.{where.lstrip('.')}".lstrip(".")
        if all(_is_linear(modules.get(each)) for each in paths.values()):
            return {name: (each, modules[each]) for name, each in paths.items()}
        tried.append("/".join(paths.values()))
    raise TensLoRAError(
        f"adapter.adapt: {path}: its {' and '.join(wanted)} cannot be found; looked for {', '.join(tried)}"
    )


def _compare(model: nn.Module, sizes: _Sizes, path: str, first: _Sizes, first_path: str) -> None:
    for name, value in vars(sizes).items():
        if value != getattr(first, name):
            raise TensLoRAError(
                f"{type(model).__name__}: layers are uneven, {name} is {value} at {path} and {getattr(first, name)} at "
                f"{first_path}; tensors need the same dimensions in every layer"
            )


def _heads(path: str, module: nn.Module, model: nn.Module) -> int:
    for owner in (module, getattr(module, "config", None), getattr(model, "config", None)):
        for name in _HEAD_COUNTS:
            count = getattr(owner, name, None)
            if isinstance(count, int):
                return count
    raise TensLoRAError(f"{path}: the number of heads is not known; expected an attribute {', '.join(_HEAD_COUNTS)}")
