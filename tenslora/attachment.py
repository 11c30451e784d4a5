"""Puts an adapter on a model and takes it off again.

Each Linear layer that holds adapted matrices becomes an `AdaptedLinear`. It stays the same object with the same
weights, so the names in the model's state dict stay as they were. The adapter becomes ``model.tenslora``.
"""

from __future__ import annotations

import copy
import threading
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from difflib import get_close_matches
from functools import partial
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from tenslora.adapted_linear import (
    AdaptedLinear,
    LayerUpdate,
    SharedInput,
    adapted_class,
    computes_as_linear,
    has_our_class,
    put_on,
    take_off,
)
from tenslora.adapter import Adapter, StagedAdapter, make_adapter
from tenslora.adapter_config import AdapterConfig
from tenslora.errors import TensLoRAError, first_line, require_type
from tenslora.forward_pass import ForwardPass, listed
from tenslora.projections import (
    Stage,
    attribute_of,
    features,
    find_projections,
    is_conv1d,
    is_plain,
    path_of_tuner_layer,
)
from tenslora.thin_products import MatrixGroup, without_autocast

if TYPE_CHECKING:
    from tenslora.peft.quantised import QuantisedWeights

SUBMODULE = "tenslora"
"""The name of the adapter in the model."""

_MODELS: weakref.WeakKeyDictionary[nn.Module, weakref.ref[nn.Module]] = weakref.WeakKeyDictionary()
"""The model that each adapter was last attached to. Kept in the adapter, this would have to be pickled with it."""


def attach(
    model: nn.Module, adapter: AdapterConfig | Adapter | StagedAdapter, train: Sequence[str] = ()
) -> Adapter | StagedAdapter:
    """Freeze `model`, except for the modules to train, and put an adapter on its attention projections.

    The model's outputs do not change until the adapter is trained. A warning tells of weights that were trained beside
    an existing adapter and are frozen now, because `train` does not name their modules.

    >>> from tenslora import AdapterConfig, attach
    >>> from torch import nn
    >>> class Attention(nn.Module):
    ...     num_heads = 4
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.query, self.key, self.value = (nn.Linear(64, 64) for _ in range(3))
    >>> model = nn.ModuleList([Attention(), Attention()])
    >>> adapter = attach(model, AdapterConfig("qkv_depth"))
    >>> sum(p.numel() for p in model.parameters() if p.requires_grad)
    3093

    Args:
        model: any Transformer in which `find_projections` finds the matrices to adapt. The model is changed in place,
            and all its parameters are frozen except for those of `train` and of updates of `adapt_tensor`.
        adapter: the settings of a new adapter, or an existing adapter, such as `load_adapter` returns.
        train: the modules that are trained too, such as a new head: ["classifier"]. Like PEFT's modules_to_save, a
            name stands for every module whose path is that name or ends with it.

    Returns:
        The adapter, on the model's device; it is also ``model.tenslora``. It is a `StagedAdapter` if the model's
        layers come in several sizes.

    Raises:
        TensLoRAError: if the model or a part of it has an adapter already, if the matrices to adapt or a module to
            train are not found, or if the adapter is for other dimensions; the message says which ones differ.
            Likewise if an existing adapter is on another model, or if it or the model is on the device meta.
    """
    require_type("model", model, nn.Module)
    if not issubclass(type(model), nn.Module):  # which says that its class is the model's
        raise TensLoRAError(f"model: is a {type(model).__name__}, which stands for a model; give the model itself")
    require_type("adapter", adapter, AdapterConfig, Adapter, StagedAdapter)
    from tenslora.tensor_update import TensorUpdate  # which imports this module

    stages, trained = stages_to_adapt(model, adapter), modules_named(model, train)
    ids = {id(parameter) for module in trained for parameter in module.parameters()}
    before = () if isinstance(adapter, AdapterConfig) else {uncompiled(name) for name in adapter.trained_beside}
    left_out = sorted(
        name for name, own in model.named_parameters() if uncompiled(name) in before and id(own) not in ids
    )
    if left_out:
        warnings.warn(
            f"{listed(left_out)}: trained beside this adapter before, and frozen now; train=[...] names what is to be "
            f"trained",
            stacklevel=2,
        )
    updates = [module for module in model.modules() if isinstance(module, TensorUpdate)]
    of_updates = [parameter for update in updates for parameter in update.parameters() if parameter.requires_grad]
    # An adapter may be kept in the model itself, as in a list of several.
    in_model = {id(parameter) for parameter in model.parameters()}
    kept = () if isinstance(adapter, AdapterConfig) else [own for own in adapter.parameters() if id(own) in in_model]
    if isinstance(adapter, AdapterConfig):
        with torch.device("cpu"):  # where the random streams are, whatever the default device is
            adapter = make_adapter(adapter, [stage.geometry for stage in stages])
    with undone_on_error(model):
        model.requires_grad_(False)
        for parameter in (*(own for module in trained for own in module.parameters()), *of_updates, *kept):
            parameter.requires_grad_(is_trainable(parameter))
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.grad = None  # an optimizer of all parameters would move it by an old gradient
        keep_gradients(model)
        for of_stage, (_, targets) in zip(adapter.stages, stages, strict=True):
            of_stage.to(device_of(targets[0].linear))
        adapter.train(model.training)
        forward_pass = ForwardPass(model)
        forward_pass.watched = SUBMODULE, adapter
        _watch_loading(model, forward_pass)
        for path, update in layer_updates(adapter, stages, forward_pass).items():
            put_on(model.get_submodule(path), update)
        adapter.trained_beside = frozenset(name for name, own in model.named_parameters() if id(own) in ids)
        model.add_module(SUBMODULE, adapter)
        forward_pass.put_hooks(model)
        _MODELS[adapter] = weakref.ref(model)
    return adapter


