"""Scores a finished run's model, as the run scored it after its last epoch.

    python -m tenslora.harness.evaluate <run>                       # on the run's own test split
    python -m tenslora.harness.evaluate <run> dataset.root=<folder> # on other data of the same kind

On the run's own data the scores are those of its record, to the last digit if the device and the number of processes
are the same. Any setting of the dataset can be changed. Other data may lack some of the run's classes, but must not
have others. Other images or texts of your own need no training examples; without a test split, all of them are scored.
"""

from __future__ import annotations

if __name__ == "__main__":
    if not __package__:
        raise SystemExit("error: must be started as python -m tenslora.harness.evaluate")
    import tenslora.harness.early  # catches Ctrl-C from here on

    tenslora.harness.early.start_command()

import copy
import json
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from tenslora.errors import TensLoRAError
from tenslora.harness.commands import add_run_arguments, command_parser, mistakes_in_one_line, several_settings
from tenslora.harness.config import RunConfig, validate

_FORM = "dataset.<setting>=<value>"


def with_overrides(run: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """The settings of a run on another dataset.

    Args:
        run: the settings of the run.
        overrides: settings of the dataset as on train.py's command line, such as "dataset.root=/data".

    Returns:
        The settings with these changes.

    Raises:
        TensLoRAError: for an override that is not of a setting of the dataset, and for an invalid value.
    """
    from tenslora.harness.config.spelling import in_quotes, parsed, unreadable

    settings = copy.deepcopy(run.settings())
    for word in overrides:
        if line := several_settings(word):
            raise TensLoRAError(line)
        override = parsed(word)
        if override is None:
            is_setting = re.match(r"\+*dataset(\.\w+)+=", word)
            raise TensLoRAError(unreadable(word) if is_setting else f"{word}: must be written as {_FORM}")
        group, *names = override.key_or_group.split(".")
        if group != "dataset" or not names or override.is_delete():
            raise TensLoRAError(f"{word}: must be written as {_FORM}; the rest is the run's own")
        if override.is_sweep_override():
            key, _, value = word.partition("=")
            typed = in_quotes(word)
            raise TensLoRAError(
                f"{word}: is several values; a list needs brackets, as in {shlex.quote(f'{key}=[{value}]')}"
                + f", and one text needs quotes, as in {typed}" * bool(typed)
            )
        place: Any = settings["dataset"]
        for name in names[:-1]:
            place = place.setdefault(name, {}) if isinstance(place, dict) else {}
        if not isinstance(place, dict):
            raise TensLoRAError(f"{word}: there is no such setting")
        place[names[-1]] = override.value()
    dataset, given = settings["dataset"], {word.partition("=")[0] for word in overrides}
    if "dataset.test_list" in given and dataset.get("train_list") is None:  # of a run on folders
        dataset["train_list"] = dataset["test_list"]  # which is not read, and which the settings need beside the other
        for name in ("train_fraction", "train_splits", "test_split"):
            if f"dataset.{name}" not in given:
                dataset[name] = None
    return validate(settings)


def scores_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """The loss and the scores of a record's last epoch, by the names that `LoadedRun.evaluate` gives them.

    Args:
        record: the record of a finished run.
    """
    last: dict[str, Any] = record["metrics"]["history"][-1]
    return {name: value for name, value in last.items() if name not in ("epoch", "step", "lr", "train_loss")}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line. A user's mistake ends the process with status 1 and one line."""
    parser = command_parser("tenslora.harness.evaluate", __doc__)
    add_run_arguments(parser)
    parser.add_argument("overrides", nargs="*", metavar="dataset.<setting>=<value>", help="settings of other data")
    parser.add_argument("--format", choices=("table", "jsonl"), default="table", help="how to print; default: table")
    given = parser.parse_intermixed_args(arguments)
    with mistakes_in_one_line():
        from tenslora.harness.load_run import load_run

        loaded = load_run(given.run, given.checkpoint)
        run = with_overrides(loaded.run, given.overrides)
        evaluation = loaded.evaluate(run.dataset, device=given.device, shared=True)
        if os.environ.get("RANK", "0") != "0":  # started by torchrun; the first process prints
            return
        split = next(iter(evaluation.predictions))
        scores = {f"{split}_loss": evaluation.loss, **evaluation.scores}
        examples = sum(len(of_split.labels) for of_split in evaluation.predictions.values())
        if given.format == "jsonl":
            print(json.dumps({"dataset": run.dataset.name, "examples": examples, **scores}))
            return
        place = run.dataset.name if run.dataset.root == loaded.run.dataset.root else run.dataset.root
        recorded = scores_of(loaded.record) if run.dataset == loaded.run.dataset else {}
        print(f"{loaded.record['tensor_mode']} on {place}: {examples:,} {split} examples")
        width = max(map(len, scores))
        for name, value in scores.items():
            in_the_record = f"  in the record: {recorded.get(name)!r}" if recorded else ""
            print(f"{name:<{width}}  {value!r:<20}{in_the_record}".rstrip())


if __name__ == "__main__":
    with tenslora.harness.early.undone():
        main()
