from __future__ import annotations

import csv
import logging
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from tenslora.errors import TensLoRAError
from tenslora.harness.config import TextDatasetConfig
from tenslora.harness.data import Dataset, load_dataset


def load(name: str, root: Path, **changes: Any) -> Dataset:
    """Load a task. It trains on its train split and is tested on its validation split, or as `changes` say."""
    settings: dict[str, Any] = {
        "metrics": ("accuracy",),
        "train_splits": ("train",),
        "test_split": "validation",
        "train_size": None,
        "max_length": 32,
        "padding": "longest",
        "group_by_length": False,
        **changes,
    }
    return load_dataset(TextDatasetConfig(name=name, modality="text", root=str(root), **settings), seed=0)


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode())
    return folder


# Of each task: a published file, the sentences in it, and their labels.
GLUE: dict[str, tuple[str, list[tuple[str, ...]], list[float]]] = {
    "cola": ("gj04\t1\t\tA cat sat.\ngj04\t0\t*\tSat cat a.\n", [("A cat sat.",), ("Sat cat a.",)], [1, 0]),
    "mrpc": (
        "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n"
        "1\t7\t8\tIt rose.\tIt went up.\r\n0\t9\t10\tIt fell.\tRain.\r\n",
        [("It rose.", "It went up."), ("It fell.", "Rain.")],
        [1, 0],
    ),
    "sst2": ("sentence\tlabel\na fine film \t1\ndull \t0\n", [("a fine film ",), ("dull ",)], [1, 0]),
    "qnli": (
        "index\tquestion\tsentence\tlabel\n0\tWho?\tAnn did.\tentailment\n1\tWhen?\tAnn did.\tnot_entailment\n",
        [("Who?", "Ann did."), ("When?", "Ann did.")],
        [0, 1],
    ),
    "rte": (
        "index\tsentence1\tsentence2\tlabel\n"
        "0\tAnn ran.\tAnn moved.\tentailment\n1\tAnn ran.\tBob ran.\tnot_entailment\n",
        [("Ann ran.", "Ann moved."), ("Ann ran.", "Bob ran.")],
        [0, 1],
    ),
    "mnli": (
        "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\t"
        "sentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label\n"
        "0\t3\t3n\tfiction\t(\t(\t(\t(\tAnn ran.\tBob saw Ann run.\tentailment\tneutral\n"
        "1\t4\t4c\ttravel\t(\t(\t(\t(\tAnn ran.\tAnn sat.\tcontradiction\tcontradiction\n",
        [("Ann ran.", "Bob saw Ann run."), ("Ann ran.", "Ann sat.")],
        [1, 2],
    ),
    "qqp": (
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
        "7\t1\t2\tHow old is it?\tWhat is its age?\t1\n8\t3\t4\tWhy\n9\t5\t6\tWho?\tWhen?\t0\n",
        [("How old is it?", "What is its age?"), ("Who?", "When?")],
        [1, 0],
    ),
    "stsb": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
        "0\tmain-captions\tMSRvid\t2012test\t1\tnone\tnone\tA plane.\tAn air plane.\t5.000\n"
        "1\tmain-captions\tMSRvid\t2012test\t4\tnone\tnone\tA man.\tA flute.\t0.75\n",
        [("A plane.", "An air plane."), ("A man.", "A flute.")],
        [5.0, 0.75],
    ),
    "wnli": (
        "index\tsentence1\tsentence2\tlabel\n"
        "0\tThe pin made a hole. I pulled it out.\tI pulled the pin out.\t1\n1\tAnn saw Eve. She ran.\tAnn ran.\t0\n",
        [("The pin made a hole. I pulled it out.", "I pulled the pin out."), ("Ann saw Eve. She ran.", "Ann ran.")],
        [1, 0],
    ),
}

ARCHIVES = dict(zip(GLUE, ("CoLA", "MRPC", "SST-2", "QNLI", "RTE", "MNLI", "QQP", "STS-B", "WNLI"), strict=True))
"""The folders in which GLUE publishes its tasks."""


