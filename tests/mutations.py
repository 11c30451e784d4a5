"""What may happen to a file: strategies that change JSON, bytes and tensors, for tests with Hypothesis."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import signal
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

_NUMBERS = st.one_of(
    st.integers(-3, 300), st.integers(-(2**70), 2**70), st.floats(width=64), st.sampled_from([1e308, -0.0, 10**400])
)
_TEXTS = st.one_of(
    st.text(max_size=8), st.sampled_from(["", "accuracy", "\ud800", "a\nb", "\x1b[2J", "../x", "0" * 99])
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), _NUMBERS, _TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(_TEXTS, inner, max_size=3)),
    max_leaves=4,
)
"""Any value that Python's json module reads, with NaN, infinities and lone surrogates."""

LIMIT = 10.0
"""How many seconds of the processor's time one example may take."""


@contextlib.contextmanager
def time_limit(seconds: float = LIMIT) -> Iterator[None]:
    """A context that raises a TimeoutError when it takes too much of the processor's time.

    Args:
        seconds: the processor's time that it may take. A busy machine takes longer by the clock.
    """

    def give_up(*_: object) -> None:
        raise TimeoutError(f"takes more than {seconds:g} seconds of the processor")

    before = signal.signal(signal.SIGPROF, give_up)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def json_like(original: Any) -> st.SearchStrategy[Any]:
    """Values that differ from a JSON value in one to three places: replaced, removed, added, or swapped.

    Args:
        original: the value.
    """

    @st.composite
    def changed(draw: st.DrawFn) -> Any:
        value = copy.deepcopy(original)
        for _ in range(draw(st.integers(1, 3))):
            places = list(_places(value))
            path = draw(st.sampled_from(places)) if places else ()
            value = _with(value, path, draw)
        return value

    return changed()


def as_bytes(value: Any) -> bytes:
    """A value as a JSON text, with NaN and infinities as Python's json module writes them."""
    return json.dumps(value).encode().replace(b"1e+308", b"1e999")


def damaged(original: bytes) -> st.SearchStrategy[bytes]:
    """Bytes that are cut off, have other bytes in a place, or lack some.

    Args:
        original: the bytes.
    """
    place = st.integers(0, len(original))

    def replaced(start: int, length: int, new: bytes) -> bytes:
        return original[:start] + new + original[start + length :]

    return st.one_of(
        place.map(lambda end: original[:end]),
        st.builds(replaced, place, st.integers(0, 3), st.binary(max_size=3)),
        st.builds(replaced, place, st.integers(1, 200), st.just(b"")),
        st.binary(max_size=20),
    )


def other_tensors(original: Mapping[str, Tensor]) -> st.SearchStrategy[dict[str, Tensor]]:
    """Tensors of which one or two are missing, new, of another shape or type, or hold other numbers.

    Args:
        original: the tensors by name.
    """
    changes: list[Callable[[Tensor], Tensor]] = [
        lambda tensor: tensor.flatten()[:1],
        lambda tensor: tensor.unsqueeze(0),
        lambda tensor: tensor.repeat(*[2] * tensor.dim()) if tensor.dim() else tensor.repeat(2),
        lambda tensor: tensor.mT.contiguous() if tensor.dim() > 1 else tensor,
        lambda tensor: tensor.new_zeros(0),
        *(_cast(dtype) for dtype in (torch.float64, torch.float16, torch.int64, torch.bool, torch.complex64)),
        *(_filled(number) for number in (math.nan, math.inf, -math.inf, 0.0, -1.0, 1e30, 5.0)),
    ]

    @st.composite
    def changed(draw: st.DrawFn) -> dict[str, Tensor]:
        tensors = dict(original)
        for _ in range(draw(st.integers(1, 2))):
            name = draw(st.sampled_from(sorted(tensors))) if tensors else "x"
            kind = draw(st.sampled_from(["change", "change", "drop", "rename"]))
            tensor = tensors.pop(name, torch.zeros(1))
            if kind == "change":
                tensors[name] = draw(st.sampled_from(changes))(tensor)
            elif kind == "rename":
                tensors[
                    draw(st.sampled_from(["x", "parameters/x", "optimizer/99/step", f"{name}.1", "test/labels"]))
                ] = tensor
        return tensors

    return changed()


def _cast(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor if tensor.is_complex() else tensor.to(dtype)


def _filled(number: float) -> Callable[[Tensor], Tensor]:
    return lambda tensor: (
        torch.full_like(tensor, number, dtype=torch.float64).to(tensor.dtype) if tensor.is_floating_point() else tensor
    )


def _places(value: Any, path: tuple[Any, ...] = ()) -> Any:
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from _places(item, (*path, key))


def _with(value: Any, path: tuple[Any, ...], draw: st.DrawFn) -> Any:
    if not path:
        return draw(VALUES)
    holder = value
    for key in path[:-1]:
        holder = holder[key]
    last = path[-1]
    kind = draw(st.sampled_from(["replace", "replace", "near", "remove", "add", "repeat"]))
    old = holder[last]
    if kind == "near" and isinstance(old, (int, float)) and abs(old) < 1e300:
        holder[last] = draw(
            st.sampled_from([-old, old + 1, old * 2, old + 0.5, float(old), str(old), [old], math.nan, 1e308])
        )
    elif kind == "remove":
        del holder[last]
    elif kind == "add" and isinstance(holder, dict):
        holder[draw(_TEXTS)] = draw(VALUES)
    elif kind == "repeat" and isinstance(holder, list):
        holder.append(copy.deepcopy(old))
    else:
        holder[last] = draw(VALUES)
    return value
