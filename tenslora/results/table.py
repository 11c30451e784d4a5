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
        seen = rows[key].setdefault(record["seed"], record)
        if seen["metrics"]["last"] != record["metrics"]["last"]:
            raise TensLoRAError(
                f"{record['dataset']}, {mode}, seed {record['seed']}: two runs with different settings (digests "
                f"{seen['digest']} and {record['digest']}); give a folder that holds one of them"
            )
    lines = [
        "| dataset | construction | ranks | parameters | % of LoRA | metric | last | best |",
        "|---|---|---|---:|---:|---|---:|---:|",
    ]
    for (dataset, _, strategy, order, ranks), seeds in sorted(rows.items(), key=lambda row: row[0]):
        runs = list(seeds.values())
        count, lora = runs[0]["adapter_parameters"], runs[0]["lora_parameters"]
        scores = [_spread([run["metrics"][which] for run in runs]) for which in ("last", "best")]
        name = f"{_ORDER[order]} {strategy}".strip()
        cells = [dataset, name, ranks, f"{count:,}", f"{100 * count / lora:.1f}", runs[0]["metrics"]["name"], *scores]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _spread(scores: list[float]) -> str:
    mean = f"{100 * statistics.fmean(scores):.1f}"
    return f"{mean} ± {100 * statistics.stdev(scores):.1f}" if len(scores) > 1 else mean


if __name__ == "__main__":
    try:
        print(markdown(collect(Path(sys.argv[1] if len(sys.argv) > 1 else "outputs"))))
    except TensLoRAError as error:
        sys.exit(f"error: {error}")
