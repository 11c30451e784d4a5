"""A user's own texts: files, a folder that the datasets library saved, or a dataset on the hub."""

from __future__ import annotations

import csv
import io
import json
import logging
import re
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from tenslora.errors import TensLoRAError, first_line
from tenslora.files import read_json
from tenslora.harness.cache import cache_latest
from tenslora.harness.config import TextDatasetConfig
from tenslora.harness.console import at_least
from tenslora.harness.data.examples import NO_EXAMPLES, Dataset, Examples, divided, shortened, user_path
from tenslora.harness.data.text_columns import (
    are_numbers,
    choose_columns,
    class_names,
    classes_of,
    labels_of,
    numbers_of,
    sentences_of,
    spelled_differently,
)

if TYPE_CHECKING:
    from datasets import Dataset as Rows
    from datasets import DatasetDict

log = logging.getLogger(__name__)

TEST_SPLITS = ("test", "val", "validation", "valid", "dev")
"""The splits that are looked for to test on, in this order."""

TRAIN_FRACTION = 0.8
"""The share of training examples where there is no split to test on and `dataset.train_fraction` is not set."""

FILES = (".csv", ".tsv", ".jsonl", ".json", ".ndjson", ".parquet")
"""The suffixes of the files that are read."""

ABOUT = ("dataset_infos.json", "dataset_info.json")
"""Files by which the datasets library describes a dataset, and which hold none of its rows."""

SEPARATORS = {".csv": ",", ".tsv": "\t"}
"""What separates the columns, by the suffix of a file without types: all its cells are read as strings."""

_SEPARATOR_NAMES = {";": "semicolons", "\t": "tabs", ",": "commas"}


_ESCAPES = re.compile(rb"\\(?:u[dD][89abAB]..\\u[dD][c-fC-F]|(u[dD][89a-fA-F]..)|.)")
"""JSON's escapes. The group is one of half of a character, without the other half."""


@dataclass(frozen=True)
class Source:
    """Where texts are read from.

    Args:
        setting: the setting that says so, with its value, for messages.
        splits: the names of the splits.
        read: reads the split of a name.
        are_strings: whether all cells are read as strings, also those that hold numbers.
    """

    setting: str
    splits: Sequence[str]
    read: Callable[[str], Rows]
    are_strings: bool = False


def load_text_files(config: TextDatasetConfig, seed: int) -> Dataset:
    """Load the texts in `dataset.root` or on `dataset.hub`; docs/data.md describes the forms.

    Args:
        config: the dataset's settings.
        seed: the seed of the division into training and test examples, if they are not in splits of their own.

    Returns:
        The dataset. Its classes are in the order of the datasets library's ClassLabel if there is one, of the numbers
        if the labels are whole numbers, and otherwise of `sorted`.

    Raises:
        TensLoRAError: if files, columns, texts or labels are missing or contradict each other.
    """
    dataset, has_test = _read(config)
    if has_test:
        return dataset
    train = dataset.train
    fraction = config.train_fraction or TRAIN_FRACTION
    log.info("%s: no split to test on: %g of the %d rows are for training", config.name, fraction, len(train))
    chosen, others = divided(train, fraction, seed)
    return replace(dataset, train=chosen, test=others, is_drawn=True)