@contextmanager
def undone_on_error(model: nn.Module) -> Iterator[None]:
    """A context in which an adapter is put on a model. After an error in it, or Ctrl-C, the model is as it was.

    Args:
        model: without an adapter. What is written into its weights is not undone.
    """
    with _gradients_back_on_error(model):
        try:
            yield
        except BaseException:
            _take_off(model)
            raise


@contextmanager
def _gradients_back_on_error(model: nn.Module) -> Iterator[None]:
    # After an error the model's parameters require what they did before, and have the gradients that they had.
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        for parameter, was_required, gradient in before:
            parameter.requires_grad = was_required  # requires_grad_ refuses a parameter that has no size yet
            parameter.grad = gradient
        raise


def stages_to_adapt(model: nn.Module, adapter: AdapterConfig | Adapter | StagedAdapter) -> list[Stage]:
    """The stages of a model that an adapter can be attached to. Nothing is changed.

    Args:
        model: as for `attach`.
        adapter: as for `attach`.

    Raises:
        TensLoRAError: if the adapter cannot be attached to the model, see `attach`.
    """
    if (found := attribute_of(model, SUBMODULE, absent=False)) is not False:
        if not isinstance(found, (Adapter, StagedAdapter)):
            raise TensLoRAError(
                f"{type(model).__name__}: has something else under the name {SUBMODULE}, which is the adapter's"
            )
        raise TensLoRAError(
            f"{type(model).__name__}: has an adapter already; detach it first, or give it other numbers with "
            f"model.{SUBMODULE}.load_state_dict"
        )
    if held := next(iter(_adapted_linears(model)), None):
        holder = next((path for path, module in model.named_modules() if SUBMODULE in module._modules), "")
        of = f" ({holder})" if holder else ""
        raise TensLoRAError(f"{held}: has an adapter already; detach it first from the model that holds it{of}")
    stages = find_projections(model, adapter.adapt if isinstance(adapter, AdapterConfig) else adapter.config.adapt)
    require_no_other_adapter(stages)
    for target in (target for stage in stages for target in stage.targets):
        try:
            adapted_class(type(target.linear))
        except TensLoRAError as error:
            raise TensLoRAError(f"{target.path}: {error}") from error
    if isinstance(adapter, AdapterConfig):
        return stages
    other = _MODELS[adapter]() if adapter in _MODELS else None
    if other is not None and other._modules.get(SUBMODULE) is adapter:
        raise TensLoRAError(
            f"the adapter is on another model ({type(other).__name__}); detach it there first, or attach a "
            f"copy.deepcopy of it"
        )
    if any(device_of(target.linear).type == "meta" for stage in stages for target in stage.targets):
        raise TensLoRAError(
            f"{type(model).__name__}: is on the device meta, where the adapter's numbers would be lost; give the model "
            f"its weights first"
        )
    if any(parameter.is_meta for parameter in adapter.parameters()):
        raise TensLoRAError("the adapter is on the device meta and has no numbers; load or make it on another device")
    if differing := _differences(adapter, stages):
        raise TensLoRAError(f"the adapter does not fit {type(model).__name__}: {'; '.join(differing)}")
    return stages


def require_no_other_adapter(stages: Sequence[Stage]) -> None:
    """Check that no layer that is to be adapted has an adapter.

    Args:
        stages: the stages with the Linear layers that hold the matrices, from `find_projections`.

    Raises:
        TensLoRAError: if one is a layer of PEFT, or has an adapter of `attach`.
    """
    for target in (target for stage in stages for target in stage.targets):
        if hasattr(target.linear, "get_base_layer"):
            raise TensLoRAError(
                f"{target.path}: is a layer of another adapter ({type(target.linear).__name__} of PEFT), which would "
                f"take this one along when it is merged; take that off first with merge_and_unload or unload of the "
                f"PeftModel that it was made with, or make the model anew (delete_adapter leaves the layer)"
            )
        if isinstance(target.linear, AdaptedLinear):
            raise TensLoRAError(f"{target.path}: has an adapter already; detach it first from the model that holds it")


def _differences(adapter: Adapter | StagedAdapter, stages: Sequence[Stage]) -> list[str]:
    if len(adapter.stages) != len(stages):
        return [f"the number of stages is {len(adapter.stages)} in the adapter and {len(stages)} in the backbone"]
    return [
        f"{name}{f' of stage {index}' if len(stages) > 1 else ''} is {value} in the adapter and "
        f"{getattr(geometry, name)} in the backbone"
        for index, (of_stage, (geometry, _)) in enumerate(zip(adapter.stages, stages, strict=True))
        for name, value in vars(of_stage.geometry).items()
        if value != getattr(geometry, name)
    ]


def device_of(linear: nn.Module) -> torch.device:
    """The device on which a layer computes.

    Args:
        linear: the layer. Between two calls, accelerate may keep its weight elsewhere, in memory or on disk; the weight
            is then on the device meta.
    """
    device = cast(Tensor, linear.weight).device
    hook = getattr(linear, "_hf_hook", None)
    for each in getattr(hook, "hooks", [hook]) if device.type == "meta" else ():
        if getattr(each, "offload", False) and each.execution_device is not None:
            return torch.device(each.execution_device)
    return device


def keep_gradients(model: nn.Module) -> None:
    """Let gradients pass through bitsandbytes' 4-bit layers on every CPU, and warn of weights that pass none on.

    On a CPU with the instructions AVX512-BF16, such a layer rearranges its weight when it is first called in evaluation
    mode. From then on its input gets no gradient, in training mode either, and an adapter in an earlier layer would
    not be trained. (Seen with bitsandbytes 0.50.2.) What the arrangement has rounded stays rounded: the scales of the
    weights, to bfloat16.

    Args:
        model: the model. The arrangement of its 4-bit weights is undone and not made again.
    """
    for module in model.modules():
        if attribute_of(module, "support_avx512bf16_for_cpu"):
            module.state_dict()  # undoes the arrangement
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    _warn_of_lost_gradients(model)


