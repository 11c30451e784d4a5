"""The learning rate as a function of the step."""

from __future__ import annotations

import math


def cosine_rate(step: int, steps: int, peak: float, floor: float, warmup: int = 0) -> float:
    """The learning rate of one optimizer step.

    The rate rises linearly over the first `warmup` steps, then falls as
    ``floor + (peak - floor) (1 + cos(pi t)) / 2``, where t runs from 0 at the end of the warm-up to 1 at `steps`
    (Loshchilov and Hutter, 2017, equation 5, one cycle; torch's CosineAnnealingLR).

    Args:
        step: the number of the step, from 0.
        steps: the number of steps of the whole run.
        peak: the highest learning rate.
        floor: the lowest learning rate, which would be that of the step after the last one.
        warmup: the number of steps of the warm-up.

    Returns:
        The learning rate.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    t = (step - warmup) / max(1, steps - warmup)
    return floor + (peak - floor) * (1 + math.cos(math.pi * t)) / 2