@cache_latest(1)
def _read(config: TextDatasetConfig) -> tuple[Dataset, bool]:
    """The dataset, and whether there is a split to test on. If there is none, all examples are for training."""
    source = _open(config)
    train_splits, test_split = _choose_splits(config, source)
    rows = {split: _rows(source, split) for split in train_splits}
    first = rows[train_splits[0]]
    texts, label = choose_columns(
        first.column_names, config.text_columns, config.label_column, has_first_line=source.are_strings
    )
    log.info("%s: the texts are in %s, the labels in %s", config.name, " and ".join(texts), label)

    parts = [_texts_and_labels(source, split, table, texts, label) for split, table in rows.items()]
    sentences = [example for part, _ in parts for example in part]
    values = [value for _, part in parts for value in part]
    if not values:
        raise TensLoRAError(f"{source.setting}: the split {' + '.join(train_splits)} has no rows")
    classes = classes_of(values, label, config.task, are_strings=source.are_strings)
    if classes and len(named := class_names(first, label)) > 1:
        classes = named
    train = Examples(sentences, numbers_of(values, classes, f"{source.setting}: the split {train_splits[-1]}"))
    task = "classification" if classes else "regression"
    dataset = Dataset(train, NO_EXAMPLES, classes, task, text_columns=texts)
    if test_split is not None and config.validation is None:  # with a validation split, the test split is not read
        rows[test_split] = _rows(source, test_split)
        sentences, values = _texts_and_labels(source, test_split, rows[test_split], texts, label, classes)
        numbers = numbers_of(values, classes, f"{source.setting}: the split {test_split}")
        dataset = replace(dataset, test=Examples(sentences, numbers))
    if source.are_strings and (alike := spelled_differently(list(rows.values()), label, classes)):
        log.warning(
            "%s: labels that are numbers are one class where the numbers are equal: %s; a letter in all, such as in "
            "c01, would keep them apart",
            config.name, shortened(alike),
        )  # fmt: skip
    return dataset, test_split is not None


def load_test_texts(config: TextDatasetConfig, classes: tuple[str, ...]) -> Dataset:
    """Load the texts in `dataset.root` or on `dataset.hub` to test on, without texts to train on.

    Args:
        config: the dataset's settings.
        classes: the names of the classes, by class number; () for a regression.

    Returns:
        A dataset without training examples. If there is no split to test on, all texts are for testing.

    Raises:
        TensLoRAError: if files, columns, texts or labels are missing, and for a label that is not one of `classes`.
    """
    source = _open(config)
    if config.test_split is not None and config.test_split not in source.splits:
        raise TensLoRAError(
            f"dataset.test_split={config.test_split}: is not a split there; the splits are {shortened(source.splits)}; "
            f"null tests on one of {', '.join(TEST_SPLITS)}, or on all"
        )
    found = [name for name in TEST_SPLITS if name in source.splits]
    splits = [config.test_split] if config.test_split else found[:1] or source.splits
    tables = {split: _rows(source, split) for split in splits}
    columns = next(iter(tables.values())).column_names
    texts, label = choose_columns(columns, config.text_columns, config.label_column, has_first_line=source.are_strings)
    sentences: list[tuple[str, ...]] = []
    numbers: list[float] = []
    for split, table in tables.items():
        of_split, values = _texts_and_labels(source, split, table, texts, label, classes)
        sentences += of_split
        numbers += numbers_of(values, classes, f"{source.setting}: the split {split}", of_run=True)
    task = "classification" if classes else "regression"
    return Dataset(NO_EXAMPLES, Examples(sentences, numbers), classes, task, text_columns=texts)


def _texts_and_labels(
    source: Source, split: str, table: Rows, texts: tuple[str, ...], label: str, classes: Sequence[str] = ()
) -> tuple[list[tuple[str, ...]], list[Any]]:
    """The texts and the labels of all rows of a split, whose labels are names if not all of `classes` are numbers."""
    where = f"{source.setting}: the split {split}"
    if lacking := [name for name in (*texts, label) if name not in table.column_names]:
        raise TensLoRAError(
            f"{where} must have the columns {', '.join((*texts, label))}, but lacks {', '.join(lacking)}; it has "
            f"{shortened(table.column_names)}"
        )
    sentences = sentences_of(table, texts, where)
    return sentences, labels_of(table, label, where, are_strings=source.are_strings and are_numbers(classes))