def write_glue(name: str, root: Path, unpacked: bool = False) -> dict[str, str]:
    """Write a task's files as GLUE publishes them, and return the split to test on."""
    content = GLUE[name][0]
    tests = ["dev.tsv"]
    if name == "mnli":  # the files for tests have the labels of five annotators
        tests = ["dev_matched.tsv", "dev_mismatched.tsv"]
    wide = content.replace("label1", "label1\tlabel2\tlabel3\tlabel4\tlabel5")
    for label in ("entailment", "contradiction"):
        wide = wide.replace(f"\t{label}\t", f"\t{label}" * 5 + "\t")
    folder = ARCHIVES[name] if unpacked else ""
    write(root / folder, {"train.tsv": content, **dict.fromkeys(tests, wide if name == "mnli" else content)})
    return {"test_split": "validation_matched" if name == "mnli" else "validation"}


@pytest.mark.parametrize("folder", ["cola_public", "cola_public/raw", ""], ids=["unpacked", "files", "beside"])
def test_published_cola_is_read_as_the_csv_module_reads_it(
    folder: str, shared: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    dataset = load("cola", shared / "data" / folder)
    assert (len(dataset.train), len(dataset.test)) == (8551, 1043)

    def rows(name: str) -> list[list[str]]:
        with open(shared / "data" / "cola_public" / "raw" / name, encoding="utf-8", newline="\n") as file:
            return list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))

    for examples, expected in (
        (dataset.train, rows("in_domain_train.tsv")),
        (dataset.test, rows("in_domain_dev.tsv") + rows("out_of_domain_dev.tsv")),
    ):
        assert list(examples.inputs) == [(row[3],) for row in expected]
        assert list(examples.labels) == [int(row[1]) for row in expected]
    assert dataset.classes == ("unacceptable", "acceptable")
    assert not caplog.records  # the sizes are the published ones


@pytest.mark.parametrize("name", GLUE)
@pytest.mark.parametrize("unpacked", [False, True], ids=["files", "archive"])
def test_the_files_that_glue_publishes(name: str, unpacked: bool, tmp_path: Path) -> None:
    _, sentences, labels = GLUE[name]
    dataset = load(name, tmp_path, **write_glue(name, tmp_path, unpacked))
    assert list(dataset.more_tests) == (["mismatched"] if name == "mnli" else [])
    assert (dataset.task, dataset.outputs) == {
        "mnli": ("classification", 3), "stsb": ("regression", 1)
    }.get(name, ("classification", 2))  # fmt: skip
    for examples in (dataset.train, dataset.test, *dataset.more_tests.values()):
        assert list(examples.inputs) == sentences
        assert list(examples.labels) == labels


def test_class_names_go_with_the_labels(tmp_path: Path) -> None:
    class_of_the_first_example = {
        "cola": "acceptable",
        "mrpc": "equivalent",
        "sst2": "positive",
        "qnli": "entailment",
        "rte": "entailment",
        "mnli": "neutral",
        "qqp": "duplicate",
        "wnli": "entailment",
    }
    for name, expected in class_of_the_first_example.items():
        test_split = write_glue(name, tmp_path, unpacked=True)  # all tasks in one folder, as GLUE's script leaves them
        assert load(name, tmp_path, **test_split).classes[int(GLUE[name][2][0])] == expected


def test_the_mismatched_split_can_be_the_only_one(tmp_path: Path) -> None:
    write_glue("mnli", tmp_path)
    (tmp_path / "dev_matched.tsv").unlink()
    dataset = load("mnli", tmp_path, test_split="validation_mismatched")
    assert (len(dataset.test), dataset.more_tests) == (2, {})


def test_a_score_that_is_no_number_is_named(tmp_path: Path) -> None:
    write_glue("stsb", tmp_path)
    (tmp_path / "dev.tsv").write_text(GLUE["stsb"][0].replace("0.75", "high"))
    with pytest.raises(TensLoRAError, match=r"dev\.tsv:3: the score is 'high'; it must be a number"):
        load("stsb", tmp_path)
    (tmp_path / "dev.tsv").write_text(GLUE["stsb"][0].replace("0.75", "nan"))
    with pytest.raises(TensLoRAError, match=r"the validation split has an unlabelled example \(label nan\)"):
        load("stsb", tmp_path)


