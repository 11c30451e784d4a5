from __future__ import annotations

from dataclasses import replace

import pytest

from tenslora.constructions import Geometry
from tenslora.errors import TensLoRAError
from tenslora.harness.adapted_model import check_geometry

ACTUAL = Geometry(d_in=24, heads=3, d_head=8, layers=2)


def test_a_declared_geometry_is_compared_dimension_by_dimension() -> None:
    check_geometry(None, ACTUAL)
    check_geometry(ACTUAL, ACTUAL)
    check_geometry(replace(ACTUAL, d_ff=96), ACTUAL)
    with pytest.raises(TensLoRAError, match=r"model\.geometry\.d_ff=96: the backbone that was loaded has 32"):
        check_geometry(replace(ACTUAL, d_ff=96), replace(ACTUAL, d_ff=32))
    with pytest.raises(TensLoRAError, match=r"model\.geometry\.layers=12: the backbone that was loaded has 2"):
        check_geometry(replace(ACTUAL, layers=12), ACTUAL)
