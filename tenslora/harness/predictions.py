"""A model's outputs: for a split, in the compact form in which a run keeps them, and by the names of the classes.

Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Predictions:
    """The labels of a split's examples and a model's outputs for them, in the order of the split.

    Args:
        labels: class numbers in a classification, values in a regression; shape (examples,).
        outputs: logits of shape (examples, classes) in a classification, values of shape (examples, 1) in a regression.
    """

    labels: NDArray[Any]
    outputs: NDArray[Any]

    @property
    def is_regression(self) -> bool:
        """Whether the labels are values and not class numbers."""
        return self.labels.dtype.kind == "f"

    @property
    def predicted(self) -> NDArray[Any]:
        """The predicted class numbers, or the predicted values in a regression; shape (examples,)."""
        return self.outputs[:, 0] if self.is_regression else self.outputs.argmax(-1)


@dataclass(frozen=True)
class Prediction:
    """What a model predicts for one input.

    Args:
        answer: the name of the likeliest class, or the value in a regression.
        probabilities: the probability of each class, by its name; empty in a regression.
    """

    answer: str | float
    probabilities: dict[str, float]


def by_name(outputs: NDArray[Any], classes: Sequence[str]) -> list[Prediction]:
    """The predictions that a model's outputs stand for.

    Args:
        outputs: logits of shape (examples, classes), or values of shape (examples, 1) in a regression.
        classes: the names of the classes; empty for a regression.
    """
    if not classes:
        return [Prediction(float(value), {}) for value in outputs[:, 0]]
    with np.errstate(all="ignore"):  # a program may have made numpy's underflows errors
        powers = np.exp(outputs.astype(np.float64) - outputs.max(-1, keepdims=True))
        probabilities = powers / powers.sum(-1, keepdims=True)
    return [
        Prediction(classes[likeliest], dict(zip(classes, row, strict=True)))
        for likeliest, row in zip(outputs.argmax(-1), probabilities.tolist(), strict=True)
    ]


def to_arrays(splits: Mapping[str, Predictions]) -> dict[str, NDArray[Any]]:
    """The arrays of predictions.safetensors: "<split>/labels", and "<split>/logits" or "<split>/values".

    Logits are rounded to float16 after each example's largest logit is subtracted from them. The subtraction changes no
    probability, and it keeps the predicted class: the largest logit is exactly 0, and near 0 float16 tells numbers
    apart that differ by 6e-8.

    Args:
        splits: the predictions for each split.
    """
    arrays: dict[str, NDArray[Any]] = {}
    with np.errstate(all="ignore"):
        for split, of_split in splits.items():
            if of_split.is_regression:
                arrays[f"{split}/labels"] = of_split.labels.astype(np.float32)
                arrays[f"{split}/values"] = of_split.outputs.astype(np.float32)
            else:
                logits = of_split.outputs - of_split.outputs.max(-1, keepdims=True)
                arrays[f"{split}/labels"] = of_split.labels.astype(np.int32)
                arrays[f"{split}/logits"] = logits.clip(min=np.finfo(np.float16).min).astype(np.float16)
    return arrays


def from_arrays(arrays: Mapping[str, NDArray[Any]]) -> dict[str, Predictions]:
    """The predictions for each split, from the arrays that `to_arrays` gives.

    Args:
        arrays: the arrays of predictions.safetensors.

    Raises:
        ValueError: if an array is missing, does not belong there, or has not the form that `to_arrays` gives it.
    """
    splits = {}
    for split in [name.removesuffix("/labels") for name in arrays if name.endswith("/labels")]:
        labels = arrays[f"{split}/labels"]
        kind = "values" if labels.dtype.kind == "f" else "logits"
        outputs = arrays.get(f"{split}/{kind}")
        if outputs is None:
            raise ValueError(f"lacks {split}/{kind}")
        if labels.dtype != (np.float32 if kind == "values" else np.int32) or labels.ndim != 1 or not len(labels):
            raise ValueError(f"{split}/labels has the type {labels.dtype} and the shape {labels.shape}")
        width = 1 if kind == "values" else outputs.shape[-1] if outputs.ndim else 0
        is_right = outputs.dtype == (np.float32 if kind == "values" else np.float16)
        if not is_right or not width or outputs.shape != (len(labels), width):
            raise ValueError(f"{split}/{kind} has the type {outputs.dtype} and the shape {outputs.shape}")
        if not (np.isfinite(labels).all() and np.isfinite(outputs).all()):
            raise ValueError(f"{split} holds a NaN or an infinity")
        if kind == "logits" and not (labels.min() >= 0 and labels.max() < width):
            raise ValueError(f"{split}/labels holds a class that has no logit")
        splits[split] = Predictions(labels, outputs.astype(np.float32))
    if others := arrays.keys() - {f"{split}/{of}" for split in splits for of in ("labels", _outputs_of(splits[split]))}:
        raise ValueError(f"has {min(others)}, which does not belong there")
    return splits


def _outputs_of(predictions: Predictions) -> str:
    return "values" if predictions.is_regression else "logits"