def _warn_of_lost_gradients(model: nn.Module) -> None:
    # torchao's weights that quantise their input too have no derivative. One weight of each type is tried.
    kinds: dict[type, tuple[str, nn.Module]] = {}
    for path, module in model.named_modules():
        forward = getattr(type(module), "forward", None)  # a scripted module's class cannot tell it
        if forward is nn.Linear.forward and type(module.weight) not in (nn.Parameter, Tensor):
            kinds.setdefault(type(module.weight), (path, module))
    for kind, (path, linear) in kinds.items():
        weight = cast(Tensor, linear.weight)
        if weight.is_meta or torch.is_inference_mode_enabled():
            continue
        try:
            with torch.enable_grad():
                x = torch.zeros(1, features(linear)[0], dtype=weight.dtype, device=weight.device, requires_grad=True)
                passes_on = torch.nn.functional.linear(x, weight).requires_grad
        except Exception:  # of a kind that computes in some other way
            continue
        if not passes_on:
            warnings.warn(
                f"{path}: its weight ({kind.__name__}, which quantises its input too) passes no gradient on, so that "
                f"an adapter on this layer or an earlier one may not be trained; quantise the weights alone to train",
                stacklevel=3,
            )


def layer_updates(
    adapter: Adapter | StagedAdapter, stages: Sequence[Stage], forward_pass: ForwardPass
) -> dict[str, LayerUpdate]:
    """Divide an adapter into the updates of the Linear layers.

    Args:
        adapter: the adapter, whose geometries are those of the stages.
        stages: the stages with the Linear layers that hold the matrices, from `find_projections`.
        forward_pass: the model's forward pass.

    Returns:
        The updates by the paths of the Linear layers.
    """
    updates = {}
    for index, (of_stage, (geometry, targets)) in enumerate(zip(adapter.stages, stages, strict=True)):
        groups: dict[tuple[range, int], MatrixGroup] = {}
        shared: dict[tuple[int, range], SharedInput] = {}
        for target in targets:
            group, held = target.group, sum(columns.parts * columns.width for columns in target.columns)
            fused = len(target.columns) == len(group) and features(target.linear)[1] == held
            parts = target.columns[0].parts if fused else 0
            if (group, parts) not in groups:  # some layers may hold in one Linear what others hold in several
                groups[group, parts] = MatrixGroup(of_stage, group, target.writes_to_stream, parts, forward_pass, index)
            own = shared.setdefault((target.layer, group), SharedInput(groups[group, parts], target.layer))
            names = [geometry.matrices[group[columns.matrix]] for columns in target.columns]
            call = forward_pass.layer(target.path, names)
            updates[target.path] = LayerUpdate(target.linear, own, target.columns, call)
    return updates


def detach(model: nn.Module) -> Adapter | StagedAdapter:
    """Take the adapter off, so that the model has its own modules again.

    A merged update stays in the weights. Modules that were trained beside the adapter, such as a head, keep what they
    have learned. Frozen parameters stay frozen, and trainable ones stay trainable.

    Args:
        model: with an adapter; it is changed in place.

    Returns:
        The adapter.

    Raises:
        TensLoRAError: if there is no adapter, or if a layer has been given a further class since, as torch's
            parametrizations and fully_shard do.
    """
    adapter = adapter_of(model)
    for path, linear in _adapted_linears(model).items():
        if not has_our_class(linear):
            raise TensLoRAError(
                f"{path}: has become a {type(linear).__name__} under the adapter; undo that before you detach"
            )
    _take_off(model)
    return adapter


@contextmanager
def handed_over(model: nn.Module) -> Iterator[Adapter | StagedAdapter]:
    """A context in which PEFT puts its own layers in the adapter's place.

    After an error in it, PEFT's layers are off and the adapter is back.

    Args:
        model: with an adapter, which is taken off and given to the context.
    """
    adapted = [(linear, linear.layer_update) for linear in _adapted_linears(model).values()]
    passes, children = list(_forward_passes(not_compiled(model)).values()), dict(model._modules)
    with _gradients_back_on_error(model):
        adapter = detach(model)
        try:
            with peft_undone_on_error(model):
                yield adapter
        except BaseException:
            # The same updates on the same layers: attach would look for layers anew, and may find others by now.
            for linear, update in adapted:
                put_on(linear, update)
            model._modules.clear()
            model._modules.update(children)
            for forward_pass in passes:
                forward_pass.put_hooks(model)
                _watch_loading(model, forward_pass)
            raise


@contextmanager
def peft_undone_on_error(model: nn.Module) -> Iterator[None]:
    """A context in which PEFT puts its layers on a model. After an error in it, they are off again.

    Args:
        model: without an adapter of this library. It may have one of another method of PEFT.
    """
    modules = [(path, part) for path, part in model.named_modules(remove_duplicate=False) if path]
    passes, settings = _hooked_passes(model), getattr(model, "peft_config", None)
    before = dict(settings or {})
    with _gradients_back_on_error(model):
        try:
            yield
        except BaseException:
            for forward_pass in _hooked_passes(model) - passes:
                forward_pass.remove_hooks()
            for path, part in modules:  # a part before its own parts
                if model.get_submodule(path) is not part:
                    model.set_submodule(path, part)
                vars(part).pop("has_tenslora_adapter", None)
            if settings is None:
                vars(model).pop("peft_config", None)
            else:  # into which PEFT writes those of every method
                settings.clear()
                settings.update(before)
            raise


def _hooked_passes(model: nn.Module) -> set[ForwardPass]:
    owners = (getattr(hook, "__self__", None) for hook in model._forward_pre_hooks.values())
    return {owner for owner in owners if isinstance(owner, ForwardPass)}


