"""The tasks of GLUE, and the layout of their files on the hub and as published."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class GlueTask:
    """One task, which assigns a class or a value to each sentence or pair of sentences.

    Args:
        folder: the folder of the task's published files in GLUE's archives.
        sentences: the hub's names for the columns of the one or two sentences.
        classes: the names of the classes, in the order of the hub's labels; () for a regression.
        column_counts: the numbers of columns that a published file may have.
        sentence_columns: the indices of the columns that hold the sentences.
        label_column: the index of the column that holds the label.
        labels: the entries of the label column of a published file, by class number; () for a regression.
        header: whether the first line of a published file names the columns.
        files: for each split, alternatives. Each alternative is a list of published files that together are the split.
        sizes: for each split, the published numbers of examples, one for each published version of the split.
        more_tests: the splits that a run is scored on beside its test split, by the name that their scores get.
        has_broken_lines: whether the published files have lines with too few columns, which are left out.
    """

    folder: str
    sentences: tuple[str, ...]
    classes: tuple[str, ...]
    column_counts: tuple[int, ...]
    sentence_columns: tuple[int, ...]
    label_column: int
    labels: tuple[str, ...]
    header: bool
    files: dict[str, list[list[str]]]
    sizes: dict[str, set[int]]
    more_tests: dict[str, str] = field(default_factory=dict)
    has_broken_lines: bool = False


HUB = "nyu-mll/glue"
"""The repository on the Hugging Face hub."""

FOLDERS = ("", "raw", "cola_public/raw")
"""Folders in which the published archives have their files, relative to where an archive is unpacked."""

_FILES = {"train": [["train.tsv"]], "validation": [["dev.tsv"]]}

GLUE_TASKS = {
    "cola": GlueTask(
        folder="CoLA",
        sentences=("sentence",),
        classes=("unacceptable", "acceptable"),
        column_counts=(4,),
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
        folder="MRPC",
        sentences=("sentence1", "sentence2"),
        classes=("not_equivalent", "equivalent"),
        column_counts=(5,),
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
        folder="SST-2",
        sentences=("sentence",),
        classes=("negative", "positive"),
        column_counts=(2,),
        sentence_columns=(0,),
        label_column=1,
        labels=("0", "1"),
        header=True,
        files=_FILES,
        sizes={"train": {67349}, "validation": {872}},
    ),
    "qnli": GlueTask(
        folder="QNLI",
        sentences=("question", "sentence"),
        classes=("entailment", "not_entailment"),
        column_counts=(4,),
        sentence_columns=(1, 2),
        label_column=3,
        labels=("entailment", "not_entailment"),
        header=True,
        files=_FILES,
        sizes={"train": {104743}, "validation": {5463}},
    ),
    "rte": GlueTask(
        folder="RTE",
        sentences=("sentence1", "sentence2"),
        classes=("entailment", "not_entailment"),
        column_counts=(4,),
        sentence_columns=(1, 2),
        label_column=3,
        labels=("entailment", "not_entailment"),
        header=True,
        files=_FILES,
        sizes={"train": {2490}, "validation": {277}},
    ),
    "mnli": GlueTask(
        folder="MNLI",
        sentences=("premise", "hypothesis"),
        classes=("entailment", "neutral", "contradiction"),
        column_counts=(12, 16),  # one annotator's label and the final one, or five annotators' labels and the final one
        sentence_columns=(8, 9),
        label_column=-1,
        labels=("entailment", "neutral", "contradiction"),
        header=True,
        files={
            "train": [["train.tsv"]],
            "validation_matched": [["dev_matched.tsv"]],
            "validation_mismatched": [["dev_mismatched.tsv"]],
        },
        sizes={"train": {392702}, "validation_matched": {9815}, "validation_mismatched": {9832}},
        more_tests={"mismatched": "validation_mismatched"},
    ),
    "qqp": GlueTask(
        folder="QQP",
        sentences=("question1", "question2"),
        classes=("not_duplicate", "duplicate"),
        column_counts=(6,),
        sentence_columns=(3, 4),
        label_column=5,
        labels=("0", "1"),
        header=True,
        files=_FILES,
        sizes={"train": {363846}, "validation": {40430}},
        has_broken_lines=True,
    ),
    "stsb": GlueTask(
        folder="STS-B",
        sentences=("sentence1", "sentence2"),
        classes=(),
        column_counts=(10,),
        sentence_columns=(7, 8),
        label_column=9,
        labels=(),
        header=True,
        files=_FILES,
        sizes={"train": {5749}, "validation": {1500}},
    ),
    "wnli": GlueTask(
        folder="WNLI",
        sentences=("sentence1", "sentence2"),
        classes=("not_entailment", "entailment"),
        column_counts=(4,),
        sentence_columns=(1, 2),
        label_column=3,
        labels=("0", "1"),
        header=True,
        files=_FILES,
        sizes={"train": {635}, "validation": {71}},
    ),
}
"""All tasks, by the hub's names."""
