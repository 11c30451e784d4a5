from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from scipy.optimize import brentq

from tenslora.adapter import Adapter
from tenslora.adapter_config import AdapterConfig
from tenslora.constructions import CONSTRUCTIONS, Geometry, modes
from tenslora.errors import TensLoRAError
from tenslora.factorizations import FACTORIZATIONS
from tenslora.factorizations.tucker import RULES
from tenslora.ranks import (
    RankStrategy,
    explicit,
    isoparameters,
    isorank,
    parameter_count,
    rank_limits,
    weight_ranks,
)

TENSORS = [name for name in CONSTRUCTIONS if name != "lora"]
GEOMETRIES = {
    "vit_base": Geometry(768, 12, 64, 12),
    "minilm": Geometry(384, 12, 32, 6),
    "vit_small": Geometry(384, 6, 64, 12),
    "deit_tiny": Geometry(192, 3, 64, 12),
    "vit_digits": Geometry(64, 4, 16, 4),
}
VIT_BASE = GEOMETRIES["vit_base"]

# The design's table for ViT-B/16 and RoBERTa-base at isorank 4.
ISORANK_4 = {
    "lora": 221_184,
    "att": 123_840,
    "qkv": 74_640,
    "depth": 18_768,
    "att_qkv": 43_728,
    "att_depth": 11_040,
    "qkv_depth": 6_460,
    "att_qkv_depth": 4_460,
}


@pytest.mark.parametrize(("name", "count"), ISORANK_4.items())
def test_isorank_counts_are_the_papers(name: str, count: int) -> None:
    assert parameter_count(name, VIT_BASE, isorank(name, VIT_BASE, 4)) == count


@pytest.mark.parametrize("name", TENSORS)
def test_capped_isorank_stops_at_the_modes_sizes(name: str) -> None:
    sizes = modes(name, VIT_BASE).values()
    assert isorank(name, VIT_BASE, 20, cap=True) == tuple(min(20, n) for n in sizes)


@pytest.mark.parametrize("name", TENSORS)
def test_isoparameters_meets_loras_count_within_three_per_cent_on_the_papers_backbones(name: str) -> None:
    assert abs(parameter_count(name, VIT_BASE, isoparameters(name, VIT_BASE)) / 221_184 - 1) < 0.03


def test_of_two_equally_near_counts_the_one_with_more_even_ranks_is_chosen() -> None:
    # (12, 8, 3) has 41 parameters per tensor too many, (10, 9, 3) 41 too few.
    assert isoparameters("qkv", GEOMETRIES["vit_digits"]) == (10, 9, 3)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize("name", TENSORS)
def test_every_rule_stays_near_the_budget_within_the_modes(name: str, geometry: Geometry, rule: str) -> None:
    ranks = isoparameters(name, geometry, rule=rule)
    lora = parameter_count("lora", geometry, [4])
    assert abs(parameter_count(name, geometry, ranks) / lora - 1) < 0.035
    assert all(1 <= r <= n for r, n in zip(ranks, modes(name, geometry).values(), strict=True))


@pytest.mark.parametrize("name", ["depth", "qkv_depth"])
def test_no_integer_ranks_nearby_come_nearer_when_the_tolerance_is_zero(name: str) -> None:
    geometry = GEOMETRIES["vit_digits"]
    budget = parameter_count("lora", geometry, [4])

    def miss(ranks: tuple[int, ...]) -> int:
        return abs(parameter_count(name, geometry, ranks) - budget)

    chosen = isoparameters(name, geometry, tolerance=0)
    for r_in, r_out in itertools.product(range(-1, 2), repeat=2):
        neighbour = (chosen[0] + r_in, chosen[1] + r_out, *chosen[2:])
        assert miss(chosen) <= miss(neighbour)


