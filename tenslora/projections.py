"""Finds the query, key and value projections of a Transformer by structure, not by class."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from tenslora.constructions import Geometry
from tenslora.errors import TensLoRAError

SEPARATE = (("query", "key", "value"), ("q_proj", "k_proj", "v_proj"), ("q_lin", "k_lin", "v_lin"))
FUSED = "qkv"
_HEAD_COUNTS = ("num_attention_heads", "num_heads", "n_heads")


@dataclass(frozen=True)
class Site:
    """One Linear that holds projections of a layer.

    path: its module path in the model. linear: the module. layer: 0-based. projections: which of query 0, key 1
    and value 2 it holds, in the order of its output rows: one, or all three where they are fused.
    """

    path: str
    linear: nn.Linear
    layer: int
    projections: tuple[int, ...]


def find_projections(model: nn.Module) -> tuple[Geometry, list[Site]]:
    """Every attention projection of `model`, and the geometry that all layers share.

    An attention block is a module whose children are three Linear layers named query/key/value,
    q_proj/k_proj/v_proj or q_lin/k_lin/v_lin, or one Linear named qkv. Layers are numbered in module order.

    Raises TensLoRAError if there is no such block, or if the blocks differ in width or in heads.
    """
    sites: list[Site] = []
    blocks: list[tuple[str, nn.Module]] = []
    for path, module in model.named_modules():
        for names in (*SEPARATE, (FUSED,)):
            linears = [getattr(module, name, None) for name in names]
            if not all(isinstance(linear, nn.Linear) for linear in linears):
                continue
            if getattr(module, "q_bias", None) is not None and not getattr(module, "qkv_bias_separate", False):
                # timm's BEiT and EVA read the weight and add biases of their own: they never call the Linear.
                raise TensLoRAError(f"{path}: does not call its Linear {names[0]}, so that no adapter can act on it")
            layer = len(blocks)
            blocks.append((path, module))
            for index, (name, linear) in enumerate(zip(names, linears, strict=True)):
                assert isinstance(linear, nn.Linear)
                held = (0, 1, 2) if names == (FUSED,) else (index,)
                sites.append(Site(f"{path}.{name}".lstrip("."), linear, layer, held))
    if not blocks:
        known = ", ".join("/".join(names) for names in (*SEPARATE, (FUSED,)))
        raise TensLoRAError(
            f"{type(model).__name__}: no attention projections found; they must be nn.Linear children named {known}"
        )
    heads = {path: _heads(path, module, model) for path, module in blocks}
    shapes = {site.path: (site.linear.in_features, site.linear.out_features / len(site.projections)) for site in sites}
    for what, found in (("heads", heads), ("(d_in, d_out)", shapes)):
        first_path, first = next(iter(found.items()))
        for path, value in found.items():
            if value != first:
                raise TensLoRAError(
                    f"{type(model).__name__}: attention is uneven, {what} is {value} at {path} and {first} at "
                    f"{first_path}; tensors need the same dimensions in every layer and projection"
                )
    (path, count), (d_in, d_out) = next(iter(heads.items())), next(iter(shapes.values()))
    if d_out % count:
        raise TensLoRAError(f"{path}: the output width {d_out:g} does not divide into {count} heads")
    return Geometry(d_in=d_in, heads=count, d_head=int(d_out) // count, layers=len(blocks)), sites


def check_geometry(declared: Geometry | None, found: Geometry) -> None:
    """Raise TensLoRAError where a backbone is not as its config file declares it; None declares nothing."""
    for name, value in vars(declared).items() if declared else ():
        if value != getattr(found, name):
            raise TensLoRAError(
                f"model.geometry.{name}={value}: the backbone that was loaded has {getattr(found, name)}; is "
                f"model.checkpoint another model's? If it is meant, set model.geometry=null"
            )


def _heads(path: str, module: nn.Module, model: nn.Module) -> int:
    for owner in (module, getattr(module, "config", None), getattr(model, "config", None)):
        for name in _HEAD_COUNTS:
            count = getattr(owner, name, None)
            if isinstance(count, int):
                return count
    raise TensLoRAError(f"{path}: the number of heads is not known; expected an attribute {', '.join(_HEAD_COUNTS)}")
