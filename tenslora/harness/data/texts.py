"""GLUE tasks: from the hub, a datasets folder, or the files as published."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tenslora.errors import TensLoRAError
from tenslora.harness.cache import cache_latest
from tenslora.harness.config import TextDatasetConfig
from tenslora.harness.data import Dataset, Examples, check_size

HUB = "nyu-mll/glue"


@dataclass(frozen=True)
class Task:
    """One GLUE task.

    sentences: the hub's column names of the one or two sentences. classes: in the order of the hub's labels.
    columns: of a published line: how many, those of the sentences, and that of the label. header: whether the
    first line names them. labels: what stands in the label column, in class order. files: for each split the
    alternatives, each a list of files that make it up together. sizes: examples per split, as published.
    """

    sentences: tuple[str, ...]
    classes: tuple[str, ...]
    columns: tuple[int, tuple[int, ...], int]
    header: bool
    labels: tuple[str, ...]
    files: dict[str, list[list[str]]]
    sizes: dict[str, set[int]]


_GLUE_FILES = {"train": [["train.tsv"]], "validation": [["dev.tsv"]]}

TASKS = {
    "cola": Task(
        sentences=("sentence",),
        classes=("unacceptable", "acceptable"),
        columns=(4, (3,), 1),
        header=False,
        labels=("0", "1"),
        files={
            "train": [["in_domain_train.tsv"], ["train.tsv"]],
            "validation": [["in_domain_dev.tsv", "out_of_domain_dev.tsv"], ["dev.tsv"]],
        },
        sizes={"train": {8551}, "validation": {1043}},
    ),
    "mrpc": Task(
        sentences=("sentence1", "sentence2"),
        classes=("not_equivalent", "equivalent"),
        columns=(5, (3, 4), 0),
        header=True,
        labels=("0", "1"),
        files={
            "train": [["msr_paraphrase_train.txt"], ["train.tsv"]],
            "validation": [["dev.tsv"]],
            "test": [["msr_paraphrase_test.txt"]],
        },
        sizes={"train": {4076, 3668}, "validation": {408}, "test": {1725}},
    ),
    "sst2": Task(
        sentences=("sentence",),
        classes=("negative", "positive"),
        columns=(2, (0,), 1),
        header=True,
        labels=("0", "1"),
        files=_GLUE_FILES,
        sizes={"train": {67349}, "validation": {872}},
    ),
    "qnli": Task(
        sentences=("question", "sentence"),
        classes=("entailment", "not_entailment"),
        columns=(4, (1, 2), 3),
        header=True,
        labels=("entailment", "not_entailment"),
        files=_GLUE_FILES,
        sizes={"train": {104743}, "validation": {5463}},
    ),
    "rte": Task(
        sentences=("sentence1", "sentence2"),
        classes=("entailment", "not_entailment"),
        columns=(4, (1, 2), 3),
        header=True,
        labels=("entailment", "not_entailment"),
        files=_GLUE_FILES,
        sizes={"train": {2490}, "validation": {277}},
    ),
}

# Where the published archives keep the files, below the folder they unpack to.
_SUBFOLDERS = ("", "raw", "cola_public/raw", "CoLA", "MRPC", "SST-2", "QNLI", "RTE")


@cache_latest(1)
def load_texts(config: TextDatasetConfig) -> Dataset:
    """The examples of a GLUE task; see `tenslora.harness.data.load_dataset`."""
    if config.name not in TASKS:
        raise TensLoRAError(f"dataset.name={config.name}: must be one of {', '.join(TASKS)}")
    task = TASKS[config.name]
    read = _hub(config, task) if config.root is None else _local(config, task, Path(config.root))
    train = [pair for split in config.train_splits or [] for pair in _split(config, task, read, split)]
    test = _split(config, task, read, config.test_split or "validation")
    return Dataset(_examples(train), _examples(test), task.classes)


def _examples(pairs: Sequence[tuple[tuple[str, ...], int]]) -> Examples:
    return Examples([sentences for sentences, _ in pairs], [label for _, label in pairs])


def _split(config: TextDatasetConfig, task: Task, read: Any, split: str) -> list[tuple[tuple[str, ...], int]]:
    found = read(split)
    if found is None and split == "validation" and "test" in task.files:
        # MRPC as its authors published it has a train and a test half and nothing else.
        split, found = "test", read("test")
    if found is None:
        if split not in task.files:
            raise TensLoRAError(
                f"dataset={config.name}: no {split} split of {config.name}; there are {', '.join(task.files)}"
            )
        raise TensLoRAError(
            f"dataset.root={config.root}: no {split} split of {config.name} there; it should hold "
            f"{' or '.join(' + '.join(files) for files in task.files[split])}, or a datasets folder"
        )
    pairs = list(found)
    for _, label in pairs:
        if not 0 <= label < len(task.classes):
            raise TensLoRAError(
                f"dataset={config.name}: the {split} split has an unlabelled example (label {label}); "
                f"choose another split"
            )
    published = task.sizes.get(split, set())
    check_size(config.name, split, len(pairs), None if len(pairs) in published else min(published, default=None))
    return pairs


def _local(config: TextDatasetConfig, task: Task, root: Path) -> Any:
    if not root.is_dir():
        raise TensLoRAError(f"dataset.root={root}: no such folder")
    if (root / "dataset_dict.json").is_file():
        from datasets import load_from_disk

        try:
            return _from_datasets(task, load_from_disk(str(root)))
        except Exception as error:
            raise _damaged(root, error) from error
    parquet = {
        split: [
            str(file) for folder in (root / config.name, root) for file in sorted(folder.glob(f"{split}-*.parquet"))
        ]
        for split in ("train", "validation", "test")
    }
    if any(parquet.values()):
        from datasets import load_dataset

        try:
            return _from_datasets(task, load_dataset("parquet", data_files={k: v for k, v in parquet.items() if v}))
        except Exception as error:
            raise _damaged(root, error) from error

    def read(split: str) -> Iterator[tuple[tuple[str, ...], int]] | None:
        for files in task.files.get(split, []):
            for subfolder in _SUBFOLDERS:
                paths = [root / subfolder / file for file in files]
                if all(path.is_file() for path in paths):
                    return (pair for path in paths for pair in _lines(task, path))
        return None

    return read


def _damaged(root: Path, error: Exception) -> TensLoRAError:
    # pyarrow's errors, the datasets library's and OSError alike
    return TensLoRAError(f"dataset.root={root}: cannot be read ({(str(error).splitlines() or [''])[0]})")


def _hub(config: TextDatasetConfig, task: Task) -> Any:
    from datasets import load_dataset

    try:
        return _from_datasets(task, load_dataset(HUB, config.name))
    except Exception as error:  # the hub client's own errors, its HTTP library's, and OSError alike
        raise TensLoRAError(
            f"dataset={config.name}: cannot be had from the hub ({(str(error).splitlines() or [''])[0]}); download "
            f"{HUB} or the published files into a folder and set dataset.root to it"
        ) from error


def _from_datasets(task: Task, splits: Any) -> Any:
    def read(split: str) -> list[tuple[tuple[str, ...], int]] | None:
        if split not in splits:
            return None
        rows = splits[split]
        missing = [name for name in (*task.sentences, "label") if name not in rows.column_names]
        if missing:
            raise TensLoRAError(
                f"the {split} split has no column {', '.join(missing)}; it has {', '.join(rows.column_names)}"
            )
        columns = zip(*(rows[name] for name in task.sentences), strict=True)
        return list(zip(columns, rows["label"], strict=True))

    return read


def _lines(task: Task, path: Path) -> Iterator[tuple[tuple[str, ...], int]]:
    # Read by hand: the files have tabs but no quoting, so that a lone quotation mark is just a character, and a
    # sentence may hold line separators that splitlines would cut at. MRPC's begin with a byte-order mark.
    count, sentence_columns, label_column = task.columns
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise TensLoRAError(f"{path}: cannot be read as UTF-8 text ({error})") from error
    for number, line in enumerate(lines, start=1):
        cells = line.rstrip("\r").split("\t")
        if (number == 1 and task.header) or cells == [""]:
            continue
        if len(cells) != count:
            raise TensLoRAError(f"{path}:{number}: {len(cells)} tab-separated columns where there should be {count}")
        label = cells[label_column]
        if label not in task.labels:
            raise TensLoRAError(f"{path}:{number}: the label is {label!r}; it must be one of {', '.join(task.labels)}")
        yield tuple(cells[column] for column in sentence_columns), task.labels.index(label)