@contextmanager
def not_compiled_anywhere(model: nn.Module) -> Iterator[nn.Module]:
    """A context in which PEFT gets a model without torch.compile's wrappers, whose names it would save.

    A warning tells of the wrappers. After an error in it, the parts of the model are wrapped as before.

    Args:
        model: compiled as a whole, in parts or not at all. It is changed in place.

    Returns:
        The model itself.
    """
    require_type("model", model, nn.Module)
    own = _innermost(model)
    wrapped = [
        (path, part)
        for path, part in own.named_modules(remove_duplicate=False)
        if _innermost(part) is not part and path.rpartition(".")[2] != "_orig_mod"
    ]
    if wrapped or own is not model:
        warnings.warn(
            f"{type(own).__name__}: is compiled, as a whole or in parts, and PEFT gets it without torch.compile's "
            f"wrappers, whose names it would save; compile the PEFT model instead",
            stacklevel=4,
        )
    try:
        for path, part in reversed(wrapped):  # a part of a part first
            own.set_submodule(path, _innermost(part))
        yield own
    except BaseException:
        for path, part in wrapped:
            own.set_submodule(path, part)
        raise


def _innermost(model: nn.Module) -> nn.Module:
    while (inner := not_compiled(model)) is not model:
        model = inner
    return model


def _take_off(model: nn.Module) -> None:
    for linear in _adapted_linears(model).values():
        take_off(linear)
    own = not_compiled(model)
    for key, forward_pass in _forward_passes(own).items():
        forward_pass.remove_hooks()
        del own._load_state_dict_post_hooks[key]
    for each in (own, model):
        each._modules.pop(SUBMODULE, None)


def merge(model: nn.Module) -> None:
    """Add the updates to the weights, W <- W + alpha dW^T. A forward pass then costs as much as without an adapter.

    A merged adapter gets no gradients: `unmerge` before you train on. Merging a second time changes nothing, even if
    the adapter has changed in between: `unmerge` first, which takes out what was added. If load_state_dict is to give a
    merged model weights, they must be those of a merged model too, and the other way round. A state dict of torch knows
    which ones it holds, and is refused otherwise.

    Quantised weights are dequantised and quantised again, by PEFT's functions for bitsandbytes and torchao; a warning
    says by how much the rounding changes them.

    Args:
        model: with an adapter; its weights are changed in place.

    Raises:
        TensLoRAError: if there is no adapter, if it is `disabled`, if it or a weight with its update would hold a NaN
            or an infinity, if another module uses the same weight, if a weight is of a kind that cannot be quantised
            again, or if ``model.tenslora`` or an adapted layer was replaced. No weight is changed then.
    """
    _move_updates(model, into_weights=True)


def unmerge(model: nn.Module) -> None:
    """Subtract from the weights what `merge` added. They are then as before the merge, up to rounding.

    An adapter that was changed while it was merged keeps its new numbers. If nothing is merged, a warning says so: what
    an adapter had added before `detach` is not known any more.

    Args:
        model: with an adapter; its weights are changed in place.

    Raises:
        TensLoRAError: if there is no adapter.
    """
    adapter_of(model)
    if not any(linear.layer_update.merged for linear in _adapted_linears(model).values()):
        warnings.warn(f"{type(model).__name__}: no update of its adapter is merged; unmerge does nothing", stacklevel=2)
    _move_updates(model, into_weights=False)


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """A context in which the model computes what the backbone alone computes, like PEFT's `disable_adapter`.

    Updates of `adapt_tensor` stay on. The context holds in all threads. Where several such contexts overlap, the
    adapter is back when the last of them has been left.

    Args:
        model: with an adapter.

    Raises:
        TensLoRAError: if there is no adapter, or if the adapter is merged: an update in the weights cannot be left out.
            Likewise `merge` in this context.
    """
    updates = list(updates_of(model).values())
    _count_disabled(updates, 1)
    try:
        yield
    finally:
        _count_disabled(updates, -1)


_COUNTING = threading.Lock()


def _count_disabled(updates: Sequence[LayerUpdate], change: int) -> None:
    with _COUNTING:
        for update in updates:
            update.disabled += change


def adapter_of(model: nn.Module) -> Adapter | StagedAdapter:
    """The adapter on a model.

    Args:
        model: with an adapter.

    Returns:
        The adapter, which is also ``model.tenslora``.

    Raises:
        TensLoRAError: if there is no adapter, or if the model is a wrapper around the one that has it.
    """
    require_type("model", model, nn.Module)
    adapter = not_compiled(model)._modules.get(SUBMODULE)
    if isinstance(adapter, (Adapter, StagedAdapter)):
        return adapter
    if adapter is not None:
        raise TensLoRAError(
            f"{type(model).__name__}: what it holds under the name {SUBMODULE} is no adapter of this import of the "
            f"package; restart a notebook that has imported it anew"
        )
    if isinstance(attribute_of(model, SUBMODULE), (Adapter, StagedAdapter)):
        raise TensLoRAError(
            f"{type(model).__name__}: passes on the attributes of the model that has the adapter; call this on that "
            f"model"
        )
    if path := path_of_tuner_layer(model):
        raise TensLoRAError(
            f"{type(model).__name__}: has its adapter in PEFT ({path}), where the methods of the PeftModel that it was "
            f"made with are used, such as merge_adapter, save_pretrained, disable_adapter and unload"
        )
    parts = [path for path, module in model.named_modules() if module._modules.get(SUBMODULE) is not None]
    hint = f"; call this on a part that has one: {listed(parts)}" if parts else ""
    if not parts and _adapted_linears(model):
        hint = f", but its layers have; call this on the model that they belong to, whose {SUBMODULE} must be in place"
    if isinstance(model, (Adapter, StagedAdapter)):
        hint = ", because it is one; call this on the model that it is attached to"
    raise TensLoRAError(f"{type(model).__name__}: has no adapter{hint}")


