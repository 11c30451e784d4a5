from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tenslora.errors import TensLoRAError
from tenslora.harness.run_record import summarize_history
from tenslora.harness.training.tasks import CLASSIFICATION, REGRESSION, evaluation_mode
from tests.toy import LinearModel, collate, examples, fit_toy


def test_classification_is_trained_by_cross_entropy() -> None:
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.5, 0.5]])
    by_hand = [-(2.0 - np.log(np.exp([2.0, 0.0, -1.0]).sum())), np.log(3)]
    labels = torch.tensor([0, 2])
    assert CLASSIFICATION.loss(logits, labels, "none").tolist() == pytest.approx(by_hand)
    assert CLASSIFICATION.loss(logits, labels, "mean").item() == pytest.approx(sum(by_hand) / 2)


def test_regression_is_trained_by_the_squared_error() -> None:
    outputs, labels = torch.tensor([[2.0], [0.5], [-1.0]]), torch.tensor([1.0, 0.5, 1.0], dtype=torch.float64)
    assert REGRESSION.loss(outputs, labels, "none").tolist() == [1.0, 0.0, 4.0]
    assert REGRESSION.loss(outputs, labels, "mean").item() == pytest.approx(5 / 3)


def test_metrics_of_another_task_or_number_of_classes_are_refused() -> None:
    CLASSIFICATION.check_metrics(["accuracy", "f1"], 2)
    CLASSIFICATION.check_metrics(["matthews"], 10)
    with pytest.raises(
        TensLoRAError,
        match=r"dataset\.metrics=f1: must be one of accuracy, matthews for a classification with 10 outputs$",
    ):
        CLASSIFICATION.check_metrics(["accuracy", "f1"], 10)
    with pytest.raises(TensLoRAError, match=r"dataset\.metrics=accuracy: .*for a regression with 1 output$"):
        REGRESSION.check_metrics(["accuracy"], 1)


def test_a_metric_that_does_not_apply_is_refused_before_a_step_is_made(tmp_path: Path) -> None:
    model = LinearModel()
    with pytest.raises(TensLoRAError, match=r"dataset\.metrics=f1: "):
        fit_toy(tmp_path, model=model, metrics=("accuracy", "f1"))
    assert torch.equal(model.linear.weight, LinearModel().linear.weight)


def test_a_regression_is_trained_and_scored(tmp_path: Path) -> None:
    model = LinearModel(outputs=1)
    words = ["trainer.epochs=40", "optimizer.lr=0.1"]
    history = fit_toy(tmp_path, *words, model=model, task=REGRESSION, metrics=("pearson",)).history
    inputs, labels = collate([examples(2, values=True)[i] for i in range(50)])
    values = model(**inputs)[:, 0].detach()
    assert history[-1]["test_loss"] == pytest.approx(((values - labels) ** 2).mean().item(), rel=1e-5)
    assert history[-1]["pearson"] == pytest.approx(np.corrcoef(values, labels)[0, 1], rel=1e-5)
    assert history[-1]["pearson"] > 0.99 > history[0]["pearson"]


def test_further_test_splits_are_scored_under_names_of_their_own(tmp_path: Path) -> None:
    model = LinearModel()
    (*_, last) = fit_toy(tmp_path, model=model, metrics=("accuracy", "matthews"), more_tests=["other"]).history
    for number, suffix in ((2, ""), (3, "_other")):
        inputs, labels = collate([examples(number)[i] for i in range(50)])
        predicted = model(**inputs).argmax(dim=1)
        assert last[f"accuracy{suffix}"] == pytest.approx((predicted == labels).double().mean().item())
    assert list(last)[5:] == ["accuracy", "matthews", "accuracy_other", "matthews_other"]
    summary = summarize_history([last], list(last)[5:])
    assert summary["last"] == last["accuracy"]
    assert list(summary["others_last"]) == ["matthews", "accuracy_other", "matthews_other"]


def test_the_last_thread_that_leaves_puts_the_modes_back() -> None:
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Sequential(torch.nn.Dropout()))
    model[1].eval()
    first, second = evaluation_mode(model), evaluation_mode(model)

    def modes() -> list[bool]:
        return [module.training for module in model.modules()]

    first.__enter__()
    with second:
        first.__exit__(None, None, None)
        assert not any(modes())
    with pytest.raises(OSError, match="b"), evaluation_mode(model):
        raise OSError("b")
    assert modes() == [True, True, False, False]