def _choose_splits(config: TextDatasetConfig, source: Source) -> tuple[tuple[str, ...], str | None]:
    """(the splits to train on, the split to test on), the latter None if the former are to be divided."""
    splits = source.splits
    train = config.train_splits or (("train",) if "train" in splits or len(splits) > 1 else tuple(splits))
    for setting, split in [*(("train_splits", name) for name in train), ("test_split", config.test_split)]:
        if split is not None and split not in splits:
            given = getattr(config, setting)
            value = "null" if given is None else split
            raise TensLoRAError(
                f"dataset.{setting}={value}: {split} is not a split there; the splits are {shortened(splits)}"
            )
    if config.test_split in train:
        raise TensLoRAError(f"dataset.test_split={config.test_split}: must not be a split to train on")
    if config.test_split is not None:
        return train, config.test_split
    found = [name for name in TEST_SPLITS if name in splits and name not in train]
    if config.train_fraction is not None:
        if found and config.train_splits is None:
            raise TensLoRAError(
                f"dataset.train_fraction={config.train_fraction}: must be null, because {found[0]} is a split to test "
                f"on; to divide the training split all the same, set dataset.train_splits=[{train[0]}]"
            )
        return train, None
    if not found:
        if unused := [name for name in splits if name not in train]:
            raise TensLoRAError(
                f"dataset.test_split=null: must be the split to test on, such as {unused[0]}, or set "
                f"dataset.train_fraction to divide the training split; the splits are {shortened(splits)}"
            )
        return train, None
    if found[1:]:
        log.info("%s: tested on %s; %s is not used", config.name, found[0], " and ".join(found[1:]))
    return train, found[0]


def _rows(source: Source, split: str) -> Rows:
    try:
        return source.read(split).with_format(None)  # save_to_disk keeps a format such as "torch"
    except TensLoRAError:
        raise
    except Exception as error:  # OSError, and the types of the datasets library, of pandas and of pyarrow
        raise TensLoRAError(f"{source.setting}: the split {split} cannot be read ({reason_of(error)})") from error


def reason_of(error: Exception) -> str:
    """Why the datasets library could not read something. Where it breaks off, it tells the reason in a cause alone.

    Args:
        error: the error of the datasets library, or of another one.
    """
    from datasets.exceptions import DatasetGenerationError

    if isinstance(error, yaml.YAMLError):
        fault = getattr(error, "problem", None) or first_line(error)
        return f"the YAML at the top of the dataset's README.md cannot be read: {fault}"
    if not isinstance(error, DatasetGenerationError):
        return first_line(error)
    reason: Any = error.__cause__ or error
    if not _is_of_types(error):
        return first_line(reason)
    found = reason.details().rstrip(".") if hasattr(reason, "details") else " ".join(str(reason).split())
    return f"its columns, and the type of each, must be the same in all rows and files; {found}"


def _is_of_types(error: Exception) -> bool:
    # Errors of a cast have many types and messages.
    frames = traceback.extract_tb((error.__cause__ or error).__traceback__)
    return any("cast" in frame.name for frame in frames)


def _open(config: TextDatasetConfig) -> Source:
    return _open_root(config.root) if config.root is not None else _open_hub(str(config.hub), config.hub_config)


def load_from_hub(name: str, configuration: str | None) -> DatasetDict:
    """Load all splits of a dataset of the Hugging Face hub, or of the cache.

    Args:
        name: the dataset's name on the hub.
        configuration: the configuration's name; None for the dataset's only one.

    Raises:
        Exception: OSError, and the types of the hub's client and of its HTTP library.
    """
    from datasets import load_dataset

    logging.getLogger("datasets").handlers.clear()  # the library prints its warnings, which the root logger prints too
    return load_dataset(name, configuration)