def updates_of(model: nn.Module) -> dict[str, LayerUpdate]:
    """The updates of a model's Linear layers.

    Args:
        model: with an adapter.

    Returns:
        The updates by the layers' paths in the model.

    Raises:
        TensLoRAError: if there is no adapter, if the adapter is merged, or if an adapted layer was replaced.
    """
    require_all_layers(model)
    updates = {path: linear.layer_update for path, linear in _adapted_linears(model).items()}
    if any(update.merged for update in updates.values()):
        raise TensLoRAError(f"{type(model).__name__}: its adapter is merged; unmerge it first")
    return updates


def require_own_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Check that weights are used where an update is to be added to them, and nowhere else.

    Args:
        model: the whole model.
        weights: the weights, by the paths of the modules that hold them or by their own.

    Raises:
        TensLoRAError: if two modules of the model share one of the weights, as an embedding and a head may do.
    """
    held = [(path, own) for path, module in model.named_modules() for own in module.parameters(recurse=False)]
    starts, stops = torch.tensor([_memory(own) for _, own in held], dtype=torch.int64, device="cpu").T
    same: dict[int, list[int]] = {}
    for index, (_, own) in enumerate(held):
        same.setdefault(id(own), []).append(index)
    for path, weight in weights.items():
        first, last = _memory(weight)
        near = [(index, held[index][1]) for index in ((starts < last) & (stops > first)).nonzero().flatten().tolist()]
        overlapping = [
            index
            for index, own in near
            if own is not weight and own.device == weight.device and _have_common_entries(own, weight)
        ]
        sharing = [held[index][0] for index in sorted(same.get(id(weight), []) + overlapping)]
        if len(sharing) > 1:
            raise TensLoRAError(
                f"{path}: its weight is shared by {' and '.join(sharing)}, and a merge would change each of them; "
                f"leave the update unmerged, or give each a weight of its own"
            )


def _memory(weight: Tensor) -> tuple[int, int]:
    # The addresses that a weight takes up; (0, 0) if it has none of its own kind, as on the device meta.
    if type(weight) not in (nn.Parameter, Tensor) or weight.layout is not torch.strided or not weight.data_ptr():
        return 0, 0
    last = sum((size - 1) * step for size, step in zip(weight.shape, weight.stride(), strict=True))
    return weight.data_ptr(), weight.data_ptr() + (last + 1) * weight.element_size()


def _have_common_entries(one: Tensor, other: Tensor) -> bool:
    # Of two weights whose addresses overlap; those of one may lie between those of the other, as two blocks of columns.
    size, first = one.element_size(), min(one.data_ptr(), other.data_ptr())
    places = [(each.data_ptr() - first) // size for each in (one, other)]
    if other.element_size() != size or (one.data_ptr() - other.data_ptr()) % size:
        return True
    taken = torch.zeros((max(_memory(one)[1], _memory(other)[1]) - first) // size, dtype=torch.bool)
    taken.as_strided(one.shape, one.stride(), places[0]).fill_(True)
    return bool(taken.as_strided(other.shape, other.stride(), places[1]).any())


def require_own_layers(model: nn.Module) -> None:
    """Check that a model's adapted layers are those of its own adapter, and that none of them is missing.

    Args:
        model: with an adapter.

    Raises:
        TensLoRAError: if one of them is a copy, which has an adapter of its own that is neither trained nor saved, if
            one was replaced, or if they are in another order now.
    """
    require_all_layers(model)
    require_no_copies(model)
    require_in_order({path: linear.layer_update for path, linear in _adapted_linears(model).items()})


def require_no_copies(model: nn.Module) -> None:
    """Check that a model's adapted layers are those of its own adapter.

    Args:
        model: with an adapter.

    Raises:
        TensLoRAError: if one of them is a copy, which has an adapter of its own that is neither trained nor saved.
    """
    stages = adapter_of(model).stages
    for path, linear in _adapted_linears(model).items():
        if not any(linear.layer_update.shared.group.adapter is stage for stage in stages):
            raise TensLoRAError(
                f"{path}: is a copy of an adapted layer, and its update does not belong to the model's adapter; copy a "
                f"part of a model before you attach, or after merge and detach"
            )


def require_in_order(updates: Mapping[str, LayerUpdate]) -> None:
    """Check that adapted layers are in the order in which the adapter counts them.

    Args:
        updates: those of one adapter by the paths of their layers, in the order of the model's modules.

    Raises:
        TensLoRAError: if a layer stands behind one that it stood before.
    """
    latest: dict[tuple[int, int], int] = {}
    for path, update in updates.items():
        stage, first, *_ = update.shared.group.key
        for matrix in ((stage, first + columns.matrix) for columns in update.columns):
            if update.shared.layer < latest.get(matrix, 0):
                raise TensLoRAError(
                    f"{path}: was {update.call.path} when the adapter was put on, and its layer now comes after a "
                    f"later one; a saved adapter knows layers by their order alone, so put them back into it"
                )
            latest[matrix] = update.shared.layer


def missing_matrices(adapter: Adapter | StagedAdapter, updates: Iterable[LayerUpdate]) -> int:
    """How many of the matrices that an adapter is for are not in the model.

    Args:
        adapter: the adapter.
        updates: those that the model's layers have from it.
    """
    expected = sum(stage.geometry.layers * len(stage.geometry.matrices) for stage in adapter.stages)
    return expected - sum(len(update.columns) for update in updates)


def require_all_layers(model: nn.Module) -> None:
    """Check that none of the adapted layers was replaced.

    Args:
        model: with an adapter.

    Raises:
        TensLoRAError: if one is missing, if FullyShardedDataParallel has divided the adapter, or if the model holds
            another adapter than its layers use.
    """
    adapter = adapter_of(model)
    for forward_pass in _forward_passes(not_compiled(model)).values():
        forward_pass.require_own_adapter(not_compiled(model))
    if any(getattr(own, "_fsdp_flattened", False) and own.dim() < 2 for own in adapter.parameters()):
        raise TensLoRAError(
            f"{type(model).__name__}: its adapter is divided among processes; do this inside of "
            f"FullyShardedDataParallel.summon_full_params, or use fully_shard"
        )
    missing = missing_matrices(adapter, (linear.layer_update for linear in _adapted_linears(model).values()))
    if missing > 0:
        require_same_sizes(model)
        raise TensLoRAError(
            f"{type(model).__name__}: {missing} of the adapted matrices are no longer in the model, whose layers were "
            f"replaced after attach; attach(model, detach(model), train=...) puts the adapter on those that it has now"
        )


def require_same_sizes(model: nn.Module) -> None:
    """Check that a model has the layers that its adapter is for.

    Args:
        model: with an adapter.

    Raises:
        TensLoRAError: if layers were added or taken away, or got other sizes.
    """
    adapter = adapter_of(model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # attach has told of layers without attention
            stages = find_projections(not_compiled(model), adapter.config.adapt)
    except TensLoRAError:  # such as that for a model which is wrapped for several processes
        return
    if differing := _differences(adapter, stages):
        raise TensLoRAError(
            f"{type(model).__name__}: its layers have changed after attach, and the adapter does not fit them: "
            f"{'; '.join(differing)}; undo the change, or attach a new adapter"
        )


def require_stored_weight(path: str, linear: nn.Module) -> None:
    """Check that a layer's weight is a tensor of its own, in which an update would do what it does beside it.

    Args:
        path: what a message calls the layer.
        linear: the layer.

    Raises:
        TensLoRAError: if the weight is computed from other tensors, as after pruning, or if the layer's class computes
            with something else than its weight, such as a rounded or scaled one.
    """
    if linear.weight is not {**linear._parameters, **linear._buffers}.get("weight"):
        raise TensLoRAError(
            f"{path}: its weight is computed from other tensors, as after pruning or weight_norm, so a change of it "
            f"would be lost; make it a parameter again first (prune.remove, remove_weight_norm, "
            f"remove_parametrizations)"
        )
    if not _adds_its_weight(linear):
        raise TensLoRAError(
            f"{path}: a {getattr(linear, 'plain_class', type(linear)).__name__} does not multiply its input by its "
            f"weight alone, so an update in the weight would be another one; leave the adapter unmerged"
        )


def _adds_its_weight(linear: nn.Module) -> bool:
    # Whether a change D of the weight changes the output by x D^T, which a random D shows. Classes that round or scale
    # their weight in forward, as for 1-bit models, have plain weights all the same.
    kind: type[nn.Module] = getattr(linear, "plain_class", type(linear))
    if computes_as_linear(kind):
        return True
    weight, generator = cast(Tensor, linear.weight), torch.Generator().manual_seed(0)
    if weight.is_meta:
        return True
    x = torch.randn(4, features(linear)[0], generator=generator).to(weight.device)
    size = float(weight.float().abs().mean()) or 1.0
    change = torch.randn(weight.shape, generator=generator).mul(size).to(weight.device)
    try:
        with without_autocast(weight.device):
            before = kind.forward(_plain_copy(linear, kind), x)
            changed = _plain_copy(linear, kind)
            cast(Tensor, changed.weight).data.add_(change)
            moved = kind.forward(changed, x) - before
    except Exception:  # it takes more than an input, or another one
        return True
    wanted = x @ (change if is_conv1d(linear) else change.T)
    return moved.shape == wanted.shape and bool((moved - wanted).abs().max() <= 1e-3 * wanted.abs().max())


def _plain_copy(linear: nn.Module, kind: type[nn.Module]) -> nn.Module:
    # A layer of the plain class in float32 and evaluation mode, with tensors of its own.
    copied = kind.__new__(kind)
    vars(copied).update(vars(linear))
    for held in ("_parameters", "_buffers", "_modules"):
        vars(copied)[held] = copy.deepcopy(vars(linear)[held])
    return copied.float().eval()


def require_finite_sum(path: str, weight: Tensor, update: Tensor) -> None:
    """Check that an update can be added to a weight and be taken out again.

    Args:
        path: what a message calls the weight.
        weight: the weight.
        update: the update, of the weight's shape.

    Raises:
        TensLoRAError: if the sum holds a NaN or an infinity in the weight's own type, if the shapes differ, or if torch
            does not allow the weight to change. Likewise if the update is on the device meta, and the weight is not.
    """
    require_changeable(path, weight)
    if update.is_meta and not weight.is_meta:
        raise TensLoRAError(
            f"{path}: its update is on the device meta and has no numbers; give it those of a state dict"
        )
    if weight.shape != update.shape:
        raise TensLoRAError(
            f"{path}: its weight has the shape {tuple(weight.shape)}, and its update {tuple(update.shape)}; change the "
            f"size of a layer before you attach"
        )
    if not is_finite(weight + update.to(weight)):
        raise TensLoRAError(
            f"{path}: its weight would hold a NaN or an infinity in {str(weight.dtype).removeprefix('torch.')} with "
            f"its update, which no unmerge could take out again"
        )


def require_changeable(path: str, weight: Tensor) -> None:
    """Check that a weight may change here.

    Args:
        path: what a message calls the weight.
        weight: the weight.

    Raises:
        TensLoRAError: if it was made in torch.inference_mode, and this is outside, or if its entries share memory.
    """
    if weight.is_inference() and not torch.is_inference_mode_enabled():
        raise TensLoRAError(f"{path}: its weight was made in torch.inference_mode, outside of which it cannot change")
    if weight.layout is torch.strided and any(
        step == 0 and size > 1 for step, size in zip(weight.stride(), weight.shape, strict=True)
    ):
        raise TensLoRAError(
            f"{path}: some of its weight's entries share memory, as after expand, and cannot change alone; "
            f"give it a weight of its own (clone)"
        )


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither a NaN nor an infinity. One on the device meta holds no numbers at all.

    A NaN or an infinity times 0 is NaN, so the sum of these products is 0 only without them. A device that offers
    nothing but the operations of training can compute it.

    Args:
        tensor: any tensor of floating-point numbers.
    """
    return tensor.is_meta or float((tensor * 0).sum()) == 0


