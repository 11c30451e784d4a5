"""Finds the matrices of a Transformer that can be adapted, by the structure of the model and not by its class."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from numbers import Integral
from typing import Any, NamedTuple, TypeGuard, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from tenslora.constructions import Geometry, adapted_matrices
from tenslora.errors import TensLoRAError, line_with_kind

SEPARATE = (
    ("query", "key", "value"),
    ("q_proj", "k_proj", "v_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("query_proj", "key_proj", "value_proj"),
    ("q", "k", "v", "o"),
)
"""The names of an attention block's Linear layers for query, key and value. Single letters count only beside an o."""


KEY_AND_VALUE = ("q", "kv")
"""The names of the Linear layers for query, and for key and value side by side, of attention in which key and value
read a smaller feature map (PVT v2 and Twins of timm). They count only beside an sr, the
layer that makes that feature map."""


class FusedLayout(NamedTuple):
    """How one Linear holds query, key and value.

    Args:
        by_head: whether the Linear holds one group of heads after the other, each with its queries, key and value; such
            a group is one key head with the query heads that share it. Otherwise all queries come first, then all keys,
            then all values.
        classes: the attention classes that are known to have this layout; () if all that use the name have it.
    """

    by_head: bool = False
    classes: tuple[str, ...] = ()


FUSED = {
    "qkv": FusedLayout(),
    "c_attn": FusedLayout(),
    "Wqkv": FusedLayout(),
    # CodeGen and MiniMax use this name with layouts of their own.
    "qkv_proj": FusedLayout(classes=("Phi3Attention", "Phi4MultimodalAttention")),
    "query_key_value": FusedLayout(
        by_head=True,
        classes=(
            "GPTNeoXAttention",
            "GPTNeoXJapaneseAttention",
            "FalconAttention",
            "BloomAttention",
            "PersimmonAttention",
        ),
    ),
}
"""The names of an attention block's Linear layer if a single one holds query, key and value."""

OUTPUT = ("proj", "o_proj", "out_proj", "out_lin", "c_proj", ".output.dense", "dense", "Wo", "o")
FEED_FORWARD = (
    {"gate": "..mlp.gate_proj", "up": "..mlp.up_proj", "down": "..mlp.down_proj"},
    {"up": "..mlp.fc1", "down": "..mlp.fc2"},
    {"up": ".mlp.fc1", "down": ".mlp.fc2"},
    {"up": "..mlp.dense1", "down": "..mlp.dense2"},
    {"up": "..intermediate.dense", "down": "..output.dense"},
    {"up": "..ffn.lin1", "down": "..ffn.lin2"},
    {"up": "..mlp.c_fc", "down": "..mlp.c_proj"},
    {"up": "..mlp.dense_h_to_4h", "down": "..mlp.dense_4h_to_h"},
)
"""Paths of the other matrices' Linear layers. A path without a leading dot starts at the attention block, a path with
one dot at the module that contains the block, and a path with two dots at the layer."""

_HEAD_COUNTS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "heads")
_KEY_HEAD_COUNTS = (
    "num_key_value_heads", "num_kv_heads", "kv_heads", "n_kv_heads", "n_kv_head", "num_query_groups", "n_query_groups",
)  # fmt: skip
_SAME_INPUT = (("query", "key", "value"), ("output",), ("gate", "up"), ("down",))


