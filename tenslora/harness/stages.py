"""The stages of a run's backbone: totals over them, and how files and tables hold their dimensions and ranks.

Most backbones have one stage. Files then hold its dimensions as one mapping and its ranks as one list. For a backbone
whose layers come in several sizes, such as Swin, they hold a list with one of these for each stage.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from tenslora.adapter_config import AdapterConfig
from tenslora.constructions import Geometry
from tenslora.first_step import lora_first_step, over_stages, relative_first_step
from tenslora.ranks import parameter_count

Ranks = tuple[tuple[int, ...], ...]
"""The ranks of each stage."""

T = TypeVar("T")


def as_in_files(stages: Iterable[T]) -> T | list[T]:
    """What files hold of a backbone's stages: of a single one no list, but its entry alone.

    >>> as_in_files([[4, 4, 4]]), as_in_files([[4, 4, 4], [4, 4, 4]])
    ([4, 4, 4], [[4, 4, 4], [4, 4, 4]])

    Args:
        stages: for each stage, its ranks or its dimensions.
    """
    listed = list(stages)
    return listed[0] if len(listed) == 1 else listed


def stages_in_file(held: Any) -> list[Any]:
    """The entries of all stages, from what a file holds.

    >>> stages_in_file([4, 4, 4]), stages_in_file([[4, 4, 4], [4, 4, 4]])
    ([[4, 4, 4]], [[4, 4, 4], [4, 4, 4]])

    Args:
        held: what was read from a file.
    """
    is_listed = isinstance(held, list) and bool(held) and isinstance(held[0], (list, dict))
    return list(held) if is_listed else [held]


def ranks_text(ranks: Iterable[Iterable[int]]) -> str:
    """The ranks as people read them: once if all stages have the same.

    >>> ranks_text([(16, 16, 3, 2), (19, 18, 3, 2)]), ranks_text([(4, 4, 4), (4, 4, 4)])
    ('16, 16, 3, 2; 19, 18, 3, 2', '4, 4, 4')

    Args:
        ranks: the ranks of each stage.
    """
    texts = [", ".join(map(str, of_stage)) for of_stage in ranks]
    return texts[0] if len(set(texts)) == 1 else "; ".join(texts)


def adapter_parameters(config: AdapterConfig, geometries: Sequence[Geometry], ranks: Ranks) -> int:
    """The number of an adapter's parameters.

    Args:
        config: the adapter's settings.
        geometries: the dimensions of each stage.
        ranks: the ranks of each stage.
    """
    counts = (
        parameter_count(config.tensor_mode, geometry, of_stage, config.factorization)
        for geometry, of_stage in zip(geometries, ranks, strict=True)
    )
    return sum(counts)


def lora_parameters(geometries: Sequence[Geometry], rank: int) -> int:
    """The number of LoRA's parameters.

    Args:
        geometries: the dimensions of each stage.
        rank: the rank of LoRA.
    """
    return sum(parameter_count("lora", geometry, [rank]) for geometry in geometries)


def lora_first_step_of(geometries: Sequence[Geometry], rank: int) -> float:
    """LoRA's first step, see `first_step.lora_first_step`.

    Args:
        geometries: the dimensions of each stage.
        rank: the rank of LoRA.
    """
    return over_stages([lora_first_step(geometry, rank) for geometry in geometries], geometries)


def relative_first_step_of(config: AdapterConfig, geometries: Sequence[Geometry], ranks: Ranks) -> float | None:
    """An adapter's first step as a multiple of LoRA's, see `first_step.relative_first_step`.

    Args:
        config: the adapter's settings.
        geometries: the dimensions of each stage.
        ranks: the ranks that each stage starts with.

    Returns:
        The multiple; None where the adapter's first step can only be measured.
    """
    multiples, rank = [], config.rank_strategy.rank
    for geometry, of_stage in zip(geometries, ranks, strict=True):
        multiple = relative_first_step(config, geometry, of_stage)
        if multiple is None:
            return None
        multiples.append(multiple)
    if len(multiples) == 1:
        return multiples[0]
    steps = [multiple * lora_first_step(g, rank) for multiple, g in zip(multiples, geometries, strict=True)]
    return over_stages(steps, geometries) / lora_first_step_of(geometries, rank)