def is_trainable(parameter: Tensor) -> bool:
    """Whether a parameter can require gradients. One of whole numbers, such as a table of indices, cannot.

    Args:
        parameter: the parameter.
    """
    return parameter.is_floating_point() or parameter.is_complex()


def modules_named(model: nn.Module, names: Sequence[str], setting: str = "train") -> list[nn.Module]:
    """Find the modules that a setting names.

    Args:
        model: the model.
        names: the names. Each stands for every module whose path is that name or ends with it.
        setting: the setting, for the message.

    Raises:
        TensLoRAError: if a name is that of no module with parameters.
    """
    if isinstance(names, str):
        raise TensLoRAError(f"{setting}={names}: must be a list of names, such as [{names!r}]")
    require_type(setting, names, Sequence, Set)
    for name in names:
        require_type(f"a name in {setting}", name, str)
    holders = {
        path: module
        for path, module in model.named_modules(remove_duplicate=False)
        if path and any(True for _ in module.parameters())
    }
    found = []
    for name in names:
        matching = [module for path, module in holders.items() if f".{path}".endswith(f".{name}")]
        if not matching:
            if parameter := next((path for path, _ in model.named_parameters() if f".{path}".endswith(f".{name}")), ""):
                switch = f"; model.get_parameter({parameter!r}).requires_grad_(True) after attach trains and saves it"
                raise TensLoRAError(
                    f"{setting}={name}: must be the name of a module, and is that of a parameter"
                    + (switch if setting == "train" else "")
                )
            last_words = dict.fromkeys(path.rpartition(".")[2] for path in holders)
            children = [path for path in holders if "." not in path]
            candidates = dict.fromkeys([*get_close_matches(name, list(last_words), n=3), *children])
            raise TensLoRAError(
                f"{setting}={name}: must be the name of a module with parameters in {type(model).__name__}, such as "
                f"{', '.join(candidates)}"
            )
        found += matching
    return list(dict.fromkeys(found))  # a module may have two names in the model


