"""A cache of the most recently loaded objects, so that the runs of one process load a backbone and a dataset once."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar, cast

from tenslora.errors import TensLoRAError

P = ParamSpec("P")
R = TypeVar("R")

_caches: list[list[tuple[object, object]]] = []
_reads_anew = ContextVar("_reads_anew", default=False)


def cache_latest(size: int) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator that keeps the results of a function's latest calls, for further calls with equal arguments.

    The decorator differs from functools.lru_cache in two ways. Arguments need no hash, because they are compared by ==.
    If the cache is full, the oldest result is dropped before the function is called and not after it, so that two
    backbones are never in memory at once.

    A result is shared by all callers, who must not change it.

    Args:
        size: the number of results that are kept.

    Returns:
        The decorator.
    """

    def decorate(load: Callable[P, R]) -> Callable[P, R]:
        latest: list[tuple[object, R]] = []
        _caches.append(cast(Any, latest))

        @functools.wraps(load)
        def cached(*args: P.args, **kwargs: P.kwargs) -> R:
            if _reads_anew.get():
                return load(*args, **kwargs)
            call = (args, kwargs)
            for place, (earlier, result) in enumerate(latest):
                if _are_equal(earlier, call):
                    latest.append(latest.pop(place))
                    return result
            del latest[: max(0, len(latest) - size + 1)]
            result = load(*args, **kwargs)
            latest.append((call, result))
            return result

        return cached

    return decorate


def _are_equal(one: object, other: object) -> bool:
    try:
        return bool(one == other)
    except Exception:  # of arrays, which numpy and torch compare number by number, and whatever a user's own class says
        return False


def forget_all() -> None:
    """Empty all caches. In a notebook files may change between two commands of one process."""
    for latest in _caches:
        latest.clear()


@contextmanager
def reading_anew() -> Iterator[None]:
    """A context, or a decorator, in which this thread takes nothing from the caches and leaves nothing in them.

    It is for what may be called at any time in a program that goes on for long, while files change.

    Raises:
        TensLoRAError: if the current folder is gone, below which every library looks for files.
    """
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise TensLoRAError("the current folder is gone; change to another one (os.chdir)") from error
    before = _reads_anew.set(True)
    try:
        yield
    finally:
        _reads_anew.reset(before)
