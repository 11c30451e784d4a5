"""The metrics, in the registry `METRICS`.

Nothing here needs torch; scikit-learn or SciPy is imported to compute a score.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tenslora.errors import TensLoRAError
from tenslora.forms import shown

if TYPE_CHECKING:
    from numpy.typing import NDArray

HUNDREDFOLD = "\N{MULTIPLICATION SIGN} 100"
"""The unit of a score that tables show times 100."""


@dataclass(frozen=True)
class Metric:
    """A score of a whole test split.

    Args:
        name: the metric's name in `dataset.metrics` and in a run's record.
        function: computes the score from (labels, outputs). In a classification, labels are class numbers of shape
            (examples,) and outputs are logits of shape (examples, classes). In a regression, labels are values of shape
            (examples,) and outputs are values of shape (examples, 1). Outputs are float32.
        lowest: the lowest possible score.
        highest: the highest possible score.
        larger_is_better: whether a larger score is a better one.
        task: the name of the task that the metric is for, see `tasks.Task`.
        classes: the only number of classes that the metric is defined for; None for any.
    """

    name: str
    function: Callable[[NDArray[Any], NDArray[Any]], float]
    lowest: float = 0.0
    highest: float = 1.0
    larger_is_better: bool = True
    task: str = "classification"
    classes: int | None = None

    @property
    def unit(self) -> str:
        """How tables show a score: in "%", as `HUNDREDFOLD` if it is a correlation, or as it is ("") without limit."""
        return "" if math.isinf(self.highest) else HUNDREDFOLD if self.lowest < 0 else "%"

    @property
    def factor(self) -> int:
        """What tables multiply a score by."""
        return 100 if self.unit else 1

    def score(self, labels: NDArray[Any], outputs: NDArray[Any]) -> float:
        """The score of a whole test split, which is checked because `function` may be anybody's own.

        Args:
            labels: as `function` takes them.
            outputs: as `function` takes them.

        Raises:
            TensLoRAError: if it is no finite number from `lowest` to `highest`.
        """
        import numpy as np

        value: Any = self.function(labels.copy(), outputs.copy())  # other metrics and the run's predictions need both
        if not np.isfinite(outputs).all():  # the run has diverged, which the training loop says
            return float(value)
        with contextlib.suppress(TypeError, ValueError, OverflowError, RuntimeError):
            score = math.nan if isinstance(value, str) else float(value)
            if math.isfinite(score) and self.lowest <= score <= self.highest:
                return score
        raise TensLoRAError(
            f"dataset.metrics={self.name}: the metric must return a finite number from {self.lowest:g} to "
            f"{self.highest:g}, not {shown(value)}"
        )


def _accuracy(labels: NDArray[Any], logits: NDArray[Any]) -> float:
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(labels, logits.argmax(-1)))


def _matthews(labels: NDArray[Any], logits: NDArray[Any]) -> float:
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels, logits.argmax(-1)))


def _f1(labels: NDArray[Any], logits: NDArray[Any]) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(labels, logits.argmax(-1), zero_division=0))


def _pearson(labels: NDArray[Any], outputs: NDArray[Any]) -> float:
    from scipy.stats import pearsonr

    return float(pearsonr(labels, outputs[:, 0]).statistic) if _vary(labels, outputs) else 0.0


def _spearman(labels: NDArray[Any], outputs: NDArray[Any]) -> float:
    from scipy.stats import spearmanr

    return float(spearmanr(labels, outputs[:, 0]).statistic) if _vary(labels, outputs) else 0.0


def _vary(labels: NDArray[Any], outputs: NDArray[Any]) -> bool:
    # A correlation with a constant is undefined. It counts as 0, as scikit-learn has it for the Matthews correlation.
    return bool(labels.min() < labels.max() and outputs.min() < outputs.max())


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("accuracy", _accuracy),
        Metric("matthews", _matthews, lowest=-1.0),  # the Matthews correlation, as GLUE scores CoLA
        Metric("f1", _f1, classes=2),  # of class 1, as GLUE scores MRPC and QQP
        Metric("pearson", _pearson, lowest=-1.0, task="regression"),  # as GLUE scores STS-B, with the next
        Metric("spearman", _spearman, lowest=-1.0, task="regression"),
    )
}
"""All metrics, by name."""


def score_names(metrics: Sequence[str], more_tests: Iterable[str]) -> list[str]:
    """The names of a run's scores: the metrics, and accuracy_mismatched and the like for further test splits.

    Args:
        metrics: the names of the metrics, the headline metric first.
        more_tests: the names of the further test splits.
    """
    return [*metrics, *(f"{metric}_{split}" for split in more_tests for metric in metrics)]


def metric_of(score: str) -> Metric:
    """The metric of a score.

    Args:
        score: the score's name, see `score_names`.

    Raises:
        ValueError: if there is no such metric.
    """
    name = score
    while name not in METRICS:  # both the metric's and the split's name may have an underscore
        name, underscore, _ = name.rpartition("_")
        if not underscore:
            raise ValueError(f"{score}: there is no such metric; the metrics are {', '.join(METRICS)}")
    return METRICS[name]