class Columns(NamedTuple):
    """The output columns of a Linear that belong to one matrix.

    The Linear's columns are equal parts, in each of which the matrix has the same place. There is one part, except
    where a fused Linear holds one group of heads after the other (`FusedLayout.by_head`).

    Args:
        matrix: the matrix's index in its `TargetLinear.group`.
        start: the matrix's first column in a part.
        width: the number of the matrix's columns in a part.
        parts: the number of parts.
    """

    matrix: int
    start: int
    width: int
    parts: int = 1

    def of(self, outputs: Tensor) -> Tensor:
        """The matrix's columns in a tensor whose last dimension is the Linear's outputs.

        Args:
            outputs: (..., outputs).

        Returns:
            A view, (..., parts, width).
        """
        parts = outputs.view(*outputs.shape[:-1], self.parts, outputs.shape[-1] // self.parts)
        return parts.narrow(-1, self.start, self.width)

    def spread(self, own: Tensor, outputs: int) -> Tensor:
        """The matrix's columns among those of the Linear, with zeros in all others.

        Args:
            own: the matrix's columns, (tokens, parts * width).
            outputs: the number of the Linear's outputs.

        Returns:
            (tokens, outputs).
        """
        after = outputs // self.parts - self.start - self.width
        # To torch.export, len(own) would be a constant.
        return F.pad(own.reshape(own.shape[0], self.parts, self.width), (self.start, after)).flatten(1)


@dataclass(frozen=True)
class TargetLinear:
    """A Linear layer (or transformers' Conv1D) that holds adapted matrices.

    Args:
        path: the module's path in the model.
        linear: the module.
        layer: the index of its layer in its stage, 0-based.
        model_layer: the index of its layer among all layers of the model, 0-based.
        group: the matrices that read the same input, as a range of indices in `Geometry.matrices`.
        columns: the output columns of each matrix that the module holds.
        writes_to_stream: whether the module's output goes to the residual stream.
    """

    path: str
    linear: nn.Module
    layer: int
    model_layer: int
    group: range
    columns: tuple[Columns, ...]
    writes_to_stream: bool


class Stage(NamedTuple):
    """The layers of a model that have equal sizes, and so can share tensors.

    Most Transformers are a single stage. A hierarchical one, such as Swin, has a stage for each size of its layers.

    Args:
        geometry: the dimensions of these layers.
        targets: the Linear layers that hold their matrices, layer by layer.
    """

    geometry: Geometry
    targets: list[TargetLinear]


def features(linear: nn.Module) -> tuple[int, int]:
    """The numbers of inputs and outputs of a Linear, quantised or not, or of a Conv1D."""
    if hasattr(linear, "in_features"):
        return int(cast(int, linear.in_features)), int(cast(int, linear.out_features))  # they may be numpy's
    inputs, outputs = linear.get_parameter("weight").shape
    return inputs, outputs


def is_conv1d(linear: object) -> bool:
    """Whether a module is transformers' Conv1D, a Linear whose weight is stored transposed, (inputs, outputs)."""
    return any(kind.__name__ == "Conv1D" for kind in type(linear).__mro__)


FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""The types of numbers that can be added. Those of 8 bits cannot."""


def is_plain(linear: nn.Module) -> bool:
    """Whether the weight of a Linear is a plain matrix of floats, to which an update can be added; not if quantised."""
    weight, sizes = getattr(linear, "weight", None), {*features(linear)}
    plain = type(weight) in (nn.Parameter, Tensor)
    return plain and cast(Tensor, weight).dtype in FLOATS and {*cast(Tensor, weight).shape} == sizes


def find_projections(
    model: nn.Module,
    adapt: str = "qkv",
    layers: Collection[int] | None = None,
    chosen: Callable[[str], bool] | None = None,
) -> list[Stage]:
    """Find the matrices to adapt in every layer of a model.

    An attention block is a module with three Linear layers for query, key and value (`SEPARATE`), with one that holds
    all three (`FUSED`), or with one for query and one for the others (`KEY_AND_VALUE`). Each such block counts as one
    layer, and layers are numbered in the order of the model's modules. The attention's output and the feed-forward
    block are looked up by name (`OUTPUT`, `FEED_FORWARD`).

    Layers of equal sizes form one stage, whether they follow one another or not: a tensor that stacks layers needs the
    same dimensions in all of them.

    A warning says so if layers of the same list have no such block, as in models that mix attention with other layers,
    and if the numbers in the layers' names are not in the order of the model's modules.

    Args:
        model: any Transformer.
        adapt: which matrices, see `constructions.adapted_matrices`.
        layers: which of the model's layers to take, counted from 0 through all stages; None for all. The layers that
            are taken are numbered anew, in each stage from 0 and without gaps.
        chosen: whether a Linear layer of some path is one to adapt, as far as that is known; None if all may be. With
            it, a layer that cannot be adapted is passed over if no Linear of its attention is chosen, and layers may
            share weights, because not all that are found need be adapted.

    Returns:
        The stages, in the order of their first layers.

    Raises:
        TensLoRAError: if there is no attention block, if an attention block is of a kind in which an adapter would not
            do what it should, if a layer lacks a matrix that is to be adapted, if two layers share a weight, or if the
            model is wrapped for several processes already.
    """
    _refuse_wrapped(model)
    require_sizes(model)
    if path := path_of_tuner_layer(model):
        raise TensLoRAError(
            f"{path}: has a TensLoRA adapter in PEFT already; take it off first, with merge_and_unload or unload of "
            f"the PeftModel that it was made with, or make the model anew"
        )
    blocks = list(_attention_blocks(model))
    if not blocks:
        known = ", ".join([*map("/".join, SEPARATE), *FUSED])
        raise TensLoRAError(
            f"{type(model).__name__}: no attention projections found; they must be nn.Linear children named {known}"
        )
    found, failed = [], []
    for index, (path, block, names) in enumerate(blocks):
        if layers is not None and index not in layers:
            continue
        try:
            if reason := _reason_to_refuse(path, block, names[0]):
                raise TensLoRAError(f"{path or type(block).__name__}: {reason}")
            found.append(_inspect_layer(model, index, path, block, names, adapt))
        except TensLoRAError as error:
            failed.append((path, block, error))
    for path, block, failure in failed:
        if chosen is None or not found:
            raise failure
        if any(chosen(f"{path}.{name}".lstrip(".")) for name, part in block.named_modules() if is_linear(part)):
            raise TensLoRAError(f"{failure}; exclude_modules can leave it out")  # it is PEFT's settings that choose
    _warn_of_skipped_layers(model, [path for path, _, _ in blocks])
    _warn_of_falling_numbers(model, [path for path, _, _ in blocks])
    by_sizes: dict[_Sizes, list[_Layer]] = {}
    for layer in found:
        by_sizes.setdefault(layer.sizes, []).append(layer)
    stages = [_stage(sizes, of_stage, adapt) for sizes, of_stage in by_sizes.items()]
    _refuse_odd_weights(_in_order(stages))
    if chosen is None:
        require_weights_of_their_own(stages)
    return stages


def paths_to_adapt(model: nn.Module) -> set[str]:
    """The paths of all Linear layers that `find_projections` finds with one choice of matrices or another.

    Args:
        model: any Transformer.
    """
    paths: set[str] = set()
    for adapt in ("qkv", "qkvo", "mlp"):
        with warnings.catch_warnings(), suppress(TensLoRAError):  # the model's attention output may not be known
            warnings.simplefilter("ignore")
            stages = find_projections(model, adapt, chosen=lambda _: False)
            require_weights_of_their_own(stages)
            paths |= {target.path for stage in stages for target in stage.targets}
    return paths


def path_of_tuner_layer(model: nn.Module) -> str | None:
    """The path of the first layer that has a TensLoRA adapter in PEFT, see `tenslora.peft.tuner`; None without one.

    Args:
        model: any model.
    """
    paths = (path for path, module in model.named_modules() if getattr(type(module), "has_tenslora_adapter", False))
    return next(paths, None)


def _refuse_wrapped(model: nn.Module) -> None:
    # The wrappers decide when they are made which parameters to reduce or to shard. fully_shard changes the class.
    wrappers = ("DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule")
    if type(model).__name__ == "OptimizedModule" or "_orig_mod" in vars(model):  # the latter by accelerate
        raise TensLoRAError("the model is compiled already; attach the adapter first, then call torch.compile")
    if isinstance(model, nn.DataParallel):
        raise TensLoRAError(
            "DataParallel: cannot copy an adapter; attach it to the model itself, and start one process per device "
            "instead (torchrun)"
        )
    for path, module in model.named_modules():
        for name in (kind.__name__ for kind in type(module).__mro__):
            if name in wrappers:
                raise TensLoRAError(
                    f"{path or type(model).__name__}: is wrapped in {name} already, which would leave the adapter's "
                    f"gradients out; attach the adapter first, then wrap the model"
                )


def require_sizes(model: nn.Module) -> None:
    """Check that all parameters of a model have a size.

    Args:
        model: any model.

    Raises:
        TensLoRAError: if one gets its size in the first forward pass only, as in a LazyLinear.
    """
    for path, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise TensLoRAError(f"{path}: has no size before the model's first forward pass; run one first")


def _attention_blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module, tuple[str, ...]]]:
    # Yields the path of each block, the block, and the names of its Linear layers.
    for path, module in model.named_modules():
        for names in (*SEPARATE, *[(name,) for name in FUSED], KEY_AND_VALUE):
            if (names != KEY_AND_VALUE or attribute_of(module, "sr", path, absent=False) is not False) and all(
                is_linear(attribute_of(module, name, path)) for name in names
            ):
                yield path, module, names[:3]


def _reason_to_refuse(path: str, block: nn.Module, name: str) -> str | None:
    # Why an adapter on a block with this Linear would not do what it should, if that is so.
    kind, own = type(block), partial(attribute_of, block, path=path)
    if isinstance(block, torch.jit.ScriptModule):
        return "is compiled by torch.jit, whose modules cannot be replaced; attach the adapter first"
    classes = FUSED[name].classes if name in FUSED else ()
    if classes and not any(each.__name__ in classes for each in kind.__mro__):
        return f"the order of the outputs of {name} in {kind.__name__} is not known; it is in {', '.join(classes)}"
    if own("q_bias") is not None and not own("qkv_bias_separate"):
        # timm's BEiT and EVA read the weight and add biases of their own.
        return f"does not call its Linear {name}, so an adapter there has no effect"
    if name == "c_attn" and is_linear(own("q_attn")):  # transformers' GPT-2 beside an encoder
        return f"is a cross-attention, whose {name} holds key and value alone, which is not supported"
    side_by_side = name in FUSED and not FUSED[name].by_head
    one_head_after_the_other = (
        own("multi_query") is False  # transformers' GPTBigCode
        or own("head_first")  # timm's AttentionCl
        or own("val_dim", absent=False) is not False  # timm's EfficientFormer and TinyViT
    )
    if side_by_side and one_head_after_the_other:
        return f"its Linear {name} holds query, key and value one head after the other, which is not supported"
    if any(isinstance(child, nn.MultiheadAttention) for child in block.children()):
        # transformers' Aria, in its cross-attention.
        return f"passes the output of {name} through a second projection, so its columns are not those of heads"
    if kind.__name__ == "ChannelAttention":
        # timm's DaViT: softmax(key^T value) query^T, whose query is what value is in attention.
        return f"in {kind.__name__} query, key and value do not have their usual roles, which is not supported"
    if any(each.__name__ == "EfficientAttentionMixin" for each in kind.__mro__):
        # transformers' Reformer: its layers compute their inputs again from their outputs, in a backward pass of their
        # own, which no shared tensor's gradient leaves.
        return "belongs to reversible layers (Reformer), through which an adapter would get no gradient"
    if is_linear(own(f"{name}_global")):
        # Longformer and LED: its global tokens use these instead, and in the last layer nothing else is read.
        return f"has a {name}_global beside {name}, which an adapter would leave out"
    return None


def _warn_of_skipped_layers(model: nn.Module, paths: Sequence[str]) -> None:
    # In each list of layers (the outermost one on a path), those without an attention block.
    blocks = {model.get_submodule(path) for path in paths}
    matches = (re.match(r"(?:(.*?)\.)?\d+(?:\.|$)", path) for path in paths)
    for path in dict.fromkeys(match[1] or "" for match in matches if match):
        layers = model.get_submodule(path)
        if not isinstance(layers, nn.ModuleList):
            continue
        own = set(layers)  # a layer that a list holds several times counts once
        if (count := sum(not blocks.isdisjoint(layer.modules()) for layer in own)) < len(own):
            warnings.warn(
                f"{type(model).__name__}: {count} of the {len(own)} layers of {path or 'the model'} have "
                f"attention projections; an adapter leaves the others alone",
                stacklevel=3,
            )


def _warn_of_falling_numbers(model: nn.Module, paths: Sequence[str]) -> None:
    # A saved adapter knows layers by their order alone. Of two models with the same numbered layers in different
    # orders, the numbers fall in at least one.
    latest: dict[str, str] = {}
    for path in paths:
        before = latest.setdefault(re.sub(r"\d+", "#", path), path)
        if _numbers(path) < _numbers(before):
            warnings.warn(
                f"{type(model).__name__}: has {path} after {before}, and an adapter counts layers in this order; once "
                f"saved, it is right only on models that register their layers in the same order",
                stacklevel=3,
            )
            return
        latest[re.sub(r"\d+", "#", path)] = path


def _numbers(path: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", path)]


def attribute_of(owner: object, name: str, path: str = "", absent: object = None) -> Any:
    """What a module of the user's, or its config, has under a name.

    Args:
        owner: the module or the config.
        name: the attribute's name.
        path: the module's path, for the message.
        absent: what is returned where there is no such attribute.

    Raises:
        TensLoRAError: if it has one that cannot be read, such as a setting of OmegaConf that is not filled in.
    """
    try:
        return getattr(owner, name, absent)
    except Exception as error:
        whose = "" if isinstance(owner, nn.Module) else " from its config"
        raise TensLoRAError(
            f"{path or type(owner).__name__}: {name} cannot be read{whose} ({line_with_kind(error)})"
        ) from error


def is_linear(module: object) -> bool:
    """Whether a module is a Linear layer or transformers' Conv1D. A quantised Linear may be one by its sizes alone.

    Args:
        module: any object.
    """
    sizes = all(isinstance(attribute_of(module, name), Integral) for name in ("in_features", "out_features"))
    return isinstance(module, nn.Module) and (sizes or is_conv1d(module))


@dataclass(frozen=True)
class _Sizes:
    """The sizes that have to be the same in all layers of a stage."""

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
    """The Linear that holds a matrix, the Linear's path, and the matrix's place in it (see `Columns`)."""

    path: str
    linear: nn.Module
    start: int = 0
    parts: int = 1


class _Layer(NamedTuple):
    """The number of a layer in the model, from 0, its sizes, and its matrices by name."""

    number: int
    sizes: _Sizes
    matrices: Mapping[str, _Matrix]


def _inspect_layer(
    model: nn.Module, index: int, path: str, block: nn.Module, names: tuple[str, ...], adapt: str
) -> _Layer:
    def path_of(name: str) -> str:
        return f"{path}.{name}".lstrip(".")

    heads = _head_count(path, block, model)
    d_head = attribute_of(block, "head_dim", path)
    qkv = ("query", "key", "value")
    if len(names) == 1:
        linear = getattr(block, names[0])
        d_in, outputs = features(linear)
        known = next(filter(_is_count, (attribute_of(block, name, path) for name in _KEY_HEAD_COUNTS)), None)
        kv_heads = heads if known is None else int(known)
        width = outputs // (heads + 2 * kv_heads)
        if outputs % (heads + 2 * kv_heads) or (_is_count(d_head) and d_head != width):
            raise TensLoRAError(
                f"{path_of(names[0])}: its {outputs} outputs do not divide into query, key and value of {heads} heads"
            )
        reads = [features(child)[0] for name, child in block.named_children() if name in OUTPUT and is_linear(child)]
        if known is None and not _is_count(d_head) and outputs not in [3 * each for each in (d_in, *reads)]:
            raise TensLoRAError(
                f"{path_of(names[0])}: has {d_in} inputs and {outputs} outputs, among which key and value may have "
                f"fewer heads than query; {type(block).__name__} needs an attribute num_key_value_heads or head_dim"
            )
        widths = [heads * width, kv_heads * width, kv_heads * width]
        parts = kv_heads if FUSED[names[0]].by_head else 1
        starts = accumulate((each // parts for each in widths[:2]), initial=0)
        matrices = {
            name: _Matrix(path_of(names[0]), linear, start, parts) for name, start in zip(qkv, starts, strict=True)
        }
    else:
        d_in, widths, matrices = features(getattr(block, names[0]))[0], [], {}
        for name, held in zip(names, (qkv[:1], qkv[1:]) if names == KEY_AND_VALUE else zip(qkv), strict=True):
            linear = getattr(block, name)
            width = features(linear)[1] // len(held)
            matrices |= {each: _Matrix(path_of(name), linear, start * width) for start, each in enumerate(held)}
            widths += [width] * len(held)
            if features(linear)[0] != d_in:
                raise TensLoRAError(
                    f"{path_of(name)}: has {features(linear)[0]} inputs, but {path_of(names[0])} has {d_in}; the "
                    f"projections of a layer must have the same number of inputs"
                )
        if _is_count(d_head) and widths[0] != heads * d_head:  # as in Qwen3-Next, where it holds a gate too
            raise TensLoRAError(
                f"{path_of(names[0])}: has {widths[0]} outputs, which are not {heads} heads of {d_head}; it must hold "
                f"queries and nothing else"
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
    return _Layer(index, _Sizes(heads, d_in, query, key, value, d_ff, gated), matrices)


def _head_count(path: str, block: nn.Module, model: nn.Module) -> int:
    path = path or type(block).__name__
    odd: list[str] = []  # names whose values are none for this block, such as a list of the stages' numbers
    for module, part in ((block, ""), (block, "config"), (model, "config")):
        owner = attribute_of(module, part, path) if part else module
        for name in _HEAD_COUNTS:
            count = owner.get(name) if isinstance(owner, dict) else attribute_of(owner, name, path)
            if _is_count(count):
                return int(count)
            if isinstance(count, (Integral, float, str, torch.Tensor, Sequence, Mapping)):
                odd.append(f"{path}: {name}={count!r} must be a whole number, and at least 1")
                if isinstance(count, (float, str, torch.Tensor)):
                    raise TensLoRAError(odd[-1])
    unknown = f"{path}: the number of heads is not known; expected an attribute {', '.join(_HEAD_COUNTS)}"
    raise TensLoRAError((*odd, unknown)[0])


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, Integral) and int(value) > 0


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
        if all(is_linear(modules.get(each)) for each in paths.values()):
            return {name: _Matrix(each, modules[each]) for name, each in paths.items()}
        tried.append("/".join(paths.values()))
    raise TensLoRAError(
        f"adapt={adapt}: {path}: its {' and '.join(names)} cannot be found; looked for {', '.join(tried)}"
    )


def _stage(sizes: _Sizes, layers: Sequence[_Layer], adapt: str) -> Stage:
    geometry = sizes.geometry(len(layers), adapt)
    return Stage(
        geometry, [target for index, layer in enumerate(layers) for target in _targets(index, layer, geometry)]
    )


def _targets(index: int, layer: _Layer, geometry: Geometry) -> Iterator[TargetLinear]:
    names = geometry.matrices
    widths = dict(zip(names, geometry.widths, strict=True))
    held: dict[str, list[str]] = {}  # by the path of a Linear, the matrices that it holds
    for name in names:
        held.setdefault(layer.matrices[name].path, []).append(name)
    query, key, value = (layer.matrices[name].path for name in _SAME_INPUT[0])
    same_input = (("query",), ("key", "value"), *_SAME_INPUT[1:]) if query != key == value else _SAME_INPUT
    for path, of_linear in held.items():
        first = layer.matrices[of_linear[0]]
        members = [name for name in next(group for group in same_input if of_linear[0] in group) if name in names]
        start = names.index(members[0])
        writes_to_stream = of_linear[0] in ("output", "down")
        columns = []
        for name in of_linear:
            width = features(first.linear)[1] if writes_to_stream else widths[name]
            parts = layer.matrices[name].parts
            columns.append(Columns(members.index(name), layer.matrices[name].start, width // parts, parts))
        group = range(start, start + len(members))
        yield TargetLinear(path, first.linear, index, layer.number, group, tuple(columns), writes_to_stream)


def _refuse_odd_weights(targets: Iterable[TargetLinear]) -> None:
    for target in targets:
        if not isinstance(attribute_of(target.linear, "weight", target.path), Tensor):
            raise TensLoRAError(
                f"{target.path}: {type(target.linear).__name__} holds its weight in another form than Linear, as some "
                f"quantised layers do, which is not supported"
            )
        if type(target.linear.weight).__name__ == "DTensor":
            raise TensLoRAError(
                f"{target.path}: its weight is divided among processes already (DTensor), as for tensor parallelism, "
                f"under which an adapter is not supported"
            )
        # A parametrized weight is computed anew whenever it is read, and what merge adds to it would be lost. Where
        # any other parameter has a parametrization, its removal would give the layer another class than its own.
        if is_parametrized(target.linear):
            names = " and ".join(cast(nn.ModuleDict, target.linear.parametrizations))
            raise TensLoRAError(
                f"{target.path}: its {names} has a parametrization, which cannot lie under an adapter; remove it first "
                f"(detach_tensors removes the updates of adapt_tensor)"
            )


def require_weights_of_their_own(stages: Sequence[Stage]) -> None:
    """Check that no weight would be adapted twice.

    Layers may be tied, or one feed-forward block may follow two attention blocks.

    Args:
        stages: the matrices to adapt.

    Raises:
        TensLoRAError: if two of their Linear layers share a weight.
    """
    owners: dict[int, TargetLinear] = {}
    for target in _in_order(stages):
        weight = target.linear.weight
        if weight is not target.linear.weight:  # it is computed at each read, and its memory is used again afterwards
            continue
        owner = owners.setdefault(id(weight), target)
        if owner is not target:
            where = "for two attention blocks" if owner.path == target.path else f"here and as {owner.path}"
            raise TensLoRAError(
                f"{target.path}: would be adapted twice, {where}, but a weight can take only one update; leave one of "
                f"the two out by adapt or, where whole layers share their weights, by exclude_modules in PEFT"
            )


def _in_order(stages: Sequence[Stage]) -> list[TargetLinear]:
    return sorted((target for stage in stages for target in stage.targets), key=lambda target: target.model_layer)
