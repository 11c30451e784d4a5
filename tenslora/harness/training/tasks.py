"""The tasks: what a model's outputs stand for, the loss that trains them, and the metrics that may score them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from tenslora.errors import TensLoRAError
from tenslora.harness.training.metrics import METRICS


@dataclass(frozen=True)
class Task:
    """A kind of prediction.

    Args:
        name: the task's name, as in `Metric.task`.
        loss: computes the loss from (outputs, labels, reduction). Outputs are float32, of shape (examples, outputs);
            labels have shape (examples,). The reduction is "mean" for one number, or "none" for one per example.
        metrics: the names of the metrics that score the task unless `dataset.metrics` names others, the headline metric
            first.
    """

    name: str
    loss: Callable[[Tensor, Tensor, str], Tensor]
    metrics: tuple[str, ...]

    def check_metrics(self, names: Sequence[str], outputs: int) -> None:
        """Check that metrics can score this task.

        Args:
            names: the names of the metrics.
            outputs: the number of outputs that the model has for an example.

        Raises:
            TensLoRAError: for a metric that is for another task or for another number of classes.
        """
        valid = [m.name for m in METRICS.values() if m.task == self.name and m.classes in (None, outputs)]
        for name in names:
            if name not in valid:
                raise TensLoRAError(
                    f"dataset.metrics={name}: must be one of {', '.join(valid)} for a {self.name} with {outputs} "
                    f"output{'s' if outputs > 1 else ''}"
                )


def _cross_entropy(logits: Tensor, labels: Tensor, reduction: str) -> Tensor:
    return F.cross_entropy(logits, labels, reduction=reduction)


def _squared_error(outputs: Tensor, labels: Tensor, reduction: str) -> Tensor:
    return F.mse_loss(outputs.reshape(labels.shape), labels.to(outputs.dtype), reduction=reduction)


CLASSIFICATION = Task("classification", _cross_entropy, ("accuracy",))
"""Each example belongs to one class: the outputs are the classes' logits, the labels class numbers."""

REGRESSION = Task("regression", _squared_error, ("pearson", "spearman"))
"""Each example has a value: the model has one output, and the labels are numbers."""

TASKS = {task.name: task for task in (CLASSIFICATION, REGRESSION)}
"""All tasks, by name."""


def outputs_of(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """A model's outputs for a batch, of shape (examples, outputs).

    Args:
        model: a model that returns the outputs as a tensor, as timm's models do, or as the `logits` of an object, as
            transformers' models do.
        inputs: the batch, by the names of the model's arguments.

    Returns:
        The outputs, of the model's dtype.

    Raises:
        TypeError: if the model returns something else.
    """
    output = model(**inputs)
    outputs = getattr(output, "logits", output)
    if not isinstance(outputs, Tensor):
        raise TypeError(f"its output is a {type(outputs).__name__}; must be a tensor, or have one as its logits")
    return outputs


_modes: dict[int, tuple[list[nn.Module], dict[nn.Module, bool]]] = {}
_modes_lock = threading.Lock()


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """A context in which a model is in evaluation mode; afterwards each of its modules is in the mode that it was in.

    Several threads may be in this context of one model: the last to leave puts the modes back.

    Args:
        model: the model.
    """
    with _modes_lock:
        inside, modes = _modes.setdefault(id(model), ([], {module: module.training for module in model.modules()}))
        inside.append(model)
        model.eval()
    try:
        yield
    finally:
        with _modes_lock:
            inside.pop()
            if not inside:
                del _modes[id(model)]
                for module, mode in modes.items():
                    module.training = mode
