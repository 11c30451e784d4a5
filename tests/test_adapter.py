from __future__ import annotations

import dataclasses
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accelerate import init_empty_weights
from safetensors.torch import load_file, save_file
from torch import Tensor

from tenslora.adapter import Adapter, load_adapter, make_adapter
from tenslora.adapter_config import AdapterConfig
from tenslora.constructions import CONSTRUCTIONS, Geometry
from tenslora.errors import TensLoRAError
from tenslora.files import read_safetensors, write_safetensors
from tenslora.peft import TensLoraConfig
from tenslora.ranks import RankStrategy
from tenslora.tensor_update import TensorUpdate, TensorUpdateConfig
from tests.conftest import ROOT

GEOMETRY = Geometry(d_in=12, heads=3, d_head=4, layers=4)


def build(mode: str, **settings: Any) -> Adapter:
    return Adapter(AdapterConfig(mode, **settings), GEOMETRY)


def build_random(mode: str) -> Adapter:
    adapter = build(mode)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_()
    return adapter


@pytest.mark.parametrize("name", CONSTRUCTIONS)
def test_each_projection_and_layer_reads_its_own_tensor(name: str) -> None:
    # Silencing one tensor must silence the projections and layers that are stacked in it, and no others.
    adapter = build_random(name)
    stacked = CONSTRUCTIONS[name]
    index = len(adapter.tensors) - 1  # holds the last projection and the last layer
    with torch.no_grad():
        for parameter in adapter.tensors[index].parameters():
            parameter.zero_()
    for layer in range(GEOMETRY.layers):
        for projection in range(3):
            silent = (layer == 3 or stacked & {"depth", "site"}) and (
                projection == 2 or stacked & {"projection", "site"}
            )
            assert (adapter.dense(layer)[projection].abs().max().item() == 0) == bool(silent)


@pytest.mark.parametrize("name", CONSTRUCTIONS)
def test_the_start_depends_on_the_seed_and_nothing_else(name: str) -> None:
    torch.manual_seed(1)
    first = build(name, seed=5)
    torch.manual_seed(2)
    again, other = build(name, seed=5), build(name, seed=6)
    state = torch.get_rng_state()
    build(name)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


def test_tensors_start_differently_unless_equal_seeds_are_asked_for() -> None:
    for adapter, equal in ((build("depth"), False), (build("depth", tensor_seeds="equal"), True)):
        first, second = (tensor.get_parameter("d_in") for tensor in adapter.tensors[:2])
        assert torch.equal(first, second) == equal
        assert torch.equal(first, build("depth").tensors[0].get_parameter("d_in"))


@pytest.mark.parametrize("name", CONSTRUCTIONS)
def test_a_saved_adapter_is_loaded_as_it_was(name: str, tmp_path: Path) -> None:
    adapter = build_random(name)
    adapter.save(tmp_path / "a.safetensors")
    (loaded,) = load_adapter(tmp_path / "a.safetensors").stages
    assert (loaded.config, loaded.geometry, loaded.ranks) == (adapter.config, adapter.geometry, adapter.ranks)
    for layer in range(GEOMETRY.layers):
        assert all(map(torch.equal, loaded.dense(layer), adapter.dense(layer)))


def test_a_saved_adapter_keeps_its_ranks_whatever_its_strategy_would_choose(tmp_path: Path) -> None:
    config = AdapterConfig("depth", RankStrategy("isoparameters"))
    adapter = Adapter(config, GEOMETRY, ranks=[3, 2, 4])
    adapter.save(tmp_path / "a.safetensors")
    assert load_adapter(tmp_path / "a.safetensors").stages[0].ranks == (3, 2, 4)


@pytest.mark.parametrize(
    ("config", "shown"),
    [
        (AdapterConfig("lora"), "lora, rank 4; 1,152 parameters in 12 tensors"),
        (AdapterConfig("lora", scaling="first_step"), "lora, rank 4, scaling=first_step; 1,152 parameters"),
        (AdapterConfig("qkv", RankStrategy("isorank"), factorization="cp"), "qkv, cp, rank 4; 432 parameters in 4"),
        (
            AdapterConfig("depth", RankStrategy("explicit", ranks=(3, 2, 4))),
            "depth, tucker, ranks d_in=3, d_out=2, depth=4; 300 parameters in 3 tensors",
        ),
    ],
)
def test_an_adapter_is_printed_in_one_line(config: AdapterConfig, shown: str) -> None:
    # lora: 12 * 4 * (12 + 12); CP: 4 * 4 * (12 + 12 + 3); Tucker: 3 * (3 * 12 + 2 * 12 + 4 * 4 + 3 * 2 * 4)
    assert repr(Adapter(config, GEOMETRY)).startswith(f"Adapter({shown}")


