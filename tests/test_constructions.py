from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import pytest

from tenslora.constructions import CONSTRUCTIONS, Geometry, adapted_matrices, modes, stacked_axes, tensor_grid
from tenslora.errors import TensLoRAError

VIT_BASE = Geometry(d_in=768, heads=12, d_head=64, layers=12)

# Modes of one tensor and number of tensors: the paper's constructions (section 2), then the two over sites.
TABLE = {
    "lora": ([768, 768], 36),
    "att": ([768, 64, 12], 36),
    "qkv": ([768, 768, 3], 12),
    "depth": ([768, 768, 12], 3),
    "att_qkv": ([768, 64, 12, 3], 12),
    "att_depth": ([768, 64, 12, 12], 3),
    "qkv_depth": ([768, 768, 3, 12], 1),
    "att_qkv_depth": ([768, 64, 12, 3, 12], 1),
    "site": ([768, 768, 36], 1),
    "att_site": ([768, 64, 12, 36], 1),
}


@pytest.mark.parametrize("name", TABLE)
def test_modes_and_numbers_of_tensors_are_those_of_the_definitions(name: str) -> None:
    sizes, tensors = TABLE[name]
    assert list(modes(name, VIT_BASE).values()) == sizes
    assert math.prod(tensor_grid(name, VIT_BASE)) == tensors


def test_every_subset_of_the_axes_has_one_name() -> None:
    # Site is projection and depth as one axis, so it does not occur together with either.
    subsets = {
        frozenset(c)
        for axes in (["head", "projection", "depth"], ["head", "site"])
        for size in range(4)
        for c in combinations(axes, size)
    }
    assert set(CONSTRUCTIONS.values()) == subsets
    assert len(CONSTRUCTIONS) == len(subsets)


@pytest.mark.parametrize("name", CONSTRUCTIONS)
def test_the_tensors_hold_each_entry_of_each_update_once(name: str) -> None:
    geometry = Geometry(d_in=10, heads=2, d_head=7, layers=5)
    entries = math.prod(modes(name, geometry).values()) * math.prod(tensor_grid(name, geometry))
    assert entries == 3 * 5 * 10 * 14


def test_the_error_for_an_unknown_construction_lists_the_known_ones() -> None:
    with pytest.raises(TensLoRAError, match=r"tensor_mode=nope: must be one of lora, att, .*att_qkv_depth"):
        stacked_axes("nope")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"heads": 0}, r"^heads=0: must be at least 1$"),
        ({"kv_heads": 0}, r"^kv_heads=0: must be at least 1$"),
        ({"d_in": "8"}, r"^d_in='8': must be a whole number$"),
        ({"layers": 2.0}, r"^layers=2\.0: must be a whole number$"),
        ({"d_ff": True}, r"^d_ff=True: must be a whole number$"),
    ],
)
def test_a_dimension_that_is_no_whole_number_from_1_up_is_refused(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(TensLoRAError, match=message):
        Geometry(**{"d_in": 8, "heads": 2, "d_head": 4, "layers": 1, **sizes})


def test_adapted_matrices_are_named_by_letters_or_groups() -> None:
    assert adapted_matrices("qkv") == ("query", "key", "value")
    assert adapted_matrices("vo") == ("value", "output")
    assert adapted_matrices("mlp", gated=True) == ("gate", "up", "down")
    assert adapted_matrices("all") == ("query", "key", "value", "output", "up", "down")
    for wrong in ("", "vq", "qq", "x", "qkvmlp"):
        with pytest.raises(TensLoRAError, match=rf"^adapt={wrong}: must be letters of qkvo in that order"):
            adapted_matrices(wrong)


def test_wide_matrices_take_several_slices_and_narrow_ones_a_part() -> None:
    # In a ViT-B/16 each matrix of the feed-forward block takes 4 slices, as in FacT: 12 in all.
    vit = Geometry(d_in=768, heads=12, d_head=64, layers=12, adapt="all", d_ff=3072)
    assert (vit.slices_per_matrix, vit.projections) == ((1, 1, 1, 1, 4, 4), 12)
    assert modes("site", vit) == {"d_in": 768, "d_out": 768, "site": 144}
    assert modes("depth", vit, matrix=4) == {"d_in": 768, "d_out": 3072, "depth": 12}
    # Llama-2 7B's feed-forward block is 2.69 times as wide as its attention, and Llama-3's keys a quarter.
    llama = Geometry(d_in=4096, heads=32, d_head=128, layers=32, adapt="all", kv_heads=8, d_ff=11008, gated=True)
    assert llama.widths == (4096, 1024, 1024, 4096, 11008, 11008, 11008)
    assert llama.slices_per_matrix == (1, 1, 1, 1, 3, 3, 3)


def test_widths_that_do_not_divide_into_heads_are_refused_only_where_heads_are_stacked() -> None:
    geometry = Geometry(d_in=24, heads=3, d_head=8, layers=2, adapt="mlp", d_ff=60)
    assert modes("depth", geometry)["d_out"] == 60
    assert modes("att_qkv", geometry)["head"] == 3
    with pytest.raises(TensLoRAError, match=r"tensor_mode=att: the up matrix is 60 wide, .* heads of 8"):
        modes("att", geometry)
    with pytest.raises(TensLoRAError, match=r"^adapt=mlp: needs d_ff"):
        Geometry(d_in=24, heads=3, d_head=8, layers=2, adapt="mlp")
