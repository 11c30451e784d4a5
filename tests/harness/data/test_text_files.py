from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pandas
import pyarrow
import pytest
import yaml

from tenslora.errors import TensLoRAError
from tenslora.harness.config import TextDatasetConfig
from tenslora.harness.data import Dataset, load_dataset

TEXTS = [f"No. {number}" for number in range(10)]
NAMES = [("bad", "good", "fine")[number % 3] for number in range(10)]
CLASSES = ("bad", "fine", "good")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The datasets library's cache in a folder of the test's own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield


def config(root: Path | None, **changes: Any) -> TextDatasetConfig:
    settings: dict[str, Any] = {
        "metrics": None, "train_splits": None, "test_split": None, "train_size": None, "max_length": 32,
        "padding": "longest", "group_by_length": False, **changes,
    }  # fmt: skip
    root_setting = None if root is None else str(root)
    return TextDatasetConfig(name="own", modality="text", source="text_files", root=root_setting, **settings)


def load(root: Path | None, seed: int = 0, **changes: Any) -> Dataset:
    return load_dataset(config(root, **changes), seed)


def refused(root: Path | None, message: str, **changes: Any) -> None:
    """Loading fails with one line that matches `message`."""
    with pytest.raises(TensLoRAError, match=message) as caught:
        load(root, **changes)
    assert "\n" not in str(caught.value)


_MAP = pandas.ArrowDtype(pyarrow.map_(pyarrow.string(), pyarrow.int32()))
MARKS: Any = pandas.Series([[("a", 1)]] * 10, dtype=_MAP)  # of a type that datasets has not


def table(texts: list[str] = TEXTS, labels: list[Any] = NAMES) -> pandas.DataFrame:
    return pandas.DataFrame({"text": texts, "label": labels})


def write(folder: Path, files: dict[str, pandas.DataFrame | str]) -> Path:
    """Write tables in the forms that their names' suffixes say."""
    folder.mkdir(exist_ok=True, parents=True)
    for name, content in files.items():
        path = folder / name
        if isinstance(content, str):
            path.write_text(content)
            continue
        if path.suffix in (".csv", ".tsv"):
            content.to_csv(path, index=False, sep="," if path.suffix == ".csv" else "\t")
        elif path.suffix == ".parquet":
            content.to_parquet(path)
        else:
            content.to_json(path, orient="records", lines=path.suffix == ".jsonl")
    return folder


def read_back(dataset: Dataset) -> list[list[tuple[str, str]]]:
    """(text, class) of each training and each test example."""
    return [
        [(text, dataset.classes[label]) for (text,), label in zip(examples.inputs, examples.labels, strict=True)]
        for examples in (dataset.train, dataset.test)
    ]


ROWS = list(zip(TEXTS, NAMES, strict=True))


@pytest.mark.parametrize("kind", [".csv", ".tsv", ".jsonl", ".json", ".parquet"])
def test_one_file_for_each_split(kind: str, tmp_path: Path) -> None:
    root = write(tmp_path / "root", {f"train{kind}": table()[:6], f"test{kind}": table()[6:]})
    dataset = load(root)
    assert dataset.classes == CLASSES
    assert read_back(dataset) == [ROWS[:6], ROWS[6:]]


