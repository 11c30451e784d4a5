"""Describes what a sweep is about to do."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tenslora.errors import TensLoRAError
from tenslora.harness.config.checks import shown
from tenslora.harness.results.table import Table, percent_of_lora
from tenslora.harness.run_folder import RunFolder
from tenslora.harness.stages import ranks_text
from tenslora.harness.sweeping.jobs import Job, Look, State
from tenslora.harness.sweeping.tuning import MOST_EXTENSIONS, Known, has_diverged

_WORDS = {
    State.DONE: "done",
    State.BEGUN: "to go on with",
    State.FAILED: "to run again",
    State.RUNNING: "running elsewhere",
    State.NEW: "to run",
}
_DIVERGED = "diverged"
_WAITS = "to run once tuned"
_ORDER = (_WORDS[State.DONE], _DIVERGED, *list(_WORDS.values())[1:], _WAITS)


def plan(table: Table, looks: Mapping[Job, Look]) -> str:
    """The plan as text: each row's ranks, parameter count and first step beside LoRA's, and how far its seeds are.

    Datasets whose lines would be the same share them. A dash stands for what is not known before the model is loaded.

    Args:
        table: the table of the jobs.
        looks: the state of each job's folder. A run that is not among them waits for its settings to be chosen.
    """
    states = {job.digest: _WORDS[look.state] for job, look in looks.items()}
    blocks: dict[tuple[tuple[str, ...], ...], list[str]] = {}
    for column in table.columns:
        rows = []
        for row in table.rows:
            if runs := table.cell(row, column):
                first = runs[0]
                unknown = "-" if row.has_adapter else ""  # a generic model's dimensions are found when it is loaded
                ranks = ranks_text(first.ranks or ()) or unknown
                count = unknown if first.parameters is None else f"{first.parameters:,}"
                percent = percent_of_lora(first.parameters, first.lora_parameters)
                share = unknown if percent is None else f"{percent:.1f} %"
                step = unknown if first.size.relative_step is None else f"{first.size.relative_step:.2f}"
                seeds = _counted(states.get(run.digest, _WAITS) for run in runs)
                rows.append((row.label, ranks, count, share, step, seeds))
        blocks.setdefault(tuple(rows), []).append(column.label)
    lines = [table.title]
    for block, labels in blocks.items():
        head = ("", "ranks", "parameters", "of LoRA", "first step", "seeds of each" if len(labels) > 1 else "seeds")
        lines += ["", *labels, *_aligned([head, *block], numbers=(2, 3, 4))]
    counts = _counted(states.get(run.digest, _WAITS) for run in table.runs)
    return "\n".join([*lines, f"\n{len(table.runs)} jobs: {counts}"])


def tuning_plan(known: Known) -> str:
    """The plan of the trials as text: for each row its values and the chosen one, and how far its trials are.

    Args:
        known: the jobs that are known by now, with at least one search.
    """
    tune = next(iter(known.choices)).tune
    lines = [f"tuning {tune.setting} with the seeds {', '.join(map(str, tune.seeds))}"]
    by_column: dict[str, list[tuple[str, ...]]] = {}
    states = {trial: _state_of(known.looks[trial]) for trial in known.trials}
    for search, choice in known.choices.items():
        chosen = "".join(map(shown, choice.value)) or ("none" if choice.problem else "")
        counts = _counted(states[trial] for value in choice.grid for trial in search.trials(value))
        texts = search.jobs[0].row.label, ", ".join(map(shown, choice.grid)), chosen, counts
        by_column.setdefault(search.jobs[0].column.label, []).append(texts)
    for column, rows in by_column.items():
        lines += [f"\n{column}", *_aligned([("", "values", "chosen", "runs"), *rows], numbers=(2,))]
    most = len(tune.values) + MOST_EXTENSIONS
    more = len(tune.seeds) * sum(most - len(choice.grid) for choice in known.choices.values() if not choice.value)
    edges = f"; at most {more} more where the best value is at an edge" if tune.is_numeric and more else ""
    return "\n".join([*lines, f"\n{len(states)} trials: {_counted(states.values())}{edges}"])


def news(earlier: Known, known: Known) -> list[str]:
    """A line for each search that has come to a value, or to the edge of its grid, since an earlier look.

    Args:
        earlier: the jobs that were known earlier.
        known: the jobs that are known now.
    """
    lines = []
    for search, choice in known.choices.items():
        setting = search.tune.setting
        where = f"{search.jobs[0].column.dataset} {search.jobs[0].row.label}"
        if choice.value and not earlier.choices[search].value:
            edge = ", at the edge of its values" if choice.at_edge else ""
            lines.append(f"tuned: {where} {setting}={shown(choice.value[0])}{edge}")
        elif added := [value for value in choice.grid if value not in earlier.choices[search].grid]:
            lines.append(f"extended: {where} {setting}={shown(added[0])}")
    return lines


def cost(jobs: Sequence[Job]) -> str:
    """How long jobs will take, as finished runs of the same dataset, model and length took.

    Args:
        jobs: the jobs that are to be carried out.

    Returns:
        A line; empty if for some job there is no such run.
    """
    seconds, count = 0.0, 0
    took: dict[Any, list[float]] = {}
    for job in jobs:
        kind = (job.folder.path.parent, _length(job.run.settings()))
        if kind not in took:
            records = _records(kind[0])
            took[kind] = [
                math.fsum(record["seconds"].values()) for record in records if _length(record["config"]) == kind[1]
            ]
            count += len(took[kind])
        if not took[kind]:
            return ""
        seconds += math.fsum(took[kind]) / len(took[kind])
    minutes = math.ceil(seconds / 60)
    time = f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
    return f"about {time} one after the other, as {count} finished runs took\n" if jobs else ""


def _records(folder: Any) -> list[dict[str, Any]]:
    """The records of the runs in a folder that say how long they took."""
    records = []
    for path in sorted(folder.glob("*/result.json")):
        with contextlib.suppress(TensLoRAError):
            record = RunFolder(path.parent).read_record()
            if record["status"] == "completed" and "seconds" in record and "config" in record:
                records.append(record)
    return records


def _length(settings: Mapping[str, Any]) -> tuple[Any, ...]:
    """The settings that say how long a run is, apart from its dataset and its model."""
    trainer, dataset = settings["trainer"], settings["dataset"]
    return *(trainer.get(name) for name in ("epochs", "max_steps", "precision")), dataset.get("train_size")


def announcements(looks: Mapping[Job, Look]) -> list[str]:
    """A line for each job that does not simply start, because it is skipped, continued, run again or waited for.

    Args:
        looks: the state of each job's folder.
    """
    lines = []
    for job, look in looks.items():
        if look.state is State.DONE:
            lines.append(f"skip: {job.label} is done")
        elif look.state is State.BEGUN:
            lines.append(f"go on: {job.label}, from its checkpoint")
        elif look.state is State.FAILED:
            lines.append(f"again: {job.label}, which failed ({look.problem})")
        elif look.state is State.RUNNING:
            lines.append(f"wait: {job.label} is running elsewhere")
    return lines


def _state_of(trial: Look) -> str:
    return _DIVERGED if has_diverged(trial) else _WORDS[trial.state]


def _aligned(rows: Sequence[Sequence[str]], numbers: Sequence[int]) -> list[str]:
    """Lines of texts below each other; those in the columns `numbers` are aligned on the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        *texts, last = row
        aligned = [text.rjust(widths[i]) if i in numbers else text.ljust(widths[i]) for i, text in enumerate(texts)]
        lines.append("  ".join(("", *aligned, last)).rstrip())
    return lines


def _counted(states: Iterable[str]) -> str:
    counts = Counter(states)
    return ", ".join(f"{counts[words]} {words}" for words in _ORDER if counts[words])
