"""A table of finished runs, as Markdown.

python -m tenslora.results.table outputs/digits
"""

from __future__ import annotations

import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from tenslora.config import REFERENCES
from tenslora.constructions import CONSTRUCTIONS
from tenslora.errors import TensLoRAError
from tenslora.results.record import NAME, read_record

_ORDER = ["head_only", *CONSTRUCTIONS, "full"]


def collect(folder: Path) -> list[dict[str, Any]]:
    """The records of all completed runs below `folder`. Raises TensLoRAError if there are none."""
    records = [read_record(path.parent) for path in sorted(folder.rglob(NAME))]
    completed = [record for record in records if record["status"] == "completed"]
    if not completed:
        raise TensLoRAError(f"{folder}: no completed runs (no {NAME}) below it")
    return completed


def markdown(records: list[dict[str, Any]]) -> str:
    """One row per dataset, model, construction and ranks: parameters, % of LoRA, and the last score over seeds.

    Scores are in per cent, mean ± standard deviation (n - 1) over seeds. Runs of one row must differ in nothing but
    the seed; TensLoRAError otherwise.
    """
    rows: dict[tuple[Any, ...], dict[int, dict[str, Any]]] = defaultdict(dict)
    for record in records:
        mode = record["tensor_mode"]
        # LoRA has the same rank under isorank and isoparameters: one row, each seed once.
        strategy = "" if mode in (*REFERENCES, "lora") else record["rank_strategy"]
        ranks = ", ".join(map(str, record["ranks"] or []))
        key = (record["dataset"], record["model"], strategy, _ORDER.index(mode), ranks)
        other = next(iter(rows[key].values()), record)
        if _but_for_seed(record) != _but_for_seed(other):
            raise TensLoRAError(
                f"{record['dataset']}, {record['model']}, {mode}: the runs {other['digest']} and {record['digest']} "
                f"differ in more than the seed; give a folder that holds one kind"
            )
        rows[key][record["seed"]] = record
    lines = [
        "| dataset | model | construction | ranks | parameters | % of LoRA | metric | last | best |",
        "|---|---|---|---|---:|---:|---|---:|---:|",
    ]
    for (dataset, model, strategy, order, ranks), seeds in sorted(rows.items(), key=lambda row: row[0]):
        runs = list(seeds.values())
        count, lora = runs[0]["adapter_parameters"], runs[0]["lora_parameters"]
        scores = [_spread([run["metrics"][which] for run in runs]) for which in ("last", "best")]
        name = f"{_ORDER[order]} {strategy}".strip()
        share, metric = f"{100 * count / lora:.1f}", runs[0]["metrics"]["name"]
        lines.append(f"| {' | '.join([dataset, model, name, ranks, f'{count:,}', share, metric, *scores])} |")
    return "\n".join(lines)


def _but_for_seed(record: dict[str, Any]) -> dict[str, Any]:
    left_out = {"seed", "rank_strategy"} if record["tensor_mode"] == "lora" else {"seed"}
    return {name: value for name, value in record["identity"].items() if name not in left_out}


def _spread(scores: list[float]) -> str:
    mean = f"{100 * statistics.fmean(scores):.1f}"
    return f"{mean} ± {100 * statistics.stdev(scores):.1f}" if len(scores) > 1 else mean


if __name__ == "__main__":
    try:
        print(markdown(collect(Path(sys.argv[1] if len(sys.argv) > 1 else "outputs"))))
    except TensLoRAError as error:
        sys.exit(f"error: {error}")
