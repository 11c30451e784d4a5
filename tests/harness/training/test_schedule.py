from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from tenslora.harness.training.schedule import cosine_rate


def test_without_warm_up_it_is_torchs_cosine_annealing() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    oracle = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50, eta_min=1e-6)
    for step in range(50):
        assert cosine_rate(step, 50, 1e-3, 1e-6) == pytest.approx(oracle.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        oracle.step()


def test_the_warm_up_rises_to_the_peak_and_the_fall_reaches_the_floor() -> None:
    rates = [cosine_rate(step, 30, 1.0, 0.1, warmup=10) for step in range(31)]
    assert rates[:10] == pytest.approx([i / 10 for i in range(1, 11)])
    assert rates[10] == 1.0
    assert all(a > b for a, b in pairwise(rates[10:]))
    assert rates[30] == pytest.approx(0.1)