def _open_hub(name: str, configuration: str | None) -> Source:
    setting = f"dataset.hub={name}"
    if Path(name).exists():
        raise TensLoRAError(f"{setting}: there is a local file or folder of that name; set dataset.root to read it")
    # The library's own modules, such as csv, would read whatever lies in the current folder.
    if name.isidentifier() and find_spec(f"datasets.packaged_modules.{name}"):
        raise TensLoRAError(f"{setting}: must be the name of a dataset on the hub; set dataset.root to read files")
    try:
        splits = load_from_hub(name, configuration)
    except Exception as error:  # OSError, and the types of the hub's client and of its HTTP library
        raise TensLoRAError(f"{setting}: cannot be loaded ({reason_of(error)})") from error
    return Source(setting, list(map(str, splits)), splits.__getitem__)


def _open_root(given: str) -> Source:
    setting, root = f"dataset.root={given}", user_path(given)
    if root.is_file():
        if root.suffix.lower() not in FILES:
            raise TensLoRAError(f"{setting}: must be a file of the kind {', '.join(FILES)}, or a folder")
        return _open_files(setting, {"train": [root]})
    if not root.is_dir():
        raise TensLoRAError(f"{setting}: no such file or folder")
    if (root / "dataset_dict.json").is_file() or (root / "state.json").is_file():
        return _open_saved(setting, root)
    for folder in (root, root / "data"):
        files = sorted(file for file in folder.glob("*") if file.is_file() and file.suffix.lower() in FILES)
        # macOS leaves a hidden ._train.csv beside train.csv.
        files = [file for file in files if not file.name.startswith(".") and file.name not in ABOUT]
        if files:
            return _open_files(setting, _by_split(setting, files))
    if folders := sorted(file.name for file in root.iterdir() if file.is_dir() and file.suffix.lower() in FILES):
        raise TensLoRAError(
            f"{setting}: must hold files, and {shortened(folders)} are folders, as Spark writes them; put each split "
            f"into one file (train{Path(folders[0]).suffix}), such as the only one in its folder"
        )
    raise TensLoRAError(
        f"{setting}: must hold files of the kind {', '.join(FILES)}, one for each split (train.csv, test.csv), or a "
        f"dataset from save_to_disk; it holds {shortened(sorted(file.name for file in root.iterdir())) or 'nothing'}"
    )


def _by_split(setting: str, files: Sequence[Path]) -> dict[str, list[Path]]:
    """The files of each split, which is a file's name. Those of train-00000-of-00002.parquet and 1 are one split."""
    splits: dict[str, list[Path]] = {}
    for file in files:
        splits.setdefault(re.sub(r"-\d+-of-\d+$", "", file.stem), []).append(file)
    for split, shards in splits.items():
        counts = {int(shard[1]) for file in shards if (shard := re.search(r"-\d+-of-(\d+)$", file.stem))}
        if counts and counts != {len(shards)}:
            raise TensLoRAError(
                f"{setting}: the split {split} must be in {shortened(map(str, sorted(counts)))} files, as its file "
                f"{shards[0].name} says, and has {len(shards)}"
            )
    return splits


def _open_files(setting: str, splits: Mapping[str, list[Path]]) -> Source:
    suffixes = {file.suffix.lower() for files in splits.values() for file in files}
    if len(suffixes) > 1:
        raise TensLoRAError(f"{setting}: must hold files of one kind, but holds {', '.join(sorted(suffixes))}")
    (suffix,) = suffixes
    return Source(setting, list(splits), lambda split: read_tables(splits[split]), suffix in SEPARATORS)


def read_tables(files: Sequence[Path]) -> Rows:
    """Read files of one kind, a suffix in `FILES`, one after the other. All cells of .csv and .tsv files are strings.

    Args:
        files: the files.

    Returns:
        The rows of all files.

    Raises:
        Exception: of the datasets library, of pandas or of pyarrow, if a file cannot be read.
    """
    import datasets

    shows_bars = not datasets.are_progress_bars_disabled()
    if shows_bars:
        datasets.disable_progress_bars()  # a download should show one, reading a file need not
    try:
        with at_least(logging.CRITICAL, "datasets"):  # the library would log what is raised too
            return _read_tables(files)
    finally:
        if shows_bars:
            datasets.enable_progress_bars()


