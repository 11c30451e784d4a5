"""Finished tables of the same runs under several protocols, side by side in one table.

A protocol says how the learning rates of a table's rows are set: as in the paper, with equal first steps, or each row
tuned. In the joint table it is one more setting of each row, so that every form of a table shows it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from tenslora.errors import TensLoRAError
from tenslora.harness.config.identity import with_defaults
from tenslora.harness.results.csv import read_runs
from tenslora.harness.results.paper import PROTOCOL, stand_in
from tenslora.harness.results.settings import differing, settings_of
from tenslora.harness.results.table import Column, Run, Table


def side_by_side(protocols: Mapping[str, Sequence[Path]], name: str, command: str = "") -> Table:
    """One table of several finished ones, whose rows have their protocol as a further setting.

    Each protocol's rows are compared with the LoRA of the same protocol, and the paper's claims are judged under each.

    Args:
        protocols: for each protocol, the folders of its tables, such as one for each dataset.
        name: the name of the joint table.
        command: the command that makes it; empty if it is unknown.

    Returns:
        The table.

    Raises:
        TensLoRAError: if a folder does not hold a table or holds a comparison, if the record of a finished run is gone,
            if two tables of one protocol have different runs or scores for the same row, dataset and seed, or runs of
            different settings for the same row and dataset, if two tables have different headline metrics for a
            dataset, or if one shows the best scores and another the last ones.
    """
    runs: list[Run] = []
    metrics: dict[Column, str] = {}
    score = ""
    differences: list[str] = []
    for protocol, folders in protocols.items():
        of_protocol: dict[object, Run] = {}
        settings_of_row: dict[object, object] = {}
        of_tables: dict[Column, dict[Path, list[Run]]] = {}
        for folder in folders:
            for run in read_runs(folder):
                if run.row.value_of(PROTOCOL) is not None:
                    raise TensLoRAError(
                        f"{protocol}={folder}: must be a table of a sweep, not a comparison; compare the tables that "
                        f"it was made of"
                    )
                score = score or run.shown
                if run.shown != score:
                    raise TensLoRAError(
                        f"{protocol}={folder}: must show the {score} scores, as the tables before it, and not the "
                        f"{run.shown} ones; its sweep with collect_only=true table.score={score} writes it so"
                    )
                other = of_protocol.setdefault((run.row, run.column, run.seed), run)
                if other.digest != run.digest:
                    place = f"{run.row.label}, {run.column.label}, seed {run.seed}"
                    raise TensLoRAError(
                        f"{protocol}={folder}: must not have another run than the tables before it for {place}; "
                        f"give it a protocol of its own"
                    )
                if other.metrics and run.metrics and other.metrics["last"] != run.metrics["last"]:
                    place = f"{run.row.label}, {run.column.label}, seed {run.seed}"
                    raise TensLoRAError(
                        f"{protocol}={folder}: has another score for {place} ({run.metrics['last']}) than a table "
                        f"before it ({other.metrics['last']}); give only one of them"
                    )
                if run.record is None:
                    continue
                of_tables.setdefault(run.column, {}).setdefault(folder, []).append(run)
                own = {**run.record["identity"], "seed": None}
                if settings_of_row.setdefault((run.row, run.column), own) != own:
                    raise TensLoRAError(
                        f"{protocol}={folder}: must not have runs of other settings than those before them for "
                        f"{run.row.label}, {run.column.label}; give it a protocol of its own"
                    )
                name_of_score = run.record["metrics"]["name"]
                if metrics.setdefault(run.column, name_of_score) != name_of_score:
                    raise TensLoRAError(
                        f"{protocol}={folder}: must be scored by {metrics[run.column]} on {run.column.label}, as the "
                        f"tables before it, and not by {name_of_score}"
                    )
        differences += [_difference(protocol, column, tables) for column, tables in of_tables.items()]
        assignment = f"{PROTOCOL}={protocol}"
        runs += [
            replace(run, row=replace(run.row, variant=(*run.row.variant, assignment))) for run in of_protocol.values()
        ]
    words = [f"{protocol}: {', '.join(map(str, folders))}" for protocol, folders in protocols.items()]
    title = "LoRA and tensor constructions by protocol"
    table = Table(name, title, tuple(runs), score, by=PROTOCOL, command=command)
    of_tables_note = f"The protocols and their tables: {'; '.join(words)}."
    notes = tuple(filter(None, [stand_in(table), of_tables_note, *differences]))
    settings = settings_of(run.record["config"] for run in runs if run.record and "config" in run.record)
    return replace(table, notes=notes, settings=settings)


def _difference(protocol: str, column: Column, tables: Mapping[Path, Sequence[Run]]) -> str:
    """A note on the settings in which the tables of one protocol differ and their rows do not say so; empty if none."""
    runs = [run for of_table in tables.values() for run in of_table]
    said = {word.partition("=")[0].lstrip("+") for run in runs for word in (*run.row.variant, run.tuned) if word}
    identities = [[with_defaults(run.record["identity"]) for run in each if run.record] for each in tables.values()]
    found = differing(identities)
    words = [f"{key}={values}" for key, values in found.items() if not {key, key.partition(".")[0]} & said]
    return f"Under the protocol {protocol}, the tables of {column.label} differ in {', '.join(words)}." if words else ""