@pytest.mark.parametrize("tolerance", [0.0, 0.003, 0.01, 0.05])
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("depth", (16, 4, 8, 6)),
        ("depth", (64, 2, 16, 3)),
        ("qkv", (64, 2, 12, 3)),
        ("qkv", (64, 1, 12, 5)),
        ("qkv", (200, 2, 24, 6)),
        ("qkv_depth", (24, 2, 8, 6)),
    ],
)
def test_isoparameters_takes_the_best_of_all_ranks_within_a_third(
    name: str, sizes: tuple[int, int, int, int], tolerance: float
) -> None:
    geometry = Geometry(*sizes)
    d_in, d_out, *stacked = modes(name, geometry).values()
    tensors = {"depth": 3, "qkv": geometry.layers, "qkv_depth": 1}[name]
    budget = 4 * (d_in + d_out) * 3 * geometry.layers

    def count(*ranks: float) -> float:
        every = [*ranks, *stacked]
        return tensors * (math.prod(every) + sum(n * r for n, r in zip((d_in, d_out, *stacked), every, strict=True)))

    def real(t: float) -> tuple[float, float]:
        return min(t, d_in), min(t, d_out)

    t = brentq(lambda t: count(*real(t)) - budget, 1, max(d_in, d_out), xtol=1e-12)

    def distances(ranks: Sequence[float]) -> tuple[float, float]:
        excess = max(abs(count(*ranks) / budget - 1) - tolerance, 0.0)
        return round(excess, 9), round(sum(math.log(r / s) ** 2 for r, s in zip(ranks, real(t), strict=True)), 9)

    nearby = (
        range(max(1, math.ceil(0.75 * r)), min(n, int(r / 0.75)) + 1)
        for r, n in zip(real(t), (d_in, d_out), strict=True)
    )
    chosen = list(isoparameters(name, geometry, tolerance=tolerance))
    assert chosen[2:] == stacked
    assert distances(chosen[:2]) == min(map(distances, itertools.product(*nearby)))


@pytest.mark.parametrize("tolerance", [0.0, 0.01, 0.1])
@pytest.mark.parametrize("scale", [0.1, 0.3, 1.0, 1.7])
@pytest.mark.parametrize("sizes", [(16, 4, 8, 6), (64, 2, 16, 3), (12, 2, 4, 5)])
def test_isoparameters_takes_the_best_ranks_of_a_train_that_differ_by_less_than_two(
    sizes: tuple[int, int, int, int], scale: float, tolerance: float
) -> None:
    geometry = Geometry(*sizes)
    d_in, d_out, depth = modes("depth", geometry).values()
    limits = min(d_in, depth * d_out), min(d_in * depth, d_out)
    assert tuple(rank_limits("depth", geometry, "tensor_train").values()) == limits
    budget = scale * 4 * (d_in + d_out) * 3 * geometry.layers

    def count(first: float, second: float) -> float:
        return 3 * (d_in * first + first * depth * second + second * d_out)

    def real(t: float) -> list[float]:
        return [min(t, n) for n in limits]

    t = brentq(lambda t: count(*real(t)) - budget, 0.01, max(limits), xtol=1e-12)
    ideal = [max(1.0, r) for r in real(t)]

    def distances(ranks: Sequence[int]) -> tuple[float, float]:
        excess = max(abs(count(*ranks) / budget - 1) - tolerance, 0.0)
        return round(excess, 9), round(sum(math.log(r / s) ** 2 for r, s in zip(ranks, ideal, strict=True)), 9)

    nearby = ([r for r in range(1, n + 1) if abs(r - s) < 2] for s, n in zip(ideal, limits, strict=True))
    chosen = isoparameters("depth", geometry, tolerance=tolerance, scale=scale, factorization="tensor_train")
    assert distances(chosen) == min(map(distances, itertools.product(*nearby)))


def test_a_cp_rank_beyond_the_product_of_all_modes_but_the_largest_is_of_no_use() -> None:
    assert rank_limits("depth", VIT_BASE, "cp") == {"rank": 768 * 12}
    assert rank_limits("att_qkv", VIT_BASE, "cp") == {"rank": 64 * 12 * 3}


def test_the_count_may_be_one_per_cent_off_unless_said_otherwise() -> None:
    for name, geometry in itertools.product(TENSORS, GEOMETRIES.values()):
        assert isoparameters(name, geometry) == isoparameters(name, geometry, tolerance=0.01)


@pytest.mark.parametrize("scale", [0.7, 0.8, 0.9, 1.1, 1.2, 1.3])
@pytest.mark.parametrize("name", TENSORS)
def test_the_budget_may_be_scaled(name: str, scale: float) -> None:
    for geometry in (VIT_BASE, GEOMETRIES["vit_digits"]):
        budget = scale * parameter_count("lora", geometry, [4])
        ranks = RankStrategy("isoparameters", scale=scale).resolve(name, geometry)
        assert abs(parameter_count(name, geometry, ranks) / budget - 1) < 0.05


@pytest.mark.parametrize("rank", [1, 2, 8, 16])
def test_isoparameters_follows_the_reference_rank(rank: int) -> None:
    ranks = isoparameters("qkv_depth", VIT_BASE, rank)
    assert abs(parameter_count("qkv_depth", VIT_BASE, ranks) / (rank * 55_296) - 1) < 0.03


