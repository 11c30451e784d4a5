"""What one process loads once, however many runs it carries out."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def cache_latest(size: int) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Keep the results of the last `size` different calls, for calls with equal arguments.

    functools.lru_cache for arguments that cannot be hashed; besides, a result is let go before another is made, so
    that two backbones are never held at once. Results are shared: whoever changes one changes it for the next.
    """

    def decorate(load: Callable[P, R]) -> Callable[P, R]:
        latest: list[tuple[object, R]] = []

        @functools.wraps(load)
        def remembering(*args: P.args, **kwargs: P.kwargs) -> R:
            call = (args, kwargs)
            for entry in latest:
                if entry[0] == call:
                    latest.remove(entry)
                    latest.append(entry)
                    return entry[1]
            del latest[: max(0, len(latest) - size + 1)]
            latest.append((call, load(*args, **kwargs)))
            return latest[-1][1]

        return remembering

    return decorate