def _read_tables(files: Sequence[Path]) -> Rows:
    import datasets

    suffix = files[0].suffix.lower()
    if suffix not in SEPARATORS:
        read = datasets.Dataset.from_parquet if suffix == ".parquet" else datasets.Dataset.from_json
        if suffix == ".parquet":
            files = _with_rows(files)
            _require_known_types(files)
        else:
            files = _with_objects(files)
        # The library's own cache knows a file by its path and its time alone, and an edited file may keep both.
        with tempfile.TemporaryDirectory() as cache:
            try:
                rows = read(_without_chains(files, Path(cache)), cache_dir=cache, keep_in_memory=True)
            except datasets.exceptions.DatasetGenerationError as error:
                if suffix == ".parquet" or _is_of_types(error) or not isinstance(error.__cause__, ValueError):
                    raise
                # The reader says what its parser has missed, and not what the file must hold.
                raise ValueError(
                    f"it must hold an object of JSON in each line, or a list of objects; {first_line(error.__cause__)}"
                ) from None
        return rows if suffix == ".parquet" else _with_dates_as_texts(rows, files)
    import pandas

    separator = SEPARATORS[suffix]
    # All cells are read as strings: a text may be "NA" or "007".
    as_strings = {"sep": separator, "dtype": str, "keep_default_na": False, "encoding": "utf-8-sig"}
    tables = []
    for file in files:
        require_separator(file, separator)
        text = file.read_text(encoding="utf-8-sig")
        _require_whole_cells(file, text, separator)
        head = pandas.read_csv(file, header=None, nrows=1, **as_strings)
        _require_different(head.iloc[0].tolist())
        table = pandas.read_csv(file, **as_strings)
        if not isinstance(table.index, pandas.RangeIndex):  # pandas has taken the first cells for names of the rows
            raise ValueError(
                f"its first line names {len(head.columns)} columns, and its second line has more cells; a cell that "
                f"holds {_SEPARATOR_NAMES[separator]} must be in quotes"
            )
        _require_all_cells(file, text, separator)
        if len(table.columns) > 1:  # with one column, as for predict, a name may be a text
            _require_one_first_line(file, head.iloc[0].tolist(), table.to_numpy().tolist())
        for name in table.columns if len(table) else ():
            if table[name].str.fullmatch(r'\s+".*"\s*', na=False).all():
                raise ValueError(f"each cell of the column {name.strip()} has a blank before its quotes; remove it")
        if separator == "\t" and any(_holds_a_line(table[name]) for name in table.columns):
            raise ValueError(
                "a cell begins with a quotation mark that ends in another line, so that it holds whole lines; write "
                "it twice, and one more before and after the cell"
            )
        tables.append(table)
    return datasets.Dataset.from_pandas(pandas.concat(tables), preserve_index=False)


def _without_chains(files: Sequence[Path], folder: Path) -> list[str]:
    """The paths of files, of which one with :: is replaced by a link: fsspec takes it for a file within another one."""
    links = [folder / f"{number}{file.suffix}" if "::" in str(file) else file for number, file in enumerate(files)]
    for link, file in zip(links, files, strict=True):
        if link is not file:
            link.symlink_to(file.absolute())
    return list(map(str, links))


def _with_rows(files: Sequence[Path]) -> list[Path]:
    """The Parquet files that have rows, at least one. The datasets library takes none without."""
    from pyarrow import parquet

    found = [file for file in files if parquet.read_metadata(file).num_rows]
    if not found:
        raise ValueError(f"{files[0].name} has no rows")
    return found


def _require_known_types(files: Sequence[Path]) -> None:
    """Refuse a column of a type that the datasets library cannot hold. Its own error does not name the column."""
    import datasets
    import pyarrow
    from pyarrow import parquet

    for file in files:
        for column in parquet.read_schema(file):
            try:
                datasets.Features.from_arrow_schema(pyarrow.schema([column]))
            except ValueError:
                raise ValueError(f"the column {column.name} is of a type that cannot be read: {column.type}") from None


