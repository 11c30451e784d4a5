"""Matches the regular expressions of PEFT's settings, in limited time.

A regular expression can take longer than anyone can wait, by trying every way of dividing a name among its parts, and
Python's own cannot be interrupted in every thread. Those that are more than a name are matched by another process,
unless no Python can be started, as where a program has Python built in: they then take the time that they take.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence

from tenslora.errors import TensLoRAError
from tenslora.forms import shown

LONGEST = 1000
"""The largest number of characters in a pattern, unless it is names with | between them."""

_MATCH = """
import json, re, sys
expressions, names = json.load(sys.stdin)
try:
    compiled = [re.compile(expression) for expression in expressions]
except (re.error, RecursionError, OverflowError) as error:
    answer = f"not a regular expression ({error})"
else:
    answer = [next((i for i, one in enumerate(compiled) if one.fullmatch(name)), None) for name in names]
print(json.dumps(answer))
"""


def first_matches(
    patterns: Sequence[str], names: Sequence[str], form: str = r"(.*\.)?({})", seconds: float = 5.0
) -> dict[str, str]:
    """Find the first pattern that matches each name.

    Args:
        patterns: regular expressions.
        names: paths of modules.
        form: the expression that a pattern is put into, in the place of {}, and that has to match a whole path. By
            default it is PEFT's for rank_pattern and alpha_pattern: the pattern has to match the end of a path, from
            the beginning of one of its parts.
        seconds: how long matching may take if any pattern is more than a name, and another process can match it.

    Returns:
        The pattern by the name. Names that no pattern matches are left out.

    Raises:
        TensLoRAError: if a pattern is no regular expression, or too long, or if matching takes too long.
    """
    for pattern in patterns:
        if len(pattern) > LONGEST and not _is_of_several_names(pattern):
            raise TensLoRAError(f"{shown(pattern)}: must have at most {LONGEST:,} characters")
    # replace, because format would take the braces of a pattern for its own
    expressions = [form.replace("{}", pattern) for pattern in patterns]
    if all(re.fullmatch(r"[\w.-]*", pattern) for pattern in patterns) and len(patterns) * len(names) < 100_000:
        found = _in_this_process(patterns, expressions, names)
    else:
        found = _in_another_process(patterns, expressions, names, seconds)
    return {name: patterns[index] for name, index in zip(names, found, strict=True) if index is not None}


def _is_of_several_names(pattern: str) -> bool:
    return "|" in pattern and re.fullmatch(r"[\w.|\\-]*", pattern) is not None  # as of_paths makes of any number


def of_paths(paths: Iterable[str]) -> str:
    """A pattern for PEFT's target_modules that matches some paths. A list would match longer ones that end so, too.

    >>> of_paths(["blocks.0.qkv", "blocks.1.qkv"])
    'blocks\\\\.0\\\\.qkv|blocks\\\\.1\\\\.qkv'

    Args:
        paths: paths of modules.
    """
    return "|".join(map(re.escape, paths))


def _in_this_process(patterns: Sequence[str], expressions: Sequence[str], names: Sequence[str]) -> list[int | None]:
    try:
        compiled = [re.compile(expression) for expression in expressions]
    except (re.error, RecursionError, OverflowError) as error:
        raise TensLoRAError(f"{shown(list(patterns))}: not a regular expression ({error})") from error
    return [next((i for i, one in enumerate(compiled) if one.fullmatch(name)), None) for name in names]


def _in_another_process(
    patterns: Sequence[str], expressions: Sequence[str], names: Sequence[str], seconds: float
) -> list[int | None]:
    try:
        done = subprocess.run(
            [sys.executable or "", "-I", "-S", "-c", _MATCH],
            input=json.dumps([expressions, list(names)]),
            capture_output=True,
            text=True,
            timeout=seconds,
        )
        answer: list[int | None] | str = json.loads(done.stdout) if done.returncode >= 0 else "cannot be matched"
    except subprocess.TimeoutExpired as error:
        raise TensLoRAError(
            f"{shown(list(patterns))}: matching the names of the modules takes more than {seconds:g} seconds"
        ) from error
    except (OSError, ValueError):  # sys.executable is empty, gone or no Python
        return _in_this_process(patterns, expressions, names)
    if isinstance(answer, str):
        raise TensLoRAError(f"{shown(list(patterns))}: {answer}")
    return answer