def test_published_mrpc_is_tested_on_its_test_file(tmp_path: Path) -> None:
    header = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n"
    train = header + '1\t702876\t702977\tHe said, "It rose.\tIt rose, he said.\r\n0\t1\t2\t"A"\t""B\r\n'
    test = header + "0\t3\t4\tNo.\tYes.\r\n"
    root = write(tmp_path, {"msr_paraphrase_train.txt": train, "msr_paraphrase_test.txt": test})
    dataset = load("mrpc", root)
    assert list(dataset.train.inputs) == [('He said, "It rose.', "It rose, he said."), ('"A"', '""B')]
    assert list(dataset.train.labels) == [1, 0]
    assert list(dataset.test.inputs) == [("No.", "Yes.")]


def test_published_mrpc_is_tested_on_a_dev_file_if_there_is_one(tmp_path: Path) -> None:
    content = GLUE["mrpc"][0]
    other = content.replace("rose", "sank")
    root = write(tmp_path, {"msr_paraphrase_train.txt": content, "msr_paraphrase_test.txt": content, "dev.tsv": other})
    assert load("mrpc", root).test.inputs[0] == ("It sank.", "It went up.")


@pytest.mark.parametrize("separator", ["\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\r"])
def test_a_sentence_may_hold_line_separators_other_than_newline(separator: str, tmp_path: Path) -> None:
    content = f"gj04\t1\t\tA{separator}cat.\ngj04\t0\t*\tSat.\n"
    dataset = load("cola", write(tmp_path, {"train.tsv": content, "dev.tsv": content}))
    assert list(dataset.train.inputs) == [(f"A{separator}cat.",), ("Sat.",)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("gj04\t1\tno sentence", "3 .*columns .*4"),
        ("gj04\t1\t\tone\ttoo many", "5 .*columns .*4"),
        ("gj04\t2\t\tA third class.", "label is '2'.* 0, 1"),
        ("gj04\t\t\tNo class.", "label is ''.* 0, 1"),
        ("gj04\t1\t\t \xa0", "has no text$"),
    ],
)
def test_a_broken_line_is_named(line: str, message: str, tmp_path: Path) -> None:
    good = GLUE["cola"][0]
    root = write(tmp_path, {"train.tsv": good + line + "\n" + good, "dev.tsv": good})
    with pytest.raises(TensLoRAError, match=rf"train\.tsv:3: .*{message}"):
        load("cola", root)


def test_blank_lines_and_a_missing_last_newline_change_nothing(tmp_path: Path) -> None:
    good = GLUE["cola"][0]
    root = write(tmp_path, {"train.tsv": good + "\n" + good + "\n\n", "dev.tsv": good.rstrip("\n")})
    dataset = load("cola", root)
    assert list(dataset.train.inputs) == GLUE["cola"][1] * 2
    assert list(dataset.test.inputs) == GLUE["cola"][1]


def test_text_that_is_not_utf8_names_the_file(tmp_path: Path) -> None:
    root = write(tmp_path, {"dev.tsv": GLUE["cola"][0]})
    (root / "train.tsv").write_bytes(b"gj04\t1\t\tcaf\xe9.\n")
    with pytest.raises(TensLoRAError, match=r"train\.tsv: .*UTF-8"):
        load("cola", root)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TensLoRAError, match=r"dataset\.root=.*nowhere: no such folder"):
        load("cola", tmp_path / "nowhere")


def test_a_missing_split_is_refused_with_the_files_that_would_hold_it(tmp_path: Path) -> None:
    root = write(tmp_path, {"train.tsv": GLUE["cola"][0]})
    with pytest.raises(TensLoRAError, match=r"no validation split of cola .*out_of_domain_dev\.tsv or dev\.tsv"):
        load("cola", root)


def test_an_unknown_split_is_refused_with_the_splits_there_are(tmp_path: Path) -> None:
    root = write(tmp_path, {"train.tsv": GLUE["cola"][0], "dev.tsv": GLUE["cola"][0]})
    with pytest.raises(TensLoRAError, match=r"no evaluation split of cola.*train.*validation"):
        load("cola", root, test_split="evaluation")


