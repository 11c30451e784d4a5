"""Runs on texts, from the files to the record and back to a model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from tenslora.harness.data import load_dataset
from tenslora.harness.data.encoding import encode
from tenslora.harness.evaluate import scores_of
from tenslora.harness.export import export
from tenslora.harness.load_run import LoadedRun, load_run
from tenslora.harness.run_record import describe_run
from tests.harness.conftest import TINY_BERT
from tests.running import record, run


def outputs_and_labels(loaded: LoadedRun, model: torch.nn.Module) -> tuple[np.ndarray, np.ndarray]:
    """A model's outputs on the test split of a run, and the labels."""
    dataset = load_dataset(loaded.run.dataset, loaded.run.seed)
    data = encode(dataset, loaded.run.dataset, loaded.backbone, loaded.tokenizer)
    inputs, labels = data.collate([data.scored[index] for index in range(len(data.scored))])
    with torch.no_grad():
        return model.eval()(**inputs).logits.numpy(), labels.numpy()


def test_a_regression_has_one_output_and_two_correlations(regression_run: Path) -> None:
    saved = record(regression_run)
    assert (saved["task"], saved["classes"], saved["dataset"]) == ("regression", [], "pairs")
    assert (saved["train_examples"], saved["test_examples"]) == (48, 12)
    assert saved["scores"] == ["pearson", "spearman"]
    loaded = load_run(regression_run)
    outputs, labels = outputs_and_labels(loaded, loaded.backbone.model)
    assert outputs.shape == (12, 1)
    assert saved["metrics"]["last"] == pytest.approx(np.corrcoef(outputs[:, 0], labels)[0, 1], abs=1e-6)
    assert saved["metrics"]["history"][-1]["test_loss"] == pytest.approx(((outputs[:, 0] - labels) ** 2).mean(), 1e-5)
    assert f"pearson: last {saved['metrics']['last']:.4f}, best" in describe_run(saved)
    assert f", spearman {saved['metrics']['others_last']['spearman']:.4f}" in describe_run(saved)


def test_transformers_loads_a_merged_regression(regression_run: Path, tmp_path: Path) -> None:
    loaded = load_run(regression_run)
    expected, _ = outputs_and_labels(loaded, loaded.backbone.model)
    export(regression_run, "merged", tmp_path / "merged")
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert (merged.config.num_labels, merged.config.problem_type) == (1, "regression")
    np.testing.assert_allclose(outputs_and_labels(loaded, merged)[0], expected, atol=1e-5)


def test_mnli_is_scored_on_both_of_its_validation_splits(tmp_path: Path) -> None:
    labels = ("entailment", "neutral", "contradiction")

    def lines(columns: int, shift: int) -> str:
        rows = [
            ["x"] * 8 + [f"a {n % 3} cat", f"a {n % 5} dog"] + [labels[(n + shift) % 3]] * columns for n in range(30)
        ]
        return "\n".join(["header", *map("\t".join, rows)])

    for name, content in {"train": lines(2, 0), "dev_matched": lines(6, 0), "dev_mismatched": lines(6, 1)}.items():
        (tmp_path / f"{name}.tsv").write_text(content)
    saved = run(tmp_path / "run", "dataset=mnli", f"dataset.root={tmp_path}", *TINY_BERT, "dataset.train_size=20")
    assert (saved["scores"], saved["more_test_examples"]) == (["accuracy", "accuracy_mismatched"], {"mismatched": 30})
    # Both splits have the same sentences with different labels, so that no guess is right in both.
    metrics = saved["metrics"]
    assert metrics["others_last"] == {"accuracy_mismatched": metrics["history"][-1]["accuracy_mismatched"]}
    assert 0 < metrics["last"] + metrics["others_last"]["accuracy_mismatched"] <= 1
    assert ", accuracy_mismatched " in describe_run(saved)
    evaluation = load_run(tmp_path / "run").evaluate()
    assert {"test_loss": evaluation.loss, **evaluation.scores} == scores_of(saved)
