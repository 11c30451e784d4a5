"""A device beside the CPU, for machines without one: its tensors are the CPU's, under another device's name.

torch keeps them apart as it keeps apart a GPU's: an operation on tensors of both devices fails. The numbers are the
CPU's own, so that a run on this device must end with the same bytes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

NAME = "gpu"

_CPU: dict[int, Tensor] = {}  # the tensor behind each of the device's, by the address of its storage
_LIBRARIES: list[Any] = []
_IN_BF16 = ("linear", "mm", "addmm", "bmm", "matmul", "conv2d", "scaled_dot_product_attention")


def register_device() -> None:
    """Add the device to torch. It stays until the process ends.

    Raises:
        ImportError: if torch is too old to have devices that are written in Python.
    """
    from torch.utils import backend_registration as registration

    class Module(registration._DummyBackendModule):
        def get_amp_supported_dtype(self) -> list[torch.dtype]:
            return [torch.bfloat16]

    try:
        registration._setup_privateuseone_for_python_backend(NAME, backend_module=Module())
    except AttributeError as error:
        raise ImportError(str(error)) from error
    _library("_", "PrivateUse1").fallback(_on_the_cpu, "PrivateUse1")
    own = _library("aten", "PrivateUse1")
    own.impl("convolution_overrideable", lambda *args: _on_the_cpu(torch.ops.aten.convolution.default, *args))
    own.impl("_fused_sdp_choice", lambda *_, **__: 0)  # attention in single steps
    _library("_", "AutocastPrivateUse1").fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    casts = _library("aten", "AutocastPrivateUse1")
    for name in _IN_BF16:
        casts.impl(name, _in_bf16(getattr(torch.ops.aten, name).default))


def _library(namespace: str, key: str) -> Any:
    library: Any = torch.library.Library
    _LIBRARIES.append(library(namespace, "IMPL", key))  # what it registers lasts as long as the object
    return _LIBRARIES[-1]


def _in_bf16(operation: Any) -> Any:
    keys: Any = torch._C.DispatchKey

    def kernel(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(keys.AutocastPrivateUse1)):
            given = [x.to(torch.bfloat16) if _is_own(x) and x.is_floating_point() else x for x in args]
            return operation(*given, **kwargs)

    return kernel


def _on_the_cpu(operation: Any, *args: Any, **kwargs: Any) -> Any:
    """Carry out any operation of torch on the tensors behind those of the device."""
    name = operation._schema.name
    flat, form = _pytree.tree_flatten((args, kwargs))
    if any(map(_is_own, flat)) and name not in ("aten::copy_", "aten::_copy_from"):
        for value in flat:
            if isinstance(value, Tensor) and not _is_own(value) and value.dim():
                raise RuntimeError(f"{name}: one tensor is on {NAME}, another on {value.device}")
    behind = [torch.device("cpu") if isinstance(value, torch.device) else _behind(value) for value in flat]
    given, named = _pytree.tree_unflatten(behind, form)
    if name == "aten::_copy_from":
        given[1].copy_(given[0])
        return args[1]
    if name == "aten::as_strided":
        offset = given[3] if len(given) > 3 and given[3] is not None else args[0].storage_offset()
        given = (*given[:3], offset - args[0].storage_offset() + given[0].storage_offset())
    result = operation(*given, **named)
    known = {id(inner): outer for inner, outer in zip(behind, flat, strict=True) if isinstance(inner, Tensor)}
    to_cpu = kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cpu"

    def on_the_device(value: Any) -> Any:
        if not isinstance(value, Tensor) or to_cpu:
            return value
        return known[id(value)] if id(value) in known else _wrapped(value)

    return _pytree.tree_map(on_the_device, result)


def _is_own(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == NAME


def _wrapped(tensor: Tensor) -> Tensor:
    """A tensor of the device for one of the CPU's, with the same sizes and strides."""
    own: Tensor = torch._C._acc.create_empty_tensor(tuple(tensor.shape), tensor.dtype)
    if not tensor.is_contiguous():
        keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
        own = torch.ops.aten._reshape_alias.default.redispatch(keys, own, tuple(tensor.shape), tensor.stride())
    _CPU[own.untyped_storage()._cdata] = tensor
    return own


def _behind(value: Any) -> Any:
    if not _is_own(value):
        return value
    tensor = _CPU[value.untyped_storage()._cdata]
    if (tensor.shape, tensor.stride()) == (value.shape, value.stride()):
        return tensor
    return tensor.as_strided(value.shape, value.stride(), tensor.storage_offset() + value.storage_offset())
