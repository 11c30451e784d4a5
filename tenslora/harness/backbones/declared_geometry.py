"""Compares a backbone with the geometry that its config file declares."""

from __future__ import annotations

from tenslora.constructions import Geometry
from tenslora.errors import TensLoRAError


def check_geometry(declared: Geometry | None, actual: Geometry) -> None:
    """Check that a backbone has the dimensions that its config file declares.

    Args:
        declared: what the config file says; None if it says nothing.
        actual: what the backbone has.

    Raises:
        TensLoRAError: names the first dimension that differs.
    """
    for name, value in vars(declared).items() if declared else ():
        if name in ("d_ff", "gated") and actual.d_ff is None:  # the feed-forward block is not adapted
            continue
        if value != getattr(actual, name):
            raise TensLoRAError(
                f"model.geometry.{name}={value}: the backbone that was loaded has {getattr(actual, name)}; is "
                f"model.checkpoint another model's? If it is meant, set model.geometry=null"
            )