def require_apart(modules_to_save: Sequence[str], paths: Iterable[str], otherwise: str = "") -> None:
    """Check that modules which PEFT is to save hold no adapted layers, which it would copy without their updates.

    Args:
        modules_to_save: the modules' names, each for every module whose path ends so.
        paths: the paths of the adapted layers.
        otherwise: what else can be done than to name other modules.

    Raises:
        TensLoRAError: if one of them holds such a layer.
    """
    for path in paths:
        steps = path.split(".")
        for name in modules_to_save:
            if any(".".join(steps[:end]).endswith(name) for end in range(1, len(steps) + 1)):
                raise TensLoRAError(
                    f"modules_to_save={name}: holds {path}, which the adapter adapts; name other modules{otherwise}"
                )


def require_called(model: nn.Module, modules_to_save: Sequence[str]) -> None:
    """Check that PEFT can put itself around the modules that it is to save, of which a mere container is never called.

    Args:
        model: the model.
        modules_to_save: the modules' names, each for every module whose path ends so.

    Raises:
        TensLoRAError: if one of them is a container.
    """
    containers = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, containers) and any(path.endswith(name) for name in modules_to_save):
            parts = [name for name, part in module.named_children() if any(True for _ in part.parameters())]
            within = [f"{path}.{name}" for name in parts]
            instead = f"name what it holds instead: {listed(within)}" if within else "name the module that holds it"
            raise TensLoRAError(
                f"modules_to_save={path}: is a {type(module).__name__}, and PEFT saves only modules that the model "
                f"calls; {instead}"
            )


def require_savable(model: nn.Module, modules_to_save: Sequence[str]) -> None:
    """Check an adapter and the modules that PEFT is to save beside it. It warns of those that it would leave out.

    Args:
        model: with an adapter.
        modules_to_save: their names, see `modules_named`.

    Raises:
        TensLoRAError: if one is not found, if it holds adapted layers, if it is never called, or if it has a trained
            weight in common with a module that is not to be saved. Likewise if the adapter holds a NaN or an infinity.
    """
    modules = modules_named(model, modules_to_save, "modules_to_save")
    for name, parameter in adapter_of(model).named_parameters():
        if not is_finite(parameter.detach()):
            raise TensLoRAError(f"{SUBMODULE}.{name}: holds a NaN or an infinity, which PEFT would save")
    require_apart(modules_to_save, _adapted_linears(model))
    require_called(model, modules_to_save)
    _require_both_ends(model, modules)
    saved = {id(parameter) for module in modules for parameter in module.parameters()}
    left_out = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) not in saved and not name.startswith(f"{SUBMODULE}.")
    ]
    if left_out:
        warnings.warn(
            f"{type(model).__name__}: {listed(left_out)} are trained beside the adapter, and PEFT will freeze and not "
            f"save them; name their modules in modules_to_save",
            stacklevel=3,
        )


