"""The first step of an adapter: how far AdamW's first step moves the adapted matrices. Nothing here needs torch.

AdamW's first step moves every entry of the parameter that starts at zero by the learning rate, up or down, whatever
the gradient's size. How far the adapted matrices then move depends on the construction and the ranks alone. LoRA and
the constructions differ in this by a factor of up to thirty, so one learning rate is not the same step for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from tenslora.adapter_config import AdapterConfig
from tenslora.constructions import PROJECTION, SITE, Geometry, modes, stacked_axes, tensor_grid
from tenslora.factorizations import factorization_of


def first_step(
    construction: str, geometry: Geometry, ranks: Sequence[int], factorization: str = "tucker"
) -> float | None:
    """How far AdamW's first step with learning rate 1 moves the matrices, with alpha 1 and an orthogonal start.

    The result is the root mean square, over all adapted matrices, of the updates' Frobenius norms. The signs of the
    gradient's entries are taken as independent of the factors, which holds closely where no rank exceeds its mode's
    size. For Tucker's tensors of M matrices each, the result is sqrt(prod min(r_i, n_i) / M); see
    `Factorization.squared_first_step`. LoRA starts as PEFT's LoRA does, with variance 1 / (3 d_in), and its result is
    sqrt(r d_out / 3).

    >>> vit_base = Geometry(d_in=768, heads=12, d_head=64, layers=12)
    >>> first_step("lora", vit_base, [4]), first_step("att", vit_base, [4, 4, 4])
    (32.0, 8.0)

    Args:
        construction: the construction's name.
        geometry: the backbone's dimensions.
        ranks: the ranks, in the order of `ranks.rank_limits`.
        factorization: one of `factorizations.FACTORIZATIONS`.

    Returns:
        The number; None for a factorization without a formula. `Adapter.first_step` is then measured.
    """
    chosen = factorization_of(construction, factorization)
    rows, columns = tensor_grid(construction, geometry)
    squares = [chosen.squared_first_step(modes(construction, geometry, matrix), ranks) for matrix in range(rows)]
    if None in squares:
        return None
    total = columns * sum(filter(None, squares))
    if stacked_axes(construction) & {PROJECTION, SITE}:
        # The slices of a tensor are d_out wide each; a matrix that is narrower than its slices leaves out the rest.
        total *= sum(geometry.widths) / (geometry.projections * geometry.d_out)
    if construction == "lora":
        total /= 3  # Kaiming-uniform columns have a squared length of 1/3 on average, orthonormal ones of 1
    return math.sqrt(total / (len(geometry.matrices) * geometry.layers))


def relative_first_step(config: AdapterConfig, geometry: Geometry, ranks: Sequence[int] | None = None) -> float | None:
    """An adapter's first step as a multiple of LoRA's at ``config.rank_strategy.rank`` and the same alpha.

    >>> vit_base = Geometry(d_in=768, heads=12, d_head=64, layers=12)
    >>> from tenslora.ranks import RankStrategy
    >>> relative_first_step(AdapterConfig("att", RankStrategy("isorank")), vit_base)
    0.25

    Args:
        config: the adapter's settings.
        geometry: the backbone's dimensions.
        ranks: the ranks that the adapter starts with; None for those of config.rank_strategy.

    Returns:
        The multiple; None where the adapter's first step can only be measured.

    Raises:
        TensLoRAError: for settings that do not fit the geometry.
    """
    if config.scaling == "first_step":
        return 1.0
    if config.init != "orthogonal" and config.tensor_mode != "lora":
        return None
    if ranks is None:
        ranks = config.rank_strategy.resolve(config.tensor_mode, geometry, config.factorization)
    own = first_step(config.tensor_mode, geometry, ranks, config.factorization)
    return own and own / lora_first_step(geometry, config.rank_strategy.rank)


def over_stages(first_steps: Sequence[float], geometries: Sequence[Geometry]) -> float:
    """The first step of a backbone of several stages: the root mean square over the matrices of all of them.

    >>> small, large = Geometry(d_in=96, heads=3, d_head=32, layers=2), Geometry(d_in=192, heads=6, d_head=32, layers=6)
    >>> over_stages([2.0, 4.0], [small, large])
    3.605551275463989

    Args:
        first_steps: the first step of each stage.
        geometries: the dimensions of each stage.
    """
    if len(geometries) == 1:
        return first_steps[0]
    counts = [len(geometry.matrices) * geometry.layers for geometry in geometries]
    parts = (math.sqrt(count) * step for count, step in zip(counts, first_steps, strict=True))
    return math.hypot(*parts) / math.sqrt(sum(counts))  # hypot, because squares may overflow


def lora_first_step(geometry: Geometry, rank: int) -> float:
    """LoRA's first step, sqrt(r d_out / 3) where all matrices are d_out wide.

    Args:
        geometry: the backbone's dimensions.
        rank: the rank of LoRA.
    """
    step = first_step("lora", geometry, [rank])
    assert step is not None
    return step
