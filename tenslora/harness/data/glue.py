"""The tasks of GLUE, and the layout of their files on the hub and as published."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GlueTask:
    """One task, which assigns a class to each sentence or pair of sentences.

    Args:
        sentences: the hub's names for the columns of the one or two sentences.
        classes: the names of the classes, in the order of the hub's labels.
        column_count: the number of columns of a published file.
        sentence_columns: the indices of the columns that hold the sentences.
        label_column: the index of the column that holds the label.
        labels: the entries of the label column of a published file, by class number.
        header: whether the first line of a published file names the columns.
        files: for each split, alternatives. Each alternative is a list of published files that together are the split.
        sizes: for each split, the published numbers of examples, one for each published version of the split.
    """

    sentences: tuple[str, ...]
    classes: tuple[str, ...]
    column_count: int
    sentence_columns: tuple[int, ...]
    label_column: int
    labels: tuple[str, ...]
    header: bool
    files: dict[str, list[list[str]]]
    sizes: dict[str, set[int]]


HUB = "nyu-mll/glue"
"""The repository on the Hugging Face hub."""

FOLDERS = ("", "raw", "cola_public/raw", "CoLA", "MRPC", "SST-2", "QNLI", "RTE")
"""The folders in which the published archives have their files, relative to where an archive is unpacked."""

_FILES = {"train": [["train.tsv"]], "validation": [["dev.tsv"]]}

GLUE_TASKS = {
    "cola": GlueTask(
        sentences=("sentence",),
        classes=("unacceptable", "acceptable"),
        column_count=4,
        sentence_columns=(3,),
        label_column=1,
        labels=("0", "1"),
        header=False,
        files={
            "train": [["in_domain_train.tsv"], ["train.tsv"]],
            "validation": [["in_domain_dev.tsv", "out_of_domain_dev.tsv"], ["dev.tsv"]],
        },
        sizes={"train": {8551}, "validation": {1043}},
    ),
    "mrpc": GlueTask(
        sentences=("sentence1", "sentence2"),
        classes=("not_equivalent", "equivalent"),
        column_count=5,
        sentence_columns=(3, 4),
        label_column=0,
        labels=("0", "1"),
        header=True,
        files={
            "train": [["msr_paraphrase_train.txt"], ["train.tsv"]],
            "validation": [["dev.tsv"]],
            "test": [["msr_paraphrase_test.txt"]],
        },
        sizes={"train": {4076, 3668}, "validation": {408}, "test": {1725}},
    ),
    "sst2": GlueTask(
        sentences=("sentence",),
        classes=("negative", "positive"),
        column_count=2,
        sentence_columns=(0,),
        label_column=1,
        labels=("0", "1"),
        header=True,
        files=_FILES,
        sizes={"train": {67349}, "validation": {872}},
    ),
    "qnli": GlueTask(
        sentences=("question", "sentence"),
        classes=("entailment", "not_entailment"),
        column_count=4,
        sentence_columns=(1, 2),
        label_column=3,
        labels=("entailment", "not_entailment"),
        header=True,
        files=_FILES,
        sizes={"train": {104743}, "validation": {5463}},
    ),
    "rte": GlueTask(
        sentences=("sentence1", "sentence2"),
        classes=("entailment", "not_entailment"),
        column_count=4,
        sentence_columns=(1, 2),
        label_column=3,
        labels=("entailment", "not_entailment"),
        header=True,
        files=_FILES,
        sizes={"train": {2490}, "validation": {277}},
    ),
}
"""All tasks, by the hub's names."""
