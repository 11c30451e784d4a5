"""A linear model on random features, which the training loop trains in milliseconds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tenslora.harness.data.encoding import Encoded, EncodedDataset
from tenslora.harness.training.checkpoint import TrainingState
from tenslora.harness.training.loop import fit
from tenslora.harness.training.processes import Processes
from tenslora.harness.training.tasks import CLASSIFICATION, REGRESSION, Task
from tests.running import SHORT, configured

FEATURES, CLASSES = 8, 3
EXAMPLES = 50
"""Of each split: two training batches of 32, the last one uneven."""


class LinearModel(nn.Module):
    """Maps a batch of features, named x, to its outputs."""

    def __init__(self, outputs: int = CLASSES) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES, outputs)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.1, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.linear(x)
        return outputs


def examples(split: int, values: bool = False, lengths: bool = False) -> Encoded:
    """A split of the toy dataset, whose labels follow from the features.

    Args:
        split: its number; another number gives other examples.
        values: whether the labels are numbers instead of classes.
        lengths: whether the examples have lengths, all different, as texts have.
    """
    generator = torch.Generator().manual_seed(split)
    features = torch.randn(EXAMPLES, FEATURES, generator=generator)
    weights = torch.randn(FEATURES, CLASSES, generator=torch.Generator().manual_seed(99))
    scores = features @ weights
    labels: list[Any] = scores[:, 0].tolist() if values else scores.argmax(-1).tolist()
    in_disorder = torch.randperm(EXAMPLES, generator=generator).tolist() if lengths else None
    return Encoded(features, labels, lengths=in_disorder)


def collate(items: list[Any]) -> tuple[dict[str, Tensor], Tensor]:
    """A batch of the toy dataset."""
    return {"x": torch.stack([features for features, _ in items])}, torch.tensor([label for _, label in items])


def toy_data(task: Task, metrics: tuple[str, ...], more_tests: Sequence[str]) -> EncodedDataset:
    """The toy dataset, with a further test split for each name."""
    values = task is REGRESSION
    further = {name: examples(number, values) for number, name in enumerate(more_tests, start=3)}
    return EncodedDataset(examples(1, values), examples(2, values), further, collate, task.name, metrics)


def fit_toy(
    folder: Path,
    *overrides: str,
    model: nn.Module | None = None,
    task: Task = CLASSIFICATION,
    metrics: tuple[str, ...] = ("accuracy",),
    more_tests: Sequence[str] = (),
    on_epoch: Callable[[dict[str, Any]], None] = lambda _: None,
) -> TrainingState:
    """Train a model on the toy dataset; the checkpoint goes to the folder.

    Args:
        folder: for the checkpoint.
        overrides: settings of the run beyond SHORT.
        model: a new LinearModel unless given.
        task: the dataset's labels are its labels.
        metrics: to compute.
        more_tests: the names of further test splits.
        on_epoch: as for `fit`.
    """
    return fit(
        model or LinearModel(),
        toy_data(task, metrics, more_tests),
        configured(*SHORT, *overrides),
        processes=Processes("cpu", 1),
        checkpoint=folder / "checkpoint.safetensors",
        show_progress=False,
        on_epoch=on_epoch,
    )