@pytest.mark.parametrize("kind", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_one_file_is_divided_by_the_seed(kind: str, tmp_path: Path) -> None:
    file = write(tmp_path / "root", {f"reviews{kind}": table()}) / f"reviews{kind}"
    train, test = read_back(load(file))
    assert (len(train), len(test)) == (8, 2)
    assert sorted(train + test) == ROWS
    assert read_back(load(file.parent)) == [train, test]  # the only file of a folder
    assert read_back(load(file, seed=1)) != [train, test]
    assert len(load(file, train_fraction=0.5).train) == 5


def class_labels(names: list[str], labels: list[str], texts: list[str] = TEXTS) -> datasets.Dataset:
    rows = datasets.Dataset.from_dict({"text": texts[: len(labels)], "label": labels})
    return rows.cast_column("label", datasets.ClassLabel(names=names))


@pytest.mark.parametrize("form", ["folder of splits", "folder of one split", "parquet", "parquet in shards", "hub"])
def test_a_dataset_of_the_datasets_library_keeps_its_classes(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["good", "unused", "fine", "bad"]
    rows = class_labels(names, NAMES)
    train, test = rows.select(range(6)), rows.select(range(6, 10))
    root = tmp_path / "root"
    changes: dict[str, Any] = {}
    if form == "folder of splits":
        datasets.DatasetDict({"train": train, "validation": test}).save_to_disk(str(root))
    elif form == "folder of one split":
        rows.save_to_disk(str(root))
        assert load(root).classes == tuple(names)
        return
    elif form == "hub":
        asked = []

        def load_from_hub(*arguments: Any) -> datasets.DatasetDict:
            asked.append(arguments)
            return datasets.DatasetDict({"train": train, "test": test})

        monkeypatch.setattr(datasets, "load_dataset", load_from_hub)
        changes = {"hub": "user/name", "hub_config": "plain"}
    else:
        (root / "data").mkdir(parents=True)
        test.to_parquet(root / "data" / "test-00000-of-00001.parquet")
        for shard in range(2):
            train.select(range(3 * shard, 3 * shard + 3)).to_parquet(
                root / "data" / f"train-{shard:05}-of-00002.parquet"
            )
    dataset = load(None if form == "hub" else root, **changes)
    assert dataset.classes == tuple(names)
    assert read_back(dataset) == [ROWS[:6], ROWS[6:]]
    if form == "hub":
        assert asked == [("user/name", "plain")]


def test_two_texts_and_numbers_are_a_regression_on_pairs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write(tmp_path / "root", {"train.tsv": "premise\thypothesis\tscore\nA\tB\t0.5\nC\tD\t2\n"})
    (root / "test.tsv").write_text("hypothesis\tscore\tpremise\nF\t-1\tE\n")
    dataset = load(root)
    assert (dataset.task, dataset.classes, dataset.outputs) == ("regression", (), 1)
    assert (list(dataset.train.inputs), list(dataset.train.labels)) == ([("A", "B"), ("C", "D")], [0.5, 2.0])
    assert (list(dataset.test.inputs), list(dataset.test.labels)) == ([("E", "F")], [-1.0])
    assert caplog.text.count("own: all test labels are -1; a correlation with them counts as 0") == 1


def test_a_csv_files_texts_are_as_they_are_written(tmp_path: Path) -> None:
    texts = ["NA", "007", "None", 'He said, "no".', '"a"\r\n"b",\n"', "1e5", ' "café"']
    root = write(tmp_path / "root", {"train.csv": table(texts, [1, 0, 1, 0, 1, 0, 1]), "test.csv": table(["x"], [1])})
    (root / "train.csv").write_bytes(b"\xef\xbb\xbf" + (root / "train.csv").read_bytes())
    dataset = load(root)
    assert [text for (text,) in dataset.train.inputs] == texts
    assert (dataset.classes, list(dataset.train.labels)) == (("0", "1"), [1, 0, 1, 0, 1, 0, 1])


def test_splits_are_chosen_by_name_or_given(tmp_path: Path) -> None:
    names = ("train", "more", "dev", "final")
    root = write(tmp_path / "root", {f"{name}.csv": table([name] * 3, NAMES[:3]) for name in names})

    def chosen(**changes: Any) -> list[list[str]]:
        return [sorted({text for text, _ in part}) for part in read_back(load(root, **changes))]

    assert chosen() == [["train"], ["dev"]]
    assert chosen(train_splits=("train", "more"), test_split="final") == [["more", "train"], ["final"]]
    assert chosen(train_splits=("more",), train_fraction=0.7) == [["more"], ["more"]]
    refused(
        root, r"dataset\.test_split=tset: tset is not a split there; the splits are dev, final, mor", test_split="tset"
    )
    refused(root, r"dataset\.test_split=train: must not be a split to train on$", test_split="train")
    refused(root, r"dataset\.train_splits=all: all is not a split there; ", train_splits=("all",))
    refused(root, r"dataset\.train_fraction=0.5: must be null, because dev is a split to test on", train_fraction=0.5)
    (root / "dev.csv").unlink()
    refused(
        root, r"dataset\.test_split=null: must be the split to test on, such as final, or set dataset\.train_fracti"
    )
    (root / "train.csv").unlink()
    refused(root, r"dataset\.train_splits=null: train is not a split there; the splits are final, more$")


def test_a_validation_split_leaves_the_test_file_unread(tmp_path: Path) -> None:
    root = write(tmp_path / "root", {"train.csv": table(), "test.csv": "text,label\nno,such label\n"})
    dataset = load(root, validation=0.2)
    assert dataset.validation is not None
    assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (8, 2, 0)
    divided = load(root, validation=0.2, train_splits=("train",), train_fraction=0.5)
    assert divided.validation is not None
    assert (len(divided.train), len(divided.validation)) == (4, 1)


def test_labels_that_only_the_test_split_has_are_refused(tmp_path: Path) -> None:
    root = write(tmp_path / "root", {"train.csv": table()[:6], "test.csv": table(["a", "b"], ["good", "new"])})
    refused(root, "the split test: has labels that the training split does not have: new; .* has bad, fine, good$")


@pytest.mark.parametrize(
    ("labels", "test_labels", "named"),
    [
        (["01", "1", "10", "02", "+10"], ["2"], "01 and 1, 02 and 2, +10 and 10"),
        (["01", "10", "02", " 02", "10"], ["02"], None),  # as so many codes are written
        (["01", "1", "1", "02", "x"], ["02"], None),  # names, also in a split that has numbers alone
        (["0.5", "1", "1.0", "01", "2"], ["02"], None),  # a regression
    ],
)
def test_labels_that_become_one_class_are_named(
    labels: list[str], test_labels: list[str], named: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = {"train.csv": table(TEXTS[:5], labels), "test.csv": table(TEXTS[:1], test_labels)}
    load(write(tmp_path / "root", files), task="classification" if "x" in labels else None)
    warnings = [record.getMessage() for record in caplog.records if "are equal" in record.getMessage()]
    line = "own: labels that are numbers are one class where the numbers are equal: {}; a letter in"
    assert [warning.startswith(line.format(named)) for warning in warnings] == [True] * (named is not None)


def test_a_class_that_the_seed_leaves_without_training_examples_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = write(tmp_path / "root", {"one.csv": table(TEXTS, ["a"] * 9 + ["rare"])})
    warned = []
    for seed in range(12):
        caplog.clear()
        dataset = load(root, seed)
        assert dataset.classes == ("a", "rare")
        warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
        assert bool(warnings) == (1 in dataset.test.labels)
        warned += warnings
    assert set(warned) == {"own: no training example is of rare"}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"train.csv": "text;label\na, b;1\n"},
            r"its columns are separated by semicolons; must be separated by commas in a \.csv file",
        ),
        ({"train.csv": '{"text": "a", "label": 1}\n'}, r"\(it holds JSON, and must be called train\.jsonl or"),
        ({"train.tsv": '[\n  {"text": "a", "label": 1}\n]\n'}, r"\(it holds JSON, and must be called train\.jsonl or"),
        ({"train.tsv": "text,label\na,1\n"}, "separated by commas; must be separated by tabs in a .tsv file"),
        ({"train.csv": "sep=,\ntext,label\na,1\n"}, r"\(its first line, sep=,, is for spreadsheets alone"),
        ({"train.csv": "sep=;\ntext;label\na;1\n"}, r"\(its first line, sep=;, is for spreadsheets alone"),
        ({"train.json": '{"0": {"text": "a", "label": 1}, "1": {"text": "b", "label": 2}}'}, r"; there are 0, 1$"),
        ({"train.csv": "text,label\n"}, "the split train has no rows"),
        ({"train.csv": ""}, "the split train cannot be read"),
        ({"train.csv": "text,label\na,1\nb,2,3\n"}, r"the split train cannot be read \(.* in line 3"),
        ({"train.csv": "text,label\na, b,1\nc, d,2\n"},
         r"first line names 2 columns, .* more cells; a cell that holds commas must be in quotes\)$"),
        ({"train.tsv": 'text\tlabel\n"Hi\t1\nb\t2\nA 5"\t2\n'}, r"cell begins with a quotation mark that ends in an"),
        ({"train.csv": 'text,label\na,1\n"b,1\nc,2\n"d,1\n'}, r"in line 3 of train\.csv goes on after .*, in line 5; "),
        ({"train.csv": "text,label\na,1\nb,2\n\0\0\0"}, r"\(line 4 of train\.csv holds a NUL\)"),
        ({"train.csv": 'label,text\n1,"A \\"b\\" c"\n2,d\n'}, r"in line 2 of train\.csv goes on after .*, in line 2; "),
        ({"train.csv": '"text", "label"\n"a, b", "x"\n"c", "y"\n'}, r'each cell of the column "label" has a blank be'),
        ({"train.csv": "text,label\na,1\ntext,label\nb,2\n"}, r"row 2 of train\.csv is the first line again, which "
         r"names the columns; remove it, or write a first line that names them\)$"),
        ({"train.csv": 'text,label\na,1\n\ufeff"Text","LABEL"\nb,2\n'}, r"\(row 2 of train\.csv is the first line ag"),
        ({"train.tsv": "text\ttext\tlabel\na\tb\t1\n"}, r"cannot be read \(its first line names two columns text\)$"),
        ({"train.csv": "text,label\na,1\nb,\n"}, "the split train: row 2 has no label in the column label"),
        ({"train.csv": "text,label,n\n\na,1,2\n\nb\rc,1,3\n"}, r"\(row 2 of train\.csv has 1 cell, and the first lin"),
        ({"train.tsv": 'text\tlabel\tn\n"a\r\nb"\t1\t\nb\t2\n'}, r"\(row 2 of train\.tsv has 2 cells, and the first"),
        ({"train.csv": "text,label\n,1\nb,0\n"}, "the split train: row 1 has no text in the column text"),
        ({"train.csv": "text,label\na,1\nb,1\n"}, r"dataset\.label_column=label: must hold at least two different lab"),
        ({"train.jsonl": '{"text": "a", "label": 1}\n{"text": "b"'}, "the split train cannot be read .*JSON"),
        ({"train.jsonl": '{"text": "a", "label": 1},\n{"text": "b", "label": 2},\n'},
         r"read \(it must hold an object of JSON in each line, or a list of objects; JSON parse error: The document "),
        ({"train.jsonl": '{"text": "a", "label": 1}\n{"text": "b"}\n'}, "row 2 has no label in the column label"),
        ({"train.jsonl": ""}, r"the split train cannot be read \(train\.jsonl has no rows\)$"),
        ({"train.json": "[\n{}\n]"}, r"the split train cannot be read \(train\.json has no rows\)$"),
        ({"train.json": "null"}, r"read \(line 1 of train\.json is null; must be an object, with a value by column\)$"),
        ({"train.jsonl": '\ufeff\n null\n{"text": "a", "label": 1}'}, r"\(line 2 of train\.jsonl is null; must be an "),
        ({"train.jsonl": '{"text": "a", "label": 1}\nnull\n'}, r"\(line 2 of train\.jsonl is null; must be an "),
        ({"train.json": '[{"text": "\\ud83d\\ude00 \\\\ud83d", "label": 1},\n{"text": "\\uDE00\\ud83d", "label": 2}]'},
         r"\(line 2 of train\.json holds \\uDE00, which is half of a character, without the other half\)$"),
        ({"train.jsonl": r'{"text": "\ud83d", "label": 1}'}, r"\(line 1 of train\.jsonl holds \\ud83d, which is half"),
        ({"train.parquet": table()[:0]}, r"the split train cannot be read \(train\.parquet has no rows\)$"),
        ({"train.parquet": table().assign(marks=MARKS)}, r"\(the column marks is of a type that cannot be read: map<"),
        ({"train-0-of-2.parquet": table(["a"], [1]), "train-1-of-2.parquet": table(["b"], [0.5])},
         r"read \(its columns, and the type of each, must be the same in all rows and files; Float value 0\.5"),
        ({"train-0-of-2.jsonl": table(["a"], [1]), "train-1-of-2.jsonl": '{"text": "b", "mark": 1}'},
         r"read \(its columns, and the type of each, must be the same in all rows and files; there are 1 new col"),
        ({"train.parquet": "no Parquet"}, "the split train cannot be read .*[Pp]arquet"),
        ({"train.csv": "text,label\na,1\n", "test.jsonl": "{}"}, r"must hold files of one kind, but holds \.csv, \.js"),
        ({"train.csv": "text,label\na,1\nb,2\n", "test.csv": "sentence,label\na,1\n"},
         "the split test must have the columns text, label, but lacks text; it has sentence, label$"),
        ({"readme.md": "", "x.xlsx": ""}, r"must hold files of the kind \.csv, .*; it holds readme\.md, x\.xlsx$"),
        ({}, "it holds nothing$"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_one_line(files: dict[str, Any], message: str, tmp_path: Path) -> None:
    refused(write(tmp_path / "root", files), message)


def test_folders_in_the_place_of_files_are_named(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write(tmp_path / "root" / f"{split}.parquet", {"part-00000-4f.snappy.parquet": table()})
    refused(tmp_path / "root", r"^\S+: must hold files, and test\.parquet, train\.parquet are folders, as Spark ")


def test_labels_of_several_types_are_refused_or_taken_as_names(tmp_path: Path) -> None:
    root = write(tmp_path / "root", {"train.csv": table(["a", "b", "c", "d"], ["1", "high", "2.5", "1"])})
    refused(root, r"dataset\.label_column=label: must hold either numbers or names, but holds '1' and 'high'")
    assert load(root, task="classification").classes == ("1", "2.5", "high")


def test_a_missing_root_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", r"dataset\.root=\S*nowhere: no such file or folder$")
    (tmp_path / "sheet.xlsx").touch()
    refused(tmp_path / "sheet.xlsx", r"dataset\.root=\S*xlsx: must be a file of the kind \.csv, ")


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_name_that_is_a_chain_for_fsspec_is_read(suffix: str, tmp_path: Path) -> None:
    rows = write(tmp_path / "zip::own", {f"train::1{suffix}": table()})
    assert load(rows / f"train::1{suffix}") == load(write(tmp_path / "plain", {f"train{suffix}": table()}))


@pytest.mark.parametrize("content", ["null", '["train"]', '{"splits": 1}', '{"splits": [["train"]]}'])
def test_a_list_of_splits_in_another_form_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "dataset_dict.json").write_text(content)
    refused(tmp_path, r"cannot be read \(dataset_dict\.json must be an object whose \"splits\" is a list of names\)$")


def test_a_saved_split_without_rows_is_named(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_pandas(table())
    datasets.DatasetDict({"train": rows, "test": rows.select([])}).save_to_disk(str(tmp_path))
    refused(tmp_path, r"^dataset\.root=\S*: cannot be read \(the split test has no rows\)$")


def test_a_damaged_saved_folder_is_refused(tmp_path: Path) -> None:
    rows = class_labels(["good", "fine", "bad"], NAMES)
    datasets.DatasetDict({"train": rows}).save_to_disk(str(tmp_path / "root"))
    for file in tmp_path.glob("root/train/*.arrow"):
        file.write_bytes(b"not arrow")
    refused(tmp_path / "root", r"dataset\.root=\S*root: cannot be read")
    # One bit of the place where a text ends. The process would end at a read beyond the file.
    damaged = datasets.Dataset.from_dict({"text": ["x" * 1000] * 8, "label": [0, 1] * 4})
    damaged.save_to_disk(str(tmp_path / "bit"))
    (file,) = tmp_path.glob("bit/*.arrow")
    ends = b"".join(number.to_bytes(4, "little") for number in range(0, 8001, 1000))
    place = (content := file.read_bytes()).index(ends)
    file.write_bytes(content[: place + 11] + b"\x40" + content[place + 12 :])
    refused(tmp_path / "bit", r"dataset\.root=\S*bit: cannot be read \(Column 0: In chunk 0: Invalid: ")
    (tmp_path / "root").rename(tmp_path / "zip::root")
    refused(tmp_path / "zip::root", "must be a path without ::, which the datasets library cannot read$")


def test_the_hub_is_not_asked_for_a_local_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "user" / "name", {"train.csv": table()})
    refused(
        None,
        r"dataset\.hub=user/name: there is a local file or folder of that name; set dataset\.root",
        hub="user/name",
    )


@pytest.mark.parametrize("name", ["csv", "json", "imagefolder"])
def test_a_module_of_the_datasets_library_is_no_dataset(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(write(tmp_path / "root", {"train.csv": table()}))
    refused(None, rf"^dataset\.hub={name}: must be the name of a dataset on the hub; set dataset\.root", hub=name)


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ConnectionError("Couldn't reach 'user/name' on the Hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    refused(
        None, r"^dataset\.hub=user/name: cannot be loaded \(Couldn't reach 'user/name' on the Hub\)$", hub="user/name"
    )


def test_the_yaml_of_a_dataset_on_the_hub_that_is_broken_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: yaml.safe_load("configs: [: {"))
    line = r"cannot be loaded \(the YAML at the top of the dataset's README\.md cannot be read: expected the node"
    refused(None, rf"^dataset\.hub=user/name: {line}", hub="user/name")


@pytest.mark.parametrize("kind", [".csv", ".jsonl"])
def test_a_text_of_megabytes_is_read(kind: str, tmp_path: Path) -> None:
    long = "word " * 400_000
    root = write(
        tmp_path / "root", {f"train{kind}": table([long, "short"], ["a", "b"]), f"test{kind}": table(["x"], ["a"])}
    )
    assert load(root).train.inputs[0] == (long,)


def test_an_edited_file_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    for word in ("first", "second"):
        file.write_text("".join(json.dumps({"text": f"{word} {label}", "label": label}) + "\n" for label in range(10)))
        dataset = load(tmp_path, train_fraction=0.5 if word == "first" else 0.6)
        assert {text.split()[0] for (text,) in dataset.train.inputs} == {word}


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_an_edited_file_that_keeps_its_time_is_read_again(tmp_path: Path, suffix: str) -> None:
    for word in ("one", "two"):
        write(tmp_path, {f"train{suffix}": table([f"{word} {number}" for number in range(10)])})
        os.utime(tmp_path / f"train{suffix}", (1, 1))
        dataset = load(tmp_path, train_fraction=0.5 if word == "one" else 0.6)
        assert {text.split()[0] for (text,) in dataset.train.inputs} == {word}


def test_a_split_that_lacks_a_shard_is_refused(tmp_path: Path) -> None:
    write(tmp_path, {"train-00000-of-00002.parquet": table(), "test.parquet": table()})
    refused(tmp_path, "the split train must be in 2 files, as its file train-00000-of-00002.parquet says, and has 1$")
    write(tmp_path, {"train-00001-of-00002.parquet": table()})
    assert len(load(tmp_path).train) == 20


def test_a_shard_without_rows_and_a_null_that_is_a_value_are_read(tmp_path: Path) -> None:
    for shard, rows in enumerate((table(), table()[:0])):
        write(tmp_path / "shards", {f"train-0000{shard}-of-00002.parquet": rows})
    assert len(load(tmp_path / "shards").train) == 8
    write(tmp_path / "json", {"train-0-of-2.json": "[]", "train-1-of-2.json": table()})
    assert len(load(tmp_path / "json").train) == 8
    content = '[{"text": "a", "label": 1, "more": [\nnull\n]},\n{"text": "b", "label": 2, "more":\nnull\n}]'
    write(tmp_path / "lines", {"train.json": content, "test.json": table(["c"], [1])})
    assert load(tmp_path / "lines").train.inputs == [("a",), ("b",)]


def test_a_class_whose_name_is_not_utf8_is_refused(tmp_path: Path) -> None:
    class_labels(["good", "fine", "bad"], NAMES).save_to_disk(str(tmp_path))
    about = tmp_path / "dataset_info.json"
    about.write_text(about.read_text().replace("fine", "\\ud800"))
    refused(tmp_path, r"^dataset=own: the name of a class must be text in UTF-8, not empty, and one is .")


def test_files_that_hold_no_rows_are_left_out(tmp_path: Path) -> None:
    root = write(tmp_path / "root", {"._train.csv": "\0", "train.csv": table(), ".~lock.train.csv#": "x"})
    assert len(load(root).train) == 8
    write(tmp_path / "clone", {"dataset_infos.json": "{}"})
    write(tmp_path / "clone" / "data", {"train.parquet": table()})
    assert len(load(tmp_path / "clone").train) == 8


@pytest.mark.parametrize("form", ["torch", "numpy", "pandas", "arrow"])
def test_the_format_of_a_saved_dataset_does_not_matter(tmp_path: Path, form: str) -> None:
    rows = datasets.Dataset.from_pandas(table(labels=[number % 3 for number in range(10)]).assign(length=1))
    plain, formatted = tmp_path / "plain", tmp_path / "formatted"
    rows.save_to_disk(str(plain))
    rows.with_format(form, columns=["label", "length"]).save_to_disk(str(formatted))
    one, other = load(plain), load(formatted)
    assert (one.train.inputs[0], one.train.labels, one.classes) == (
        other.train.inputs[0],
        other.train.labels,
        other.classes,
    )


def test_what_the_datasets_library_shows_is_as_it_was_before(tmp_path: Path) -> None:
    root = write(tmp_path / "root", {"train.jsonl": table(), "test.jsonl": table()})
    datasets.enable_progress_bars()
    level = datasets.utils.logging.get_verbosity()
    load(root)
    (root / "test.jsonl").write_text("{")
    refused(root, "the split test cannot be read", train_size=9)
    assert datasets.utils.logging.get_verbosity() == level
    assert not datasets.are_progress_bars_disabled()