@pytest.mark.parametrize("factorization", FACTORIZATIONS)
@pytest.mark.parametrize(
    "strategy", [RankStrategy("isorank"), RankStrategy("isorank", cap=True), RankStrategy("isoparameters")]
)
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize("name", CONSTRUCTIONS)
def test_the_predicted_count_is_that_of_the_built_adapter(
    name: str, geometry: Geometry, strategy: RankStrategy, factorization: str
) -> None:
    with torch.device("meta"):  # shapes without the cost of drawing them and of measuring a first step
        adapter = Adapter(AdapterConfig(name, strategy, factorization=factorization), geometry, first_step=1.0)
    built = sum(p.numel() for p in adapter.parameters())
    ranks = strategy.resolve(name, geometry, factorization)
    assert built == parameter_count(name, geometry, ranks, factorization)


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("factorization", [name for name in FACTORIZATIONS if name != "tucker"])
def test_isoparameters_comes_as_near_as_the_other_factorizations_ranks_allow(
    factorization: str, name: str, geometry: Geometry
) -> None:
    def miss(ranks: tuple[int, ...]) -> int:
        return abs(parameter_count(name, geometry, ranks, factorization) - parameter_count("lora", geometry, [4]))

    ranks = isoparameters(name, geometry, factorization=factorization)
    limits = rank_limits(name, geometry, factorization).values()
    assert all(1 <= r <= n for r, n in zip(ranks, limits, strict=True))
    lora = parameter_count("lora", geometry, [4])
    if miss(ranks) > 0.01 * lora:  # then no single step comes nearer
        for k, step in itertools.product(range(len(ranks)), (-1, 1)):
            neighbour = (*ranks[:k], ranks[k] + step, *ranks[k + 1 :])
            if min(neighbour) >= 1 and all(r <= n for r, n in zip(neighbour, limits, strict=True)):
                assert miss(ranks) <= miss(neighbour)


# Counts written from the definitions: R sum n_i, and n_1 r_1 + sum r_k-1 n_k r_k + r_N-1 n_N.
@pytest.mark.parametrize(
    ("factorization", "name", "ranks", "count"),
    [
        ("cp", "att_qkv_depth", (5,), 5 * (768 + 64 + 12 + 3 + 12)),
        ("cp", "depth", (5,), 3 * 5 * (768 + 768 + 12)),
        ("tensor_train", "qkv_depth", (5, 6, 7), 768 * 5 + 5 * 3 * 6 + 6 * 12 * 7 + 7 * 768),
        ("tensor_train", "att", (5, 6), 36 * (768 * 5 + 5 * 12 * 6 + 6 * 64)),
        ("tensor_train", "lora", (5,), 36 * (768 * 5 + 5 * 768)),
        # Blocks of 24 rows, noise of 4 x 4: 4 (32 + 32) S + S 4 24 S + S R, and S n S for each axis that is stacked.
        ("tensor_guide", "att", (4, 5), 36 * (4 * 64 * 5 + 4 * 24 * 25 + 5 * 4)),
        ("tensor_guide", "qkv_depth", (4, 5), 4 * 64 * 5 + 4 * 24 * 25 + 25 * 3 + 25 * 12 + 5 * 4),
        ("tucker", "att_site", (5, 6, 7, 8), 768 * 5 + 64 * 6 + 12 * 7 + 36 * 8 + 5 * 6 * 7 * 8),
    ],
)
def test_counts_are_those_of_the_definitions(factorization: str, name: str, ranks: tuple[int, ...], count: int) -> None:
    assert parameter_count(name, VIT_BASE, ranks, factorization) == count


@pytest.mark.parametrize("name", CONSTRUCTIONS)
def test_explicit_ranks_are_counted_as_built(name: str) -> None:
    geometry = GEOMETRIES["minilm"]
    ranks = tuple(2 + i % 2 for i in range(len(rank_limits(name, geometry))))
    with torch.device("meta"):
        adapter = Adapter(AdapterConfig(name, RankStrategy("explicit", ranks=ranks)), geometry)
    assert adapter.ranks == ranks
    assert sum(p.numel() for p in adapter.parameters()) == parameter_count(name, geometry, ranks)