def _with_objects(files: Sequence[Path]) -> list[Path]:
    """The JSON files that hold more than brackets, at least one.

    A null in the place of a row of JSON lines is refused, because pyarrow may end the process there. So is half of a
    character, which pandas drops.
    """
    found = []
    for file in files:
        before, has_rows = b"}", False
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                text = line.strip(b"\xef\xbb\xbf \t\r\n")  # with a byte order mark
                if text.startswith(b"null") and before == b"}":  # within an object or a list, it is a value
                    raise ValueError(f"line {number} of {file.name} is null; must be an object, with a value by column")
                if half := next((each[1] for each in _ESCAPES.finditer(text) if each[1]), None):
                    raise ValueError(
                        f"line {number} of {file.name} holds \\{half.decode()}, which is half of a character, without "
                        f"the other half"
                    )
                before = text[-1:] or before
                has_rows = has_rows or bool(text.strip(b"[]{}, "))
        if has_rows:
            found.append(file)
    if not found:
        raise ValueError(f"{files[0].name} has no rows")
    return found


def _with_dates_as_texts(rows: Rows, files: Sequence[Path]) -> Rows:
    """The rows of JSON files, with the texts that pyarrow has taken for dates as they stand there."""
    names = [name for name, kind in rows.features.items() if str(getattr(kind, "dtype", "")).startswith("timestamp")]
    if not names:
        return rows
    objects = [item for file in files for item in _objects(file)]
    if len(objects) != len(rows):  # another form of JSON that the datasets library reads
        return rows
    columns = list(rows.column_names)
    for name in names:
        rows = rows.remove_columns(name).add_column(name, [item.get(name) for item in objects])
    return rows.select_columns(columns)


def _objects(file: Path) -> list[dict[str, Any]]:
    """The objects of a JSON file: of a list, or one in each line."""
    text = file.read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("["):
        return list(json.loads(text))
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def _holds_a_line(cells: Any) -> bool:
    # Files that are separated by tabs are often written without quotes around cells.
    held = cells.str.contains("\t", regex=False) & cells.str.contains("\n", regex=False)
    return bool(held.any())


def _require_different(names: Sequence[str]) -> None:
    # pandas would take the first of two columns of a name, and give the second another name.
    for number, name in enumerate(names):
        if name and name in names[:number]:
            raise ValueError(f"its first line names two columns {name}")


