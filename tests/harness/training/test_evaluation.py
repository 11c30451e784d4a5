from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tenslora.errors import TensLoRAError
from tenslora.harness.training.evaluation import evaluate
from tenslora.harness.training.processes import Processes
from tenslora.harness.training.tasks import CLASSIFICATION
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


def evaluated(model: torch.nn.Module, *overrides: str, lengths: bool = False) -> tuple[float, dict[str, float]]:
    return evaluate(
        model,
        examples(2, lengths=lengths),
        collate,
        ["accuracy", "matthews"],
        task=CLASSIFICATION,
        trainer=configured(*SHORT, *overrides).trainer,
        processes=Processes("cpu", 1),
    )


def test_scores_are_those_of_the_whole_split() -> None:
    model = LinearModel()
    loss, scores = evaluated(model)
    inputs, labels = collate([examples(2)[i] for i in range(50)])
    logits = model(**inputs).detach()
    assert loss == pytest.approx(-logits.log_softmax(-1)[range(50), labels].mean().item(), rel=1e-6)
    assert scores["accuracy"] == (logits.argmax(-1) == labels).sum().item() / 50


@pytest.mark.parametrize("overrides", [["trainer.eval_batch_size=7"], ["trainer.workers=1"]])
def test_neither_batches_nor_workers_nor_the_order_change_the_scores(overrides: list[str]) -> None:
    model = LinearModel()
    loss, scores = evaluated(model)
    assert evaluated(model, *overrides) == evaluated(model, *overrides, lengths=True)
    assert math.isclose(evaluated(model, *overrides)[0], loss, rel_tol=1e-6)
    assert evaluated(model, *overrides)[1] == scores


def test_it_goes_on_with_batches_that_fit_into_memory() -> None:
    expected = evaluated(LinearModel())
    model = SmallDevice(room=20)
    loss, scores = evaluated(model)
    assert model.sizes == [50, 50, 32, 16, 16, 16, 2]  # batches of 128, 64, 32 and at last 16
    assert scores == expected[1]
    assert math.isclose(loss, expected[0], rel_tol=1e-6)


def test_a_run_that_cannot_evaluate_a_single_example_says_so(tmp_path: Path) -> None:
    with pytest.raises(TensLoRAError, match="does not fit into the memory of"):
        fit_toy(tmp_path, model=SmallDevice(room=0))