def test_an_unknown_task_is_refused_with_the_tasks_there_are(tmp_path: Path) -> None:
    with pytest.raises(TensLoRAError, match=r"dataset\.name=ax: .*cola, mrpc, sst2, qnli, rte"):
        load("ax", tmp_path)


def test_no_training_split_is_refused(tmp_path: Path) -> None:
    root = write(tmp_path, {"train.tsv": GLUE["cola"][0], "dev.tsv": GLUE["cola"][0]})
    with pytest.raises(TensLoRAError, match="no training examples"):
        load("cola", root, train_splits=None)


def test_training_splits_are_joined_and_train_size_draws_from_them(tmp_path: Path) -> None:
    lines = [f"x\t{i % 2}\t\tSentence {i}.\n" for i in range(20)]
    root = write(tmp_path, {"train.tsv": "".join(lines[:12]), "dev.tsv": "".join(lines[12:])})
    joined = load("cola", root, train_splits=("train", "validation")).train
    assert [row for (row,) in joined.inputs] == [f"Sentence {i}." for i in range(20)]
    drawn = load("cola", root, train_splits=("train", "validation"), train_size=7).train
    assert len(drawn) == len(drawn.inputs) == len(set(drawn.inputs)) == 7
    for (sentence,), label in zip(drawn.inputs, drawn.labels, strict=True):
        assert int(sentence.split()[1].rstrip(".")) % 2 == label


def hub_rows(labels: list[int]) -> datasets.Dataset:
    count = len(labels)
    return datasets.Dataset.from_dict(
        {"question": [f"Q{i}?" for i in range(count)], "sentence": [f"A{i}." for i in range(count)], "label": labels}
    )


@pytest.fixture
def quiet_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.mark.usefixtures("quiet_datasets")
@pytest.mark.parametrize("form", ["datasets", "parquet", "parquet in a folder of the task"])
def test_a_datasets_folder_and_parquet_files(form: str, tmp_path: Path) -> None:
    splits = {"train": hub_rows([0, 1, 1]), "validation": hub_rows([1, 0]), "test": hub_rows([-1, -1])}
    root = tmp_path / "root"
    if form == "datasets":
        datasets.DatasetDict(splits).save_to_disk(str(root))
    else:
        folder = root / "qnli" if form.endswith("task") else root
        folder.mkdir(parents=True)
        for split, rows in splits.items():
            rows.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    dataset = load("qnli", root)
    assert list(dataset.train.inputs) == [("Q0?", "A0."), ("Q1?", "A1."), ("Q2?", "A2.")]
    assert list(dataset.train.labels) == [0, 1, 1]
    assert list(dataset.test.labels) == [1, 0]
    with pytest.raises(TensLoRAError, match="test split has an unlabelled example"):
        load("qnli", root, test_split="test")
    with pytest.raises(TensLoRAError, match=r"no validation_matched split of qnli"):
        load("qnli", root, test_split="validation_matched")


@pytest.mark.usefixtures("quiet_datasets")
def test_a_pair_may_lack_one_sentence_but_not_both(tmp_path: Path) -> None:
    for folder, first in (("one", "Q?"), ("none", " ")):
        rows = {"question": ["Q?", first], "sentence": ["A.", ""], "label": [0, 1]}
        (tmp_path / folder).mkdir()
        for split in ("train", "validation"):
            datasets.Dataset.from_dict(rows).to_parquet(tmp_path / folder / f"{split}-00000-of-00001.parquet")
    assert list(load("qnli", tmp_path / "one").train.inputs) == [("Q?", "A."), ("Q?", "")]
    with pytest.raises(TensLoRAError, match=r"^dataset=qnli: row 2 of the train split has no text$"):
        load("qnli", tmp_path / "none")


@pytest.mark.usefixtures("quiet_datasets")
def test_a_datasets_folder_of_another_task_is_refused_with_its_columns(tmp_path: Path) -> None:
    datasets.DatasetDict({"train": hub_rows([0]), "validation": hub_rows([1])}).save_to_disk(str(tmp_path / "root"))
    with pytest.raises(TensLoRAError, match="no column sentence1, sentence2; it has question, sentence, label"):
        load("rte", tmp_path / "root")


