from __future__ import annotations

from dataclasses import replace

import pytest

from tenslora.constructions import Geometry
from tenslora.errors import TensLoRAError
from tenslora.harness.adapted_model import check_geometries

ACTUAL = Geometry(d_in=24, heads=3, d_head=8, layers=2)


def test_a_declared_geometry_is_compared_dimension_by_dimension() -> None:
    check_geometries(None, [ACTUAL])
    check_geometries([ACTUAL], [ACTUAL])
    check_geometries([replace(ACTUAL, d_ff=96)], [ACTUAL])
    with pytest.raises(TensLoRAError, match=r"model\.geometry\.d_ff=96: the backbone that was loaded has 32"):
        check_geometries([replace(ACTUAL, d_ff=96)], [replace(ACTUAL, d_ff=32)])
    with pytest.raises(TensLoRAError, match=r"model\.geometry\.layers=12: the backbone that was loaded has 2"):
        check_geometries([replace(ACTUAL, layers=12)], [ACTUAL])
    with pytest.raises(TensLoRAError, match=r"model\.geometry\.1\.heads=6: the backbone that was loaded has 3"):
        check_geometries([ACTUAL, replace(ACTUAL, heads=6)], [ACTUAL, ACTUAL])
    with pytest.raises(TensLoRAError, match=r"model\.geometry: has 1 stages, and the backbone that was loaded has 2"):
        check_geometries([ACTUAL], [ACTUAL, ACTUAL])