def test_explicit_ranks_are_taken_as_given() -> None:
    assert explicit("qkv_depth", VIT_BASE, [60, 60, 3, 12]) == (60, 60, 3, 12)
    assert explicit("lora", VIT_BASE, [8]) == (8,)


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        (None, r"ranks=None: tensor_mode qkv_depth needs 4 integers \(d_in 1\.\.768, .* depth 1\.\.12\)"),
        ([60, 60, 3], r"needs 4 integers"),
        ([60, 60, 3, 13], r"the rank 13 of depth must be from 1 to 12"),
        ([60, 0, 3, 12], r"the rank 0 of d_out must be from 1 to 768"),
        ([60, "60", 3, 12], r"the rank '60' of d_out must be a whole number"),
        ([60, 60, 3.0, 12], r"the rank 3\.0 of projection must be a whole number"),
        ([60, 60, True, 12], r"the rank True of projection must be a whole number"),
        (60, r"^ranks=60: must be a list of whole numbers"),
    ],
)
def test_explicit_ranks_that_do_not_fit_are_refused_by_name(ranks: Any, message: str) -> None:
    with pytest.raises(TensLoRAError, match=message):
        explicit("qkv_depth", VIT_BASE, ranks)


@pytest.mark.parametrize("ranks", [2.5, True, [2, "2"]])
def test_ranks_of_a_weight_are_whole_numbers(ranks: Any) -> None:
    with pytest.raises(TensLoRAError, match=r"^ranks=.* whole number"):
        weight_ranks((4, 3), ranks)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, r"^rank=0: must be at least 1$"),
        ({"rule": "best"}, r"^rule=best: must be one of saturate, uniform, proportional$"),
        ({"tolerance": 1.0}, r"^tolerance=1\.0: must be at least 0 and below 1$"),
        ({"scale": 0.0}, r"^scale=0\.0: must be above 0 and at most 1000$"),
        ({"scale": 1e30}, r"^scale=1e\+30: must be above 0 and at most 1000$"),
        ({"rank": "4"}, r"^rank='4': must be a whole number$"),
        ({"rank": 4.0}, r"^rank=4\.0: must be a whole number$"),
        ({"scale": "1"}, r"^scale='1': must be a number$"),
        ({"cap": "no"}, r"^cap='no': must be True or False$"),
        ({"ranks": 4}, r"^ranks=4: must be one rank for each mode, as in \(4, 4, 3\), or None$"),
        ({"name": "magic"}, r"^name=magic: must be one of isorank, isoparameters, explicit$"),
    ],
)
def test_a_strategy_out_of_range_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(TensLoRAError, match=message):
        RankStrategy(**settings)


def test_the_ends_of_the_ranges_are_valid() -> None:
    assert RankStrategy(tolerance=0).tolerance == 0
    assert RankStrategy(scale=1000).scale == 1000
    assert RankStrategy("isorank", rank=1).resolve("depth", VIT_BASE) == (1, 1, 1)
    assert RankStrategy("isorank", rank=768).resolve("lora", VIT_BASE) == (768,)


@pytest.mark.parametrize("name", ["isorank", "isoparameters"])
def test_a_rank_that_exceeds_the_projections_width_is_refused(name: str) -> None:
    with pytest.raises(TensLoRAError, match=r"^rank=769: must be from 1 to 768"):
        RankStrategy(name, rank=769).resolve("depth", VIT_BASE)


def test_rank_names_follow_the_modes() -> None:
    assert list(rank_limits("att_qkv", VIT_BASE)) == ["d_in", "d_head", "head", "projection"]
    assert rank_limits("lora", VIT_BASE) == {"rank": 768}


def test_counting_parameters_does_not_import_torch() -> None:
    code = "import sys, tenslora.adapter_config; from tenslora import RankStrategy; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_ranks_may_be_a_list_of_hydra() -> None:
    assert RankStrategy("explicit", ranks=cast(Any, OmegaConf.create([4, 4, 3, 2]))).ranks == (4, 4, 3, 2)


def test_ranks_may_be_an_array_or_a_tensor_of_whole_numbers() -> None:
    for given in (np.array([4, 4, 3, 2]), torch.tensor([4, 4, 3, 2]), np.array([4, 4, 3, 2], dtype=np.uint8)):
        strategy = RankStrategy("explicit", ranks=cast(Any, given))
        assert strategy == RankStrategy("explicit", ranks=(4, 4, 3, 2))
        assert json.dumps(strategy.ranks) == "[4, 4, 3, 2]"
    with pytest.raises(TensLoRAError, match=r"^ranks=4: must be one rank for each mode, as in \(4, 4, 3\), or None$"):
        RankStrategy("explicit", ranks=cast(Any, np.array(4)))
    for others in (np.array([4.0, 4, 3, 2]), np.array([[4, 4], [3, 2], [1, 1], [1, 1]])):
        with pytest.raises(TensLoRAError, match=r"the rank .* of d_in must be a whole number"):
            RankStrategy("explicit", ranks=cast(Any, others)).resolve("qkv_depth", VIT_BASE)