def _require_both_ends(model: nn.Module, modules: Sequence[nn.Module]) -> None:
    # PEFT copies a module that it saves, so that a weight which it shares with another one is no longer shared.
    saved = {id(part) for module in modules for part in module.modules()}
    holders: dict[nn.Parameter, dict[bool, str]] = {}
    for path, module in model.named_modules():
        for own in module.parameters(recurse=False):
            if own.requires_grad:
                holders.setdefault(own, {}).setdefault(id(module) in saved, path)
    for paths in holders.values():
        if len(paths) == 2:
            raise TensLoRAError(
                f"modules_to_save: {paths[True]} and {paths[False]} share a weight that is trained, and PEFT would "
                f"save it for {paths[True]} alone; name both"
            )


@torch.no_grad()
def _move_updates(model: nn.Module, into_weights: bool) -> None:
    for name, parameter in adapter_of(model).named_parameters():
        if into_weights and not is_finite(parameter):
            raise TensLoRAError(
                f"{SUBMODULE}.{name}: holds a NaN or an infinity, which no unmerge could take out again"
            )
    adapted = _adapted_linears(model)
    if into_weights:
        require_all_layers(model)
    to_move = {path: linear for path, linear in adapted.items() if linear.layer_update.merged != into_weights}
    if into_weights and any(linear.layer_update.disabled for linear in to_move.values()):
        raise TensLoRAError(f"{type(model).__name__}: its adapter is disabled; leave the context of disabled first")
    # Every layer is looked at before the first weight is changed.
    quantised = {path: _backend(path, linear, model) for path, linear in to_move.items() if not is_plain(linear)}
    for path, linear in to_move.items():
        if path not in quantised:
            require_stored_weight(path, linear)
        if linear.weight.is_meta and device_of(linear).type != "meta":
            raise TensLoRAError(
                f"{path}: accelerate keeps its weight elsewhere between two calls, so a change of it would be lost; "
                f"load the model without offloading first, or leave the adapter unmerged"
            )
    if into_weights:
        plain = {path: linear for path, linear in to_move.items() if path not in quantised}
        require_own_weights(model, {path: linear.weight for path, linear in plain.items()})
        for path, linear in plain.items():  # which makes each update twice, as all of them may not fit into memory
            require_finite_sum(path, linear.weight, linear.layer_update.dense())
        for path, backend in quantised.items():
            backend.require_finite_sum(path, to_move[path], to_move[path].layer_update.dense())
    changes = []
    copies = copied_adapters([linear.layer_update for linear in to_move.values()]) if into_weights else {}
    for path, linear in to_move.items():
        update = linear.layer_update.dense() if into_weights else -linear.layer_update.dense()
        if path in quantised:
            changes.append(quantised[path].add(linear, update))
        else:
            linear.weight.add_(update.to(linear.weight))
        linear.layer_update.added = (copies[id(linear.layer_update)],) if into_weights else ()
    if changes:
        from tenslora.peft.quantised import warn_of_rounding

        warn_of_rounding(model, changes)


def _backend(path: str, linear: AdaptedLinear, model: nn.Module) -> QuantisedWeights:
    try:
        from tenslora.peft.quantised import QuantisedWeights
    except ImportError as error:
        raise TensLoRAError(
            f"{path}: to merge into the weight of this {linear.plain_class.__name__} needs PEFT "
            f"(pip install 'peft>=0.21'); or leave the adapter unmerged"
        ) from error
    try:
        return QuantisedWeights(linear, model)
    except TensLoRAError as error:
        raise TensLoRAError(f"{path}: {error}") from error


def _watch_loading(model: nn.Module, forward_pass: ForwardPass) -> None:
    hook = partial(_hold_what_was_loaded, forward_pass)  # where _take_off finds it, whatever becomes of the layers
    model.register_load_state_dict_post_hook(hook)  # type: ignore[no-untyped-call]


def _hold_what_was_loaded(_: ForwardPass, model: nn.Module, __: object) -> None:
    # The weights were loaded before the adapter that they hold.
    updates = [linear.layer_update for linear in _adapted_linears(model).values() if linear.layer_update.loaded]
    copies = copied_adapters(updates)
    for update in updates:
        update.added, update.loaded = (copies[id(update)],), False


def _forward_passes(model: nn.Module) -> dict[int, ForwardPass]:
    # The forward pass of an adapted model, by the number of the hook that holds it.
    return {
        key: hook.args[0]
        for key, hook in model._load_state_dict_post_hooks.items()
        if isinstance(hook, partial) and hook.func is _hold_what_was_loaded
    }


def copied_adapters(updates: Sequence[LayerUpdate]) -> dict[int, Adapter]:
    """A copy of each update's adapter, by the id of the update; one copy for all layers of an adapter.

    Args:
        updates: the updates.

    Raises:
        TensLoRAError: if an adapter cannot be copied.
    """
    try:
        return copy.deepcopy({id(update): update.shared.group.adapter for update in updates})
    except Exception as error:
        raise TensLoRAError(
            f"the adapter cannot be copied ({first_line(error)}), as unmerge would need it; merge before you wrap the "
            f"model or the adapter"
        ) from error


def not_compiled(model: nn.Module) -> nn.Module:
    """The model itself, of a wrapper that torch.compile or accelerate's compile_regions has put around it.

    Args:
        model: any model.

    Returns:
        The wrapped model, with the weights' own names; any other model as it is.
    """
    for own in (model._modules.get("_orig_mod"), vars(model).get("_orig_mod")):
        if own is not None:  # a model's own __len__ or __bool__ may say that it is empty
            return own
    return model


def uncompiled(name: str) -> str:
    """The name that a module or a weight has without the wrappers that torch puts around parts of a model.

    These are the wrappers of torch.compile and of torch's activation checkpointing.

    Args:
        name: a path in the model.
    """
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")


def _adapted_linears(model: nn.Module) -> dict[str, AdaptedLinear]:
    return {path: module for path, module in model.named_modules() if isinstance(module, AdaptedLinear)}