def test_python_and_conf_choose_the_same_ranks_by_default() -> None:
    conf = yaml.safe_load((ROOT / "conf" / "rank_strategy" / "isoparameters.yaml").read_text())
    defaults = yaml.safe_load((ROOT / "conf" / "config.yaml").read_text())["defaults"]
    assert {"rank_strategy": conf["name"]} in defaults
    assert AdapterConfig().rank_strategy == RankStrategy(**conf)


def test_an_adapter_of_the_smallest_ranks_is_loaded_too(tmp_path: Path) -> None:
    build("qkv", rank_strategy=RankStrategy("isorank", rank=1)).save(tmp_path / "a.safetensors")
    assert load_adapter(tmp_path / "a.safetensors").stages[0].ranks == (1, 1, 1)


def test_equal_adapters_are_saved_as_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        build("att_qkv_depth").save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_file_is_plain_safetensors(tmp_path: Path) -> None:
    adapter = build_random("qkv_depth")
    adapter.save(tmp_path / "a.safetensors")
    tensors = load_file(tmp_path / "a.safetensors")
    assert torch.equal(tensors["tensors.0.core"], adapter.get_parameter("tensors.0.core"))


@pytest.mark.parametrize("mode", ["lora", "qkv_depth"])
@pytest.mark.parametrize("layer", [-1, 4, 1.0])
def test_a_layer_that_is_not_there_is_refused(mode: str, layer: Any) -> None:
    with pytest.raises(TensLoRAError, match=r"^layer"):
        build(mode).dense(layer)


@pytest.mark.parametrize("mode", ["lora", "qkv", "qkv_depth"])
@pytest.mark.parametrize("layers", [range(0, 4, 2), range(3, -1, -1), range(2, 2), [0, 2]])
def test_layers_that_are_no_neighbours_are_refused(mode: str, layers: Any) -> None:
    with pytest.raises(TensLoRAError, match=r"^layers=.*: must be a range of neighbours from 0 to 3$"):
        build(mode).products(layers)


@pytest.mark.parametrize("mode", ["lora", "qkv", "qkv_depth"])
@pytest.mark.parametrize("matrices", [range(0, 3, 2), range(2, 5), [0, 2]])
def test_matrices_that_are_no_neighbours_are_refused(mode: str, matrices: Any) -> None:
    with pytest.raises(TensLoRAError, match=r"^matrices=.*: must be a range of neighbours from 0 to 2$"):
        build(mode).products(range(4), matrices)


@pytest.mark.parametrize("ranks", [[4, 4, 3], "4432", [4, 4, 3, 0], [2.5, 4, 3, 2], [4, 4, 3, True], None])
def test_ranks_that_do_not_fit_leave_the_adapter_as_it_was(ranks: Any) -> None:
    adapter = build_random("qkv_depth")
    before, products = adapter.ranks, adapter.dense(0)
    with pytest.raises(TensLoRAError, match=r"^ranks"):
        adapter.resize(ranks)
    assert adapter.ranks == before
    assert all(map(torch.equal, adapter.dense(0), products))


def test_a_factor_that_is_not_trained_may_be_a_buffer(tmp_path: Path) -> None:
    adapter = build_random("qkv_depth")
    tensor = adapter.tensors[0]
    values = tensor.get_parameter("depth").detach()
    del tensor.depth
    tensor.register_buffer("depth", values)
    loaded = load_adapter(adapter.save(tmp_path / "a.safetensors")).stages[0]
    assert all(map(torch.equal, loaded.dense(3), adapter.dense(3)))


def test_a_buffer_that_a_profiler_has_put_there_is_not_saved(tmp_path: Path) -> None:
    adapter = build_random("qkv_depth")
    for module in adapter.modules():
        module.register_buffer("total_ops", torch.zeros(1))
    (loaded,) = load_adapter(adapter.save(tmp_path / "a.safetensors")).stages
    assert all(map(torch.equal, loaded.dense(3), adapter.dense(3)))
    with pytest.raises(TensLoRAError, match=r": cannot be written, because it is a folder; save_pretrained"):
        adapter.save(tmp_path)


