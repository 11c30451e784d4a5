from __future__ import annotations

import pytest
import torch
from torch import nn

from tenslora.constructions import Geometry
from tenslora.errors import TensLoRAError
from tenslora.projections import check_geometry, find_projections
from tests.models import BUILDERS, GEOMETRY, build


@pytest.mark.parametrize("name", BUILDERS)
def test_every_projection_of_every_backbone_is_found(name: str) -> None:
    model = build(name)
    geometry, sites = find_projections(model)
    assert geometry == GEOMETRY
    held = [(site.layer, projection) for site in sites for projection in site.projections]
    assert sorted(held) == [(layer, projection) for layer in range(2) for projection in range(3)]
    for site in sites:
        assert model.get_submodule(site.path) is site.linear
        assert site.linear.weight.shape == (24 * len(site.projections), 24)


@pytest.mark.parametrize("name", ["hf_vit", "hf_bert", "hf_distilbert"])
def test_separate_projections_are_in_the_order_query_key_value(name: str) -> None:
    _, sites = find_projections(build(name))
    for site in sites:
        assert site.path.rpartition(".")[2][0] == "qkv"[site.projections[0]]


@pytest.mark.parametrize("name", BUILDERS)
def test_layers_are_numbered_as_the_data_passes_them(name: str) -> None:
    from tests.models import inputs

    model = build(name)
    _, sites = find_projections(model)
    passed: list[int] = []
    for site in sites:
        site.linear.register_forward_hook(lambda *_, layer=site.layer: passed.append(layer))
    model(**inputs(name))
    assert passed == sorted(passed)
    assert set(passed) == {0, 1}


def test_a_model_without_such_attention_is_refused() -> None:
    with pytest.raises(TensLoRAError, match=r"Sequential: no attention projections found.*query/key/value.*qkv"):
        find_projections(nn.Sequential(nn.Linear(4, 4)))


class _Block(nn.Module):
    def __init__(self, d_in: int, d_out: int, heads: int | None) -> None:
        super().__init__()
        self.qkv = nn.Linear(d_in, d_out)
        if heads:
            self.num_heads = heads


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([(8, 24, 2), (8, 48, 2)], r"uneven, \(d_in, d_out\) is \(8, 16\.0\) at 1\.qkv and \(8, 8\.0\) at 0\.qkv"),
        ([(8, 24, 2), (8, 24, 4)], r"uneven, heads is 4 at 1 and 2 at 0"),
        ([(8, 24, 3)], r"the output width 8 does not divide into 3 heads"),
        ([(8, 25, 2)], r"does not divide"),
        ([(8, 24, None)], r"the number of heads is not known; expected an attribute num_attention_heads"),
    ],
)
def test_uneven_attention_is_refused(blocks: list[tuple[int, int, int | None]], message: str) -> None:
    with pytest.raises(TensLoRAError, match=message):
        find_projections(nn.Sequential(*(_Block(*block) for block in blocks)))


def test_grouped_key_and_value_heads_are_refused_as_uneven() -> None:
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_heads = 4
            self.q_proj, self.k_proj, self.v_proj = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 4)

    with pytest.raises(TensLoRAError, match=r"uneven, \(d_in, d_out\) is \(8, 4\.0\) at k_proj"):
        find_projections(Grouped())


def test_a_declared_geometry_is_compared_dimension_by_dimension() -> None:
    check_geometry(None, GEOMETRY)
    check_geometry(GEOMETRY, GEOMETRY)
    with pytest.raises(TensLoRAError, match=r"model\.geometry\.layers=12: the backbone that was loaded has 2"):
        check_geometry(Geometry(d_in=24, heads=3, d_head=8, layers=12), GEOMETRY)


def test_finding_changes_nothing() -> None:
    model = build("hf_bert")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    find_projections(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "eva02_tiny_patch14_224"])
def test_attention_that_never_calls_its_linear_is_refused(name: str) -> None:
    import timm

    sizes = {"img_size": 28, "patch_size": 14, "embed_dim": 24, "depth": 1, "num_heads": 3, "num_classes": 2}
    with pytest.raises(TensLoRAError, match="does not call its Linear qkv"):
        find_projections(timm.create_model(name, **sizes))
