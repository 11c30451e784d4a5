"""Reads a GLUE task: from the hub, from a folder of the datasets library, or from the files as published."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tenslora.errors import TensLoRAError
from tenslora.forms import shown
from tenslora.harness.cache import cache_latest
from tenslora.harness.config import TextDatasetConfig
from tenslora.harness.data.examples import NO_EXAMPLES, Dataset, Examples, shortened, warn_of_another_size
from tenslora.harness.data.glue import FOLDERS, GLUE_TASKS, HUB, GlueTask
from tenslora.harness.data.text_columns import class_names, values_of
from tenslora.harness.data.text_files import load_from_hub, load_saved, reason_of

if TYPE_CHECKING:
    from datasets import DatasetDict

Labelled = tuple[tuple[str, ...], float]
"""One or two sentences, and the number of their class or, in a regression, their value."""

Reader = Callable[[str], list[Labelled] | None]
"""A function that reads the split with a given name, or returns None if there is no such split."""


@cache_latest(1)
def load_texts(config: TextDatasetConfig) -> Dataset:
    """Load the examples of a GLUE task; see `tenslora.harness.data.load_dataset`."""
    if config.name not in GLUE_TASKS:
        raise TensLoRAError(f"dataset.name={config.name}: must be one of {', '.join(GLUE_TASKS)}")
    task = GLUE_TASKS[config.name]
    read = _hub_reader(config, task) if config.root is None else _folder_reader(config, task, Path(config.root))
    train = [example for split in config.train_splits or () for example in _read_split(config, task, read, split)]
    test, more_tests = NO_EXAMPLES, {}
    if config.validation is None:
        test = _examples(_read_split(config, task, read, config.test_split or "validation"))
        more_tests = {
            name: _examples(_read_split(config, task, read, split))
            for name, split in task.more_tests.items()
            if split != config.test_split
        }
    kind = "classification" if task.classes else "regression"
    return Dataset(_examples(train), test, task.classes, kind, more_tests, text_columns=task.sentences)


def _examples(labelled: list[Labelled]) -> Examples:
    return Examples([sentences for sentences, _ in labelled], [label for _, label in labelled])


def _read_split(config: TextDatasetConfig, task: GlueTask, read: Reader, split: str) -> list[Labelled]:
    labelled = read(split)
    if labelled is None and split == "validation" and "test" in task.files:
        # MRPC as published by its authors has no validation split, but a test split with labels.
        split, labelled = "test", read("test")
    if labelled is None:
        if split not in task.files:
            raise TensLoRAError(
                f"dataset={config.name}: there is no {split} split of {config.name}; there are {', '.join(task.files)}"
            )
        raise TensLoRAError(
            f"dataset.root={config.root}: no {split} split of {config.name} there; the folder should hold "
            f"{' or '.join(' + '.join(files) for files in task.files[split])}, or a folder of the datasets library"
        )
    for _, label in labelled:
        if not (0 <= label < len(task.classes) if task.classes else 0 <= label <= 5):
            raise TensLoRAError(
                f"dataset={config.name}: the {split} split has an unlabelled example (label {label}); choose another "
                f"split"
            )
    published, size = task.sizes.get(split, set()), len(labelled)
    warn_of_another_size(config.name, split, size, size if size in published else min(published, default=None))
    return labelled


def _hub_reader(config: TextDatasetConfig, task: GlueTask) -> Reader:
    try:
        splits = load_from_hub(HUB, config.name)
    except Exception as error:  # OSError, and the types of the hub's client and of its HTTP library
        raise TensLoRAError(
            f"dataset={config.name}: cannot be downloaded from the Hugging Face hub ({reason_of(error)}); download "
            f"{HUB} or the published files into a folder and set dataset.root to it"
        ) from error
    return _datasets_reader(config, task, splits)


def _folder_reader(config: TextDatasetConfig, task: GlueTask, root: Path) -> Reader:
    """A reader for the local copy in `root`, which may be of the datasets library, of the hub, or as published."""
    if not root.is_dir():
        raise TensLoRAError(f"dataset.root={root}: no such folder")
    parquet = {
        split: [
            str(file) for folder in (root / config.name, root) for file in sorted(folder.glob(f"{split}-*.parquet"))
        ]
        for split in {**task.files, "test": []}
    }
    if not (root / "dataset_dict.json").is_file() and not any(parquet.values()):
        return lambda split: _read_published(task, root, split)
    from datasets import load_dataset

    try:
        if (root / "dataset_dict.json").is_file():
            splits = load_saved(root)
        else:
            files = {split: files for split, files in parquet.items() if files}
            with tempfile.TemporaryDirectory() as cache:  # the library's own may hold what an edited file held before
                splits = load_dataset("parquet", data_files=files, cache_dir=cache, keep_in_memory=True)
    except Exception as error:  # OSError, and the types of the datasets library and of pyarrow
        raise TensLoRAError(f"dataset.root={root}: cannot be read ({reason_of(error)})") from error
    return _datasets_reader(config, task, splits)


def _datasets_reader(config: TextDatasetConfig, task: GlueTask, splits: DatasetDict) -> Reader:
    def read(split: str) -> list[Labelled] | None:
        if split not in splits:
            return None
        rows = splits[split].with_format(None)  # save_to_disk keeps a format such as "torch"
        missing = [name for name in (*task.sentences, "label") if name not in rows.column_names]
        if missing:
            raise TensLoRAError(
                f"dataset={config.name}: the {split} split has no column {', '.join(missing)}; it has "
                f"{', '.join(rows.column_names)}"
            )
        numbered = tuple(map(str, range(len(task.classes))))  # the names of a ClassLabel that was given none
        if (names := class_names(rows, "label")) not in ((), numbered, task.classes):
            raise TensLoRAError(
                f"dataset={config.name}: the classes of the {split} split must be {', '.join(task.classes)}, in this "
                f"order, and are {shortened(names)}; dataset=text takes others"
            )
        kinds: dict[str, tuple[type, ...]] = dict.fromkeys(task.sentences, (str,))
        kinds["label"] = (int,) if task.classes else (int, float)
        where = f"dataset={config.name}: the {split} split"
        columns = {name: values_of(rows, name, where) for name in kinds}
        for name, values in columns.items():
            for number, value in enumerate(values, start=1):
                if type(value) not in kinds[name]:
                    wanted = "text" if name in task.sentences else "a class's number" if task.classes else "a number"
                    raise TensLoRAError(
                        f"dataset={config.name}: row {number} of the {split} split has {shown(value)} as its {name}; "
                        f"must be {wanted}"
                    )
        *sentences, labels = columns.values()
        for number, row in enumerate(zip(*sentences, strict=True), start=1):
            if not any(map(str.strip, row)):
                raise TensLoRAError(f"dataset={config.name}: row {number} of the {split} split has no text")
        return list(zip(zip(*sentences, strict=True), labels if task.classes else map(float, labels), strict=True))

    return read


def _read_published(task: GlueTask, root: Path, split: str) -> list[Labelled] | None:
    for names in task.files.get(split, []):
        for folder in (*FOLDERS, task.folder):
            files = [root / folder / name for name in names]
            if all(file.is_file() for file in files):
                return [example for file in files for example in _lines(task, file)]
    return None


def _lines(task: GlueTask, file: Path) -> Iterator[Labelled]:
    """The examples of a published file."""
    # The lines are not split by the csv module, because the files do not quote, and not by splitlines, which would also
    # split at characters that a sentence may hold. MRPC's files begin with a byte-order mark.
    try:
        lines = file.read_bytes().decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise TensLoRAError(f"{file}: cannot be read as UTF-8 text ({error})") from error
    for number, line in enumerate(lines, start=1):
        cells = line.rstrip("\r").split("\t")
        if (number == 1 and task.header) or cells == [""]:
            continue
        if len(cells) not in task.column_counts:
            if task.has_broken_lines and len(cells) < min(task.column_counts):
                continue
            raise TensLoRAError(
                f"{file}:{number}: {len(cells)} tab-separated columns where there should be "
                f"{' or '.join(map(str, task.column_counts))}"
            )
        sentences, label = tuple(cells[column] for column in task.sentence_columns), cells[task.label_column]
        if not any(map(str.strip, sentences)):  # some pairs of QQP have one question only
            raise TensLoRAError(f"{file}:{number}: has no text")
        if task.labels:
            if label not in task.labels:
                raise TensLoRAError(
                    f"{file}:{number}: the label is {label!r}; it must be one of {', '.join(task.labels)}"
                )
            yield sentences, task.labels.index(label)
            continue
        try:
            yield sentences, float(label)
        except ValueError as error:
            raise TensLoRAError(f"{file}:{number}: the score is {label!r}; it must be a number") from error