def test_a_file_that_is_no_adapter_is_refused(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(TensLoRAError, match="not a TensLoRA adapter"):
        load_adapter(tmp_path / "other.safetensors")
    with pytest.raises(TensLoRAError, match="no such file"):
        load_adapter(tmp_path / "missing.safetensors")


def changed(path: Path, changes: dict[str, Any] | None = None, **tensors: Tensor | None) -> Path:
    """Write an adapter file whose header and tensors differ from a valid one.

    Args:
        path: the file.
        changes: new values by their path in the header, such as {"config.alpha": 1}; ... deletes the entry.
        tensors: new values by the end of the tensor's name, of its first tensor; None deletes it.
    """
    header, saved = read_safetensors(build_random("qkv_depth").save(path))
    for place, value in (changes or {}).items():
        group, _, name = place.rpartition(".")
        entry = header[group] if group else header
        if value is ...:
            del entry[name]
        else:
            entry[name] = value
    for name, tensor in tensors.items():
        saved.pop(f"tensors.0.{name}", None)
        if tensor is not None:
            saved[f"tensors.0.{name}"] = tensor
    return write_safetensors(path, saved, header)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"config": ...}, "config: is missing"),
        ({"config": []}, r"config=\[\]: must be an object"),
        ({"config.alpha": float("inf")}, "config.alpha=Infinity: must be a finite number"),
        ({"config.alpha": 1e300}, "config.alpha=1e\\+300: must be a finite number, from -1,000,000"),
        ({"config.dropout": "0"}, 'config.dropout="0": must be a finite number'),
        ({"config.tensor_mode": "att"}, "ranks=.*: must be 3 whole numbers"),
        ({"config.tensor_mode": "qkv"}, "ranks=.*: must be 3 whole numbers"),
        ({"config.adapt": "qv"}, "adapt=qv: must be qkv, as in the geometry"),
        ({"config.rank_strategy": {"ranks": "4"}}, 'config.rank_strategy.ranks="4": must be a list or null'),
        ({"config.scaling": "first_step", "first_step": 1e-300}, "alpha=4.0: gives .* a scale of "),
        ({"config.a\nb": 1}, r'config\."a\\nb": there is no such field'),
        ({"first_step": 0.0}, "first_step=0.0: must be a finite number above 0"),
        ({"ranks": []}, r"ranks=\[\]: must be 4 whole numbers"),
        ({"ranks": [4, 4, 3]}, "ranks=.*: must be 4 whole numbers"),
        ({"ranks": [4, 4, 3, 0]}, "ranks=.*: must be 4 whole numbers from 1 up"),
        ({"geometry.layers": 10**9}, r"tensors.0.depth has the shape \(4, \d+\), not \(1000000000, "),
        ({"geometry.layers": 10**300}, "geometry.layers=10+...: must be from -9,007"),
        ({"config.tensor_mode": "lora", "ranks": [4], "geometry.layers": 10**9}, "declares 6000000000 tensors, and"),
        ({"geometry.heads": 0}, "geometry.heads=0: must be at least 1"),
    ],
)
def test_a_header_of_another_form_is_refused_in_one_line(changes: dict[str, Any], problem: str, tmp_path: Path) -> None:
    with pytest.raises(TensLoRAError, match=f"a.safetensors: not a readable adapter: .*{problem}") as caught:
        load_adapter(changed(tmp_path / "a.safetensors", changes))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("header", ["[]", "5", "null", "[" * 9999, '{"format": NaN}', '"'])
def test_a_header_that_is_no_object_is_refused_in_one_line(header: str, tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "a.safetensors", metadata={"tenslora": header})
    with pytest.raises(TensLoRAError, match=r"a\.safetensors: not a (readable safetensors file|TensLoRA)") as caught:
        load_adapter(tmp_path / "a.safetensors")
    assert len(str(caught.value).splitlines()) == 1


DEPTH = torch.zeros(4, 4)


@pytest.mark.parametrize(
    ("tensor", "problem"),
    [
        (None, "declares 5 tensors, and it holds 4"),
        (torch.zeros(4, 5), r"depth has the shape \(4, 5\), not \(4, 4\)"),
        (DEPTH + float("nan"), "depth holds a NaN or an infinity"),
        (DEPTH - float("inf"), "depth holds a NaN or an infinity"),
        (DEPTH.double() + 1e300, "depth holds a NaN or an infinity"),  # in float32
        (DEPTH.to(torch.complex64), "depth has the type complex64; must be one of float32"),
        (DEPTH.int(), "depth has the type int32"),
        (DEPTH.bool(), "depth has the type bool"),
        (DEPTH.to(torch.float8_e4m3fn), "depth has the type float8_e4m3fn"),
    ],
)
def test_tensors_of_another_form_are_refused(tensor: Tensor | None, problem: str, tmp_path: Path) -> None:
    with pytest.raises(TensLoRAError, match=rf"a\.safetensors: not a readable adapter: .*{problem}"):
        load_adapter(changed(tmp_path / "a.safetensors", depth=tensor))


