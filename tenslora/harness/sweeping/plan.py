"""Describes what a sweep is about to do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from tenslora.harness.results.table import Table, percent_of_lora
from tenslora.harness.sweeping.jobs import Job, Look, State

_WORDS = {
    State.DONE: "done",
    State.BEGUN: "to go on with",
    State.FAILED: "to run again",
    State.RUNNING: "running elsewhere",
    State.NEW: "to run",
}


def plan(table: Table, looks: Mapping[Job, Look]) -> str:
    """The plan as text: each row's ranks, parameter count and first step beside LoRA's, and how far its seeds are.

    A dash stands for what is not known before the model is loaded.

    Args:
        table: the table of the jobs.
        looks: the state of each job's folder.
    """
    states = {job.digest: look.state for job, look in looks.items()}
    lines = [table.title]
    for column in table.columns:
        rows = []
        for row in table.rows:
            if runs := table.cell(row, column):
                first = runs[0]
                unknown = "-" if row.has_adapter else ""  # a generic model's dimensions are found when it is loaded
                ranks = ", ".join(map(str, first.ranks or [])) or unknown
                count = unknown if first.parameters is None else f"{first.parameters:,}"
                percent = percent_of_lora(first.parameters, first.lora_parameters)
                share = unknown if percent is None else f"{percent:.1f} %"
                step = unknown if first.size.relative_step is None else f"{first.size.relative_step:.2f}"
                rows.append((row.label, ranks, count, share, step, _counted(states[run.digest] for run in runs)))
        head = ("", "ranks", "parameters", "of LoRA", "first step", "seeds")
        widths = [max(len(line[i]) for line in [head, *rows]) for i in range(5)]
        lines.append(f"\n{column.label}")
        for label, ranks, count, share, step, seeds in [head, *rows]:
            texts = [label.ljust(widths[0]), ranks.ljust(widths[1])]
            numbers = [text.rjust(width) for text, width in zip((count, share, step), widths[2:], strict=True)]
            lines.append("  ".join(("", *texts, *numbers, seeds)).rstrip())
    lines.append(f"\n{len(looks)} jobs: {_counted(states.values())}")
    return "\n".join(lines)


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


def _counted(states: Iterable[State]) -> str:
    counts = Counter(states)
    return ", ".join(f"{counts[state]} {words}" for state, words in _WORDS.items() if counts[state])
