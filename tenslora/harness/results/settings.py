"""What a report says about how its runs were made: the command, the settings that they share and those that vary."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_SAID_BY_THE_TABLE = ("dataset.", "model.", "tensor_mode.name", "rank_strategy.name", "seed")
_WITHOUT_INTEREST = ("logger.", "resume", "overwrite", "model.geometry.")
_SHOW_ONLY = ("collect_only=", "dry_run=")


def command_of(arguments: Sequence[str]) -> str:
    """The command that carries out a sweep, without the words that only show it.

    >>> command_of(["sweep.py", "table=digits", "collect_only=true", "rank_strategy.ranks=[2,3,1],[5,5,3]"])
    "python sweep.py table=digits 'rank_strategy.ranks=[2,3,1],[5,5,3]'"

    Args:
        arguments: the arguments of the process, such as `sys.argv`.
    """
    return shlex.join(["python", "sweep.py", *(word for word in arguments[1:] if not word.startswith(_SHOW_ONLY))])


def settings_of(runs: Iterable[Mapping[str, Any]]) -> tuple[tuple[str, str], ...]:
    """The settings that all runs share, by group, and the values of those that vary.

    A setting that only some runs have, such as those of an adapter, counts as shared if these runs agree. Left out are
    settings that are null or "none", and what varies along the rows and columns of a table, because the table itself
    says it.

    >>> adamw = {"name": "adamw", "eps": 1e-8}
    >>> settings_of([{"seed": 0, "optimizer": {**adamw, "lr": 0.1}}, {"seed": 1, "optimizer": {**adamw, "lr": 0.2}}])
    (('optimizer', 'adamw, eps=1e-08'), ('varies', 'optimizer.lr=0.1 or 0.2'))

    Args:
        runs: the settings of each run, nested as `RunConfig.settings` returns them.

    Returns:
        Pairs of a group's name and its settings; the last pair is ("varies", ...) if anything else varies.
    """
    values: dict[str, dict[str, None]] = {}
    for run in runs:
        for key, value in _flat(run):
            values.setdefault(key, {})[value] = None
    groups: dict[str, list[str]] = {}
    varies = []
    for key, distinct in values.items():
        group, _, name = key.partition(".")
        if key.startswith(_WITHOUT_INTEREST) or list(distinct) in (["null"], ["none"]):
            continue
        if len(distinct) == 1:
            words = (*distinct,) if name in ("", "name") else (name, *distinct)
            groups.setdefault(group, []).append("=".join(words))
        elif not key.startswith(_SAID_BY_THE_TABLE):
            varies.append(f"{key.removesuffix('.name')}={' or '.join(distinct)}")
    shared = [(group, ", ".join(words)) for group, words in groups.items()]
    return (*shared, *([("varies", ", ".join(varies))] if varies else []))


def differing(tables: Iterable[Iterable[Mapping[str, Any]]]) -> dict[str, str]:
    """The settings in which tables of one dataset differ, with their values; not those that every table shows.

    >>> lora, att = ({"seed": size, "dataset": {"name": "dtd", "train_size": size}} for size in (64, 200))
    >>> differing([[lora], [att]])
    {'dataset.train_size': '64 or 200'}

    Args:
        tables: the settings of each run of each table, nested as `identity` returns them. A table counts for the
            settings that its runs have.
    """
    values: dict[str, dict[tuple[str, ...], None]] = {}
    for runs in tables:
        of_table: dict[str, set[str]] = {}
        for key, value in (pair for run in runs for pair in _flat(run)):
            of_table.setdefault(key, set()).add(value)
        for key, distinct in of_table.items():
            values.setdefault(key, {})[tuple(sorted(distinct))] = None
    # How often a run is scored does not change its last score.
    left_out = ("tensor_mode.name", "rank_strategy.name", "seed", "trainer.score_every")
    return {
        key: " or ".join(dict.fromkeys(value for distinct in sets for value in distinct))
        for key, sets in values.items()
        if len(sets) > 1 and key not in left_out
    }


def _flat(value: Any, key: str = "") -> Iterable[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        for name, item in value.items():
            yield from _flat(item, f"{key}.{name}" if key else name)
    else:
        yield key, value if isinstance(value, str) else json.dumps(value).replace('"', "")