def test_a_tensor_too_many_or_of_another_name_is_refused(tmp_path: Path) -> None:
    for tensors in ({"other": DEPTH}, {"other": DEPTH, "depth": None}):
        with pytest.raises(TensLoRAError, match=r"a\.safetensors: .*(it holds 6|lacks tensors\.0\.depth)"):
            load_adapter(changed(tmp_path / "a.safetensors", **tensors))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_an_adapter_in_another_precision_is_read_in_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    adapter = build_random("qkv_depth").to(dtype)
    loaded = load_adapter(adapter.save(tmp_path / "a.safetensors"))
    for ours, saved in zip(loaded.parameters(), adapter.parameters(), strict=True):
        assert torch.equal(ours, saved.float())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dropout": 1.0}, r"^dropout=1\.0: must be at least 0 and below 1$"),
        ({"rank_dropout": -0.1}, r"^rank_dropout=-0\.1: must be at least 0 and below 1$"),
        ({"alpha": float("nan")}, r"^alpha=nan: must be a finite number, from -1,000,000 to 1,000,000$"),
        ({"alpha": -1e7}, r"^alpha=-10000000\.0: must be a finite number, from -1,000,000 to 1,000,000$"),
        ({"init": "zeros"}, r"^init=zeros: must be one of orthogonal, normal, kaiming_uniform$"),
        ({"head_layout": "diagonal"}, r"^head_layout=diagonal: must be one of aligned, interleaved$"),
        ({"tensor_seeds": "some"}, r"^tensor_seeds=some: must be one of distinct, equal$"),
        ({"factorization": "hosvd"}, r"^factorization=hosvd: must be one of tucker, cp, tensor_train, tensor_guide$"),
        ({"tensor_mode": "nope"}, r"^tensor_mode=nope: must be one of lora, att"),
        ({"tensor_mode": "qkvdepth"}, r"^tensor_mode=qkvdepth: must be one of qkv_depth, depth, att_qkv_depth, lora"),
        ({"tensor_mode": None}, r"^tensor_mode=None: must be one of lora, att"),
        ({"adapt": "vq"}, r"^adapt=vq: must be letters of qkvo in that order"),
        ({"rank_strategy": "isorank"}, r"rank_strategy='isorank': must be a RankStrategy"),
        ({"alpha": "4"}, r"^alpha='4': must be a number$"),
        ({"dropout": None}, r"^dropout=None: must be a number$"),
        ({"rank_dropout": True}, r"^rank_dropout=True: must be a number$"),
        ({"seed": 1.5}, r"^seed=1\.5: must be a whole number$"),
        ({"adapt": 3}, r"^adapt=3: must be letters of qkvo in that order"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(TensLoRAError, match=message):
        AdapterConfig(**settings)


@pytest.mark.parametrize(("make", "name"), [(AdapterConfig, "alpha"), (AdapterConfig, "seed"), (RankStrategy, "rank")])
def test_a_number_that_python_does_not_print_is_refused(make: Any, name: str) -> None:
    with pytest.raises(TensLoRAError, match=rf"^{name}: must be a number that a float can hold"):
        make(**{name: 10**5000})


def test_an_adapter_that_was_changed_by_hand_is_not_saved(tmp_path: Path) -> None:
    geometry = Geometry(d_in=24, heads=3, d_head=8, layers=2)
    for scaling in ("direct", "first_step"):
        adapter = Adapter(AdapterConfig("qkv_depth", scaling=scaling), geometry)
        adapter.save(tmp_path / "kept.safetensors")
        load_adapter(tmp_path / "kept.safetensors").save(tmp_path / "again.safetensors")
        adapter.scale = 1.0
        with pytest.raises(TensLoRAError, match=r"^scale=1: is not that of the adapter's config, and a file holds"):
            adapter.save(tmp_path / "changed.safetensors")
    adapter = Adapter(AdapterConfig("qkv_depth"), geometry)
    adapter.config = dataclasses.replace(adapter.config, alpha=1.0)
    with pytest.raises(TensLoRAError, match=r"^scale=4: is not that of the adapter's config"):
        adapter.save(tmp_path / "changed.safetensors")
    adapter = Adapter(AdapterConfig("qkv_depth"), geometry)
    core = adapter.tensors[0].get_parameter("core")
    adapter.tensors[0].core = torch.nn.Parameter(core[:5].detach())
    with pytest.raises(TensLoRAError, match=r"^tensors\.0\.core: has the shape \(5, .*, which follows from ranks=\["):
        adapter.save(tmp_path / "changed.safetensors")
    assert not (tmp_path / "changed.safetensors").exists()


@pytest.mark.parametrize("number", [2**53 + 1, -(2**60), np.uint64(2**63)])
def test_a_number_that_no_file_is_read_with_is_refused_at_once(number: Any) -> None:
    makers: list[Any] = [
        lambda: AdapterConfig(seed=number),
        lambda: TensorUpdateConfig((1,), seed=number),
        lambda: TensLoraConfig(seed=number),
        lambda: RankStrategy(rank=number),
        lambda: Geometry(d_in=12, heads=3, d_head=4, layers=number),
    ]
    for make in makers:
        with pytest.raises(
            TensLoRAError, match=r"^\w+=-?\d+: must be from -9,007,199,254,740,992 to 9,007,199,254,740,992$"
        ):
            make()


def test_the_largest_seed_is_saved_and_loaded(tmp_path: Path) -> None:
    adapter = build("qkv", seed=2**53)
    assert load_adapter(adapter.save(tmp_path / "a.safetensors")).config == adapter.config


def test_a_scale_that_no_file_holds_or_that_has_no_effect_is_refused(tmp_path: Path) -> None:
    geometry = Geometry(d_in=8, heads=2, d_head=4, layers=2)
    adapter: Any = Adapter(AdapterConfig("qkv_depth"), geometry)
    adapter.scale = torch.nn.Parameter(torch.tensor(4.0))
    with pytest.raises(TensLoRAError, match=r"^scale: was made a parameter"):
        adapter.save(tmp_path / "adapter.safetensors")
    adapter.scale = 4
    adapter.save(tmp_path / "adapter.safetensors")
    staged: Any = make_adapter(AdapterConfig("qkv_depth"), [geometry, dataclasses.replace(geometry, d_in=12)])
    with pytest.raises(AttributeError, match=r"^scale: each of the adapter's stages has its own$"):
        _ = staged.scale
    assert getattr(staged, "scale", None) is None
    with pytest.raises(TensLoRAError, match=r"^scale=0\.5: would have no effect here; set that of each"):
        staged.scale = 0.5
    assert [stage.scale for stage in staged.stages] == [4.0, 4.0]


def _scaled_modules() -> list[Any]:
    geometry = Geometry(d_in=8, heads=2, d_head=4, layers=2)
    return [Adapter(AdapterConfig("qkv_depth"), geometry), TensorUpdate(TensorUpdateConfig((2, 2)), (3, 4))]


@pytest.mark.parametrize("value", ["0.5", None, math.nan, -math.inf, "huge", 1j, torch.ones(2), torch.tensor(math.nan)])
def test_a_scale_that_is_no_finite_number_is_refused_when_it_is_set(value: object) -> None:
    for module in _scaled_modules():
        before = module.scale
        with pytest.raises(
            TensLoRAError, match=r"^scale=.*: must be a finite number, from -1,000,000 to 1,000,000, or"
        ):
            module.scale = value
        assert module.scale is before


@pytest.mark.parametrize(
    "half", [np.float32(0.5), Fraction(1, 2), torch.tensor([0.5]), torch.nn.Parameter(torch.tensor(0.5))]
)
def test_a_scale_may_be_any_number_or_a_tensor_of_one(half: Any) -> None:
    adapter, update = _scaled_modules()
    adapter.scale = update.scale = half
    assert torch.equal(update.update(), 0.5 * update.tensor.full())
    _, rights = adapter.products(range(1), scale=adapter.scale)
    assert torch.equal(rights[0], adapter.products(range(1), scale=0.5)[1][0])


@pytest.mark.parametrize("include_buffers", [False, True])
@pytest.mark.parametrize("init", ["normal", "kaiming_uniform"])
def test_an_adapter_without_numbers_knows_its_first_step(init: str, include_buffers: bool) -> None:
    for mode, factorization in (("qkv_depth", "tucker"), ("att", "tensor_guide"), ("depth", "cp")):
        settings = {"init": init, "factorization": factorization, "scaling": "first_step", "seed": 3}
        expected = build(mode, **settings)
        with init_empty_weights(include_buffers=include_buffers):
            planned = build(mode, **settings)
        assert all(parameter.is_meta for parameter in planned.parameters())
        assert (planned.first_step, planned.scale) == (expected.first_step, expected.scale)