def _require_one_first_line(file: Path, names: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Refuse rows among which the names of the columns come again, as where two files were joined into one."""

    def plain(cell: str) -> str:  # a second file may begin with a byte order mark, or write its names in other letters
        return cell.strip('\ufeff" ').lower()

    wanted = list(map(plain, names))
    for number, row in enumerate(rows, start=1):
        if plain(row[0]) == wanted[0] and list(map(plain, row)) == wanted:
            raise ValueError(
                f"row {number} of {file.name} is the first line again, which names the columns; remove it, or write a "
                f"first line that names them"
            )


def require_separator(file: Path, separator: str) -> None:
    """Refuse a file whose first line separates the columns otherwise, as spreadsheets do where 1,5 is a number.

    Args:
        file: the file.
        separator: what must separate its columns, a value of `SEPARATORS`.

    Raises:
        ValueError: if something else separates them, or if the file holds JSON.
        OSError: if the file cannot be read.
    """
    with file.open(encoding="utf-8-sig") as lines:
        header = lines.readline()
    if re.fullmatch(r"sep=.?\s*", header, re.IGNORECASE):
        raise ValueError(
            f"its first line, {header.strip()}, is for spreadsheets alone, and the names of the columns come after it; "
            f"remove it"
        )
    if re.match(r'\s*([{[]\s*){1,2}("|$)', header):
        raise ValueError(f"it holds JSON, and must be called {file.stem}.jsonl or {file.stem}.json then")
    if separator not in header and (others := [other for other in _SEPARATOR_NAMES if other in header]):
        raise ValueError(
            f"its columns are separated by {_SEPARATOR_NAMES[others[0]]}; must be separated by "
            f"{_SEPARATOR_NAMES[separator]} in a {file.suffix} file"
        )


def _require_whole_cells(file: Path, text: str, separator: str) -> None:
    """Refuse a cell in quotes that goes on after them, and one of NULs, which a loss of power can leave.

    pandas would drop the quotes, and take lines into the cell.
    """
    if "\0" in text:
        raise ValueError(f"line {text.count(chr(10), 0, text.index(chr(0))) + 1} of {file.name} holds a NUL")
    in_quotes = re.compile(rf'(?:\A|[{separator}\n])("[^"]*(?:""[^"]*)*") *([^{separator}\n ]?)')
    for cell in in_quotes.finditer(text):
        if cell[2]:
            first, last = (text.count("\n", 0, cell.start(group)) + 1 for group in (1, 2))
            raise ValueError(
                f"the cell that begins with a quotation mark in line {first} of {file.name} goes on after the next "
                f"one, in line {last}; each quotation mark of a text must be written twice, and the text in quotes"
            )


def _require_all_cells(file: Path, text: str, separator: str) -> None:
    """Refuse a row of fewer cells than columns, such as a text that a line break has cut. pandas would fill it up."""
    longest = csv.field_size_limit(2**31 - 1)  # by default a text of 128 kB is an error
    try:
        every = csv.reader(io.StringIO(text), delimiter=separator)
        rows = (row for row in every if len(row) > 1 or any(map(str.strip, row)))  # pandas passes over empty lines
        columns = len(next(rows))
        for number, row in enumerate(rows if columns > 1 else (), start=1):
            if len(row) < columns:
                raise ValueError(
                    f"row {number} of {file.name} has {len(row)} cell{'s' * (len(row) > 1)}, and the first line "
                    f"names {columns} columns; a cell with a line break must be in quotes"
                )
    finally:
        csv.field_size_limit(longest)


def _open_saved(setting: str, root: Path) -> Source:
    from datasets import DatasetDict

    if "::" in str(root):  # which the library takes for a folder within another one
        raise TensLoRAError(f"{setting}: must be a path without ::, which the datasets library cannot read")
    try:
        saved = load_saved(root)
    except Exception as error:  # OSError, and the types of the datasets library and of pyarrow
        raise TensLoRAError(f"{setting}: cannot be read ({first_line(error)})") from error
    splits = dict(saved) if isinstance(saved, DatasetDict) else {"train": saved}
    return Source(setting, list(splits), splits.__getitem__)


def load_saved(root: Path) -> Rows | DatasetDict:
    """Load what the datasets library's save_to_disk has written.

    Args:
        root: the folder.

    Raises:
        Exception: OSError, and the types of the datasets library and of pyarrow, if it cannot be read.
    """
    from datasets import load_from_disk

    file = root / "dataset_dict.json"
    names: Any = [""]  # of the folder itself
    if file.is_file():
        listed = read_json(file)
        names = listed.get("splits") if isinstance(listed, dict) else None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f'{file.name} must be an object whose "splits" is a list of names')
    for name in names:
        state = root / name / "state.json"
        about = read_json(state) if state.is_file() else None
        if isinstance(about, dict) and about.get("_data_files") == []:  # which the library writes, and cannot read
            raise ValueError(f"the split {name} has no rows" if name else "it has no rows")
    loaded: Rows | DatasetDict = load_from_disk(str(root))
    for split in loaded.values() if isinstance(loaded, dict) else [loaded]:
        split.data.table.validate(full=True)  # a wrong offset would end the process when a cell is read
    return loaded