@pytest.mark.usefixtures("quiet_datasets")
@pytest.mark.parametrize("form", ["datasets", "parquet"])
def test_a_damaged_datasets_folder_is_refused_in_one_line(form: str, tmp_path: Path) -> None:
    root = tmp_path / "root"
    if form == "datasets":
        datasets.DatasetDict({"train": hub_rows([0]), "validation": hub_rows([1])}).save_to_disk(str(root))
        for file in root.glob("train/*.arrow"):
            file.write_bytes(b"not arrow")
    else:
        root.mkdir()
        (root / "train-00000-of-00001.parquet").write_bytes(b"not parquet")
    with pytest.raises(TensLoRAError, match=r"dataset\.root=\S*root") as caught:
        load("qnli", root)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("quiet_datasets")
@pytest.mark.parametrize(
    "column",
    [{"label": ["0", "1", "1"]}, {"label": [0, 1, None]}, {"label": [0.5, 1.0, 1.0]}, {"question": ["a", None, "c"]}],
)
def test_parquet_with_labels_or_sentences_of_another_type_is_refused_in_one_line(
    column: dict[str, list[object]], tmp_path: Path
) -> None:
    rows = {"question": ["a", "b", "c"], "sentence": ["x", "y", "z"], "label": [0, 1, 1], **column}
    for split in ("train", "validation"):
        datasets.Dataset.from_dict(rows).to_parquet(tmp_path / f"{split}-00000-of-00001.parquet")
    with pytest.raises(
        TensLoRAError, match=rf"^dataset=qnli: row [123] of the train split has .* as its {next(iter(column))}; must be"
    ) as caught:
        load("qnli", tmp_path)
    assert len(str(caught.value)) < 300


@pytest.mark.usefixtures("quiet_datasets")
def test_files_of_one_split_with_labels_of_several_types_are_refused_in_one_line(tmp_path: Path) -> None:
    for number, label in enumerate([1, "yes"]):
        rows = datasets.Dataset.from_dict({"sentence": ["a"], "label": [label]})
        rows.to_parquet(tmp_path / f"train-{number}.parquet")
    with pytest.raises(
        TensLoRAError, match=r"^dataset\.root=\S+: cannot be read \(its columns, and the type of each, m"
    ):
        load("cola", tmp_path)


@pytest.mark.usefixtures("quiet_datasets")
def test_the_classes_of_a_datasets_folder_are_those_of_the_task(tmp_path: Path) -> None:
    orders = [["entailment", "not_entailment"], ["0", "1"], ["not_entailment", "entailment"], ["good", "bad", "fine"]]
    for number, names in enumerate(orders):
        rows = hub_rows([0, 1]).cast_column("label", datasets.ClassLabel(names=names))
        root = tmp_path / str(number)
        datasets.DatasetDict({"train": rows, "validation": rows}).save_to_disk(str(root))
        if number < 2:
            assert list(load("qnli", root).train.labels) == [0, 1]
            continue
        with pytest.raises(
            TensLoRAError, match=rf"must be entailment, not_.*, and are {', '.join(names)}; dataset=text"
        ):
            load("qnli", root)


@pytest.mark.usefixtures("quiet_datasets")
def test_a_sentence_of_parquet_that_is_not_utf8_is_refused_in_one_line(tmp_path: Path) -> None:
    sentences = pyarrow.array([b"tea", b"caf\xe9"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"sentence": sentences, "label": [0, 1]}), tmp_path / "train-0.parquet")
    with pytest.raises(
        TensLoRAError,
        match=r"^dataset=cola: the train split: row 2 of the column sentence cannot be read \(must be text in UTF-8\)$",
    ):
        load("cola", tmp_path)


def test_a_split_of_another_size_than_published_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = GLUE["cola"][0]
    load("cola", write(tmp_path, {"train.tsv": content, "dev.tsv": content}))
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == [
        "cola: the train split has 2 examples here, 8551 as published",
        "cola: the validation split has 2 examples here, 1043 as published",
    ]
