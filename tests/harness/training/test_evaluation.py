from __future__ import annotations

import math
import multiprocessing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tenslora.errors import TensLoRAError
from tenslora.harness.data import batches
from tenslora.harness.data.encoding import Encoded, EncodedDataset
from tenslora.harness.training.evaluation import Evaluation, evaluate
from tenslora.harness.training.processes import Processes
from tests.running import SHORT, configured
from tests.toy import LinearModel, collate, examples, fit_toy


class SmallDevice(LinearModel):
    """A model that can be evaluated on no more than so many examples at once."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self.sizes: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            self.sizes.append(len(x))
            if len(x) > self.room:
                raise torch.OutOfMemoryError("out of memory")
        return super().forward(x)


def evaluated(model: torch.nn.Module, *overrides: str, lengths: bool = False) -> Evaluation:
    return evaluate(
        model,
        EncodedDataset(
            examples(1), examples(2, lengths=lengths), {}, collate, "classification", ("accuracy", "matthews")
        ),
        trainer=configured(*SHORT, *overrides).trainer,
        processes=Processes("cpu", 1),
    )


def test_scores_are_those_of_the_whole_split() -> None:
    model = LinearModel()
    evaluation = evaluated(model)
    inputs, labels = collate([examples(2)[i] for i in range(50)])
    logits = model(**inputs).detach()
    assert evaluation.loss == pytest.approx(-logits.log_softmax(-1)[range(50), labels].mean().item(), rel=1e-6)
    assert evaluation.scores["accuracy"] == (logits.argmax(-1) == labels).sum().item() / 50


@pytest.mark.parametrize("overrides", [["trainer.eval_batch_size=7"], ["trainer.workers=1"]])
def test_neither_batches_nor_workers_nor_the_order_change_the_scores(overrides: list[str]) -> None:
    model = LinearModel()
    plain, changed, sorted_by_length = evaluated(model), evaluated(model, *overrides), evaluated(model, lengths=True)
    for other in (changed, sorted_by_length):
        assert math.isclose(other.loss, plain.loss, rel_tol=1e-6)
        assert other.scores == plain.scores
        assert np.array_equal(other.predictions["test"].labels, plain.predictions["test"].labels)
        # Some processors add the products of a row in another order if the batch has another size.
        ours, theirs = other.predictions["test"].outputs, plain.predictions["test"].outputs
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-7)


class Copies(torch.nn.Module):
    """A model whose outputs are its inputs."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_it_does_not_matter_what_numpy_makes_of_underflows() -> None:
    values = [1.0, -1.0, 1e-30]  # the square of the last is none that a float32 can hold
    split = Encoded(torch.tensor(values)[:, None], values)
    data = EncodedDataset(split, split, {}, collate, "regression", ("pearson", "spearman"))
    with np.errstate(all="raise"):
        evaluation = evaluate(Copies(), data, trainer=configured(*SHORT).trainer, processes=Processes("cpu", 1))
    assert evaluation.scores == pytest.approx({"pearson": 1.0, "spearman": 1.0})


def test_further_splits_are_scored_under_their_names() -> None:
    model = LinearModel()
    whole = EncodedDataset(
        examples(1), examples(2), {"mismatched": examples(3)}, collate, "classification", ("accuracy",)
    )
    settings: dict[str, Any] = {"trainer": configured(*SHORT).trainer, "processes": Processes("cpu", 1)}
    evaluation = evaluate(model, whole, **settings)
    alone = evaluate(model, replace(whole, scored=examples(3), more_tests={}), **settings)
    assert evaluation.loss == evaluated(model).loss
    assert list(evaluation.scores) == ["accuracy", "accuracy_mismatched"]
    assert evaluation.scores["accuracy_mismatched"] == alone.scores["accuracy"]
    assert np.array_equal(evaluation.predictions["mismatched"].outputs, alone.predictions["test"].outputs)


def test_the_shares_of_several_processes_are_put_back_into_the_order_of_the_split() -> None:
    test = examples(2, lengths=True)
    shares = [
        labels
        for process in range(3)
        for _, labels in batches.test_batches(test, collate, batch_size=7, process=process, processes=3)
    ]
    assert torch.cat(shares).tolist() == [test.labels[index] for index in batches.order_of_results(test, 3)]
    assert sorted(batches.order_of_results(test, 3)) == list(range(len(test)))


def test_it_goes_on_with_batches_that_fit_into_memory() -> None:
    expected = evaluated(LinearModel())
    model = SmallDevice(room=20)
    evaluation = evaluated(model)
    assert model.sizes == [50, 50, 32, 16, 16, 16, 2]  # batches of 128, 64, 32 and at last 16
    assert evaluation.scores == expected.scores
    assert math.isclose(evaluation.loss, expected.loss, rel_tol=1e-6)


def test_a_run_that_cannot_evaluate_a_single_example_says_so(tmp_path: Path) -> None:
    with pytest.raises(TensLoRAError, match="does not fit into the memory of"):
        fit_toy(tmp_path, model=SmallDevice(room=0))


@pytest.mark.parametrize(
    ("method", "words"),
    [("fork", r" \(DataLoader"), ("spawn", "; or, with the start method spawn, the program has no `if")],
)
def test_a_worker_that_is_killed_is_one_line(method: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda: method)

    class Model(LinearModel):
        def forward(self, x: Tensor) -> Tensor:  # noqa: ARG002
            # torch raises it wherever the program is.
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    with pytest.raises(
        TensLoRAError,
        match=rf"^trainer\.workers=0: a process that reads examples was killed, as where memory is short{words}",
    ):
        evaluated(Model())
