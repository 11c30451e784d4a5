from __future__ import annotations

import pytest

from tenslora.constructions import CONSTRUCTIONS, Geometry, modes
from tenslora.factorizations.tucker import Tucker
from tenslora.tensor import FactorizedTensor

GEOMETRY = Geometry(d_in=10, heads=3, d_head=4, layers=5)


@pytest.mark.parametrize("name", [name for name in CONSTRUCTIONS if name != "lora"])
@pytest.mark.parametrize(("r_in", "r_out"), [(4, 4), (9, 1), (9, 2), (9, 6), (10, 12), (2, 12)])
def test_the_grouping_is_the_one_with_fewer_multiplications_per_token(name: str, r_in: int, r_out: int) -> None:
    sizes = modes(name, GEOMETRY)
    if "head" in sizes:
        r_out = max(1, r_out // 3) * 3
    ranks = {"d_in": r_in, "d_out": r_out, "d_head": r_out // 3, "head": 3}
    chosen = [ranks.get(mode, 1) for mode in sizes]
    tensor = FactorizedTensor(Tucker(), sizes, chosen, GEOMETRY.layers, seed=1)
    left, right = tensor.slices(0)
    projections = 3 if {"projection", "site"} & set(sizes) else 1
    shared_left = r_in * (GEOMETRY.d_in + projections * GEOMETRY.d_out)
    own_left = projections * r_out * (GEOMETRY.d_in + GEOMETRY.d_out)
    assert left.numel() + right.numel() == min(shared_left, own_left)
