"""Files of adapters that are not as this project or PEFT writes them: nothing behind the door meets a wrong form.

With --hypothesis-profile=large each door takes 5,000 examples.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tenslora import AdapterConfig, Geometry, TensLoRAError
from tenslora.adapter import Adapter, load_adapter, make_adapter
from tenslora.files import read_safetensors, write_safetensors
from tenslora.peft.saved_lora import CONFIG, WEIGHTS, read_updates
from tenslora.projections import find_projections
from tenslora.ranks import RankStrategy
from tests.models import build
from tests.mutations import as_bytes, damaged, json_like, other_tensors, time_limit
from tests.peft.test_saved_lora import save_random_lora


def one_line(error: TensLoRAError, path: Path) -> None:
    assert str(error).startswith(f"{path}")
    assert str(error).isprintable()
    assert len(str(error)) < 1000


def edit_tensors(path: Path, original: Path, data: st.DataObject) -> None:
    """Write a safetensors file with another header, with other tensors, or with damaged bytes."""
    header, tensors = read_safetensors(original)
    kind = data.draw(st.sampled_from(["header", "tensors", "bytes"]))
    if kind == "bytes":
        path.write_bytes(data.draw(damaged(original.read_bytes())))
    else:
        changed = data.draw(json_like(header)) if kind == "header" else header
        write_safetensors(path, data.draw(other_tensors(tensors)) if kind == "tensors" else tensors, changed)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Files of adapters of several kinds."""
    folder = tmp_path_factory.mktemp("adapters")
    geometry = Geometry(d_in=24, heads=3, d_head=8, layers=2)
    isorank = RankStrategy("isorank", rank=2)
    configs = [
        AdapterConfig("qkv_depth", isorank),
        AdapterConfig("lora", isorank, dropout=0.1),
        AdapterConfig("att_depth", isorank, factorization="cp", scaling="first_step"),
        AdapterConfig("att_site", RankStrategy("explicit", ranks=(2, 2, 2)), factorization="tensor_train"),
    ]
    files = [Adapter(config, geometry).save(folder / f"{number}.safetensors") for number, config in enumerate(configs)]
    stages = make_adapter(configs[0], [geometry, Geometry(d_in=16, heads=2, d_head=8, layers=1)])
    return [*files, stages.save(folder / "stages.safetensors", beside=["head.bias", "head.weight"])]


@given(data=st.data())
def test_a_changed_adapter_is_refused_in_one_line_or_is_an_adapter(adapters: list[Path], data: st.DataObject) -> None:
    path = adapters[0].with_name("changed")
    edit_tensors(path, data.draw(st.sampled_from(adapters)), data)
    with time_limit():
        try:
            adapter = load_adapter(path)
        except TensLoRAError as error:
            one_line(error, path)
            return
        assert all(parameter.isfinite().all() for parameter in adapter.parameters())
        again = load_adapter(adapter.save(path))
    assert repr(again) == repr(adapter)
    assert [stage.scale for stage in again.stages] == [stage.scale for stage in adapter.stages]
    assert all(map(torch.equal, again.state_dict().values(), adapter.state_dict().values()))


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a LoRA that PEFT saved."""
    folder = tmp_path_factory.mktemp("lora")
    save_random_lora(
        build("hf_bert").float(), folder, r=2, lora_alpha=3, target_modules=["query", "value"],
        rank_pattern={"layer.1.attention.self.query": 3}, alpha_pattern={"value": 2},
    )  # fmt: skip
    return folder


@given(data=st.data())
def test_a_changed_folder_of_pefts_is_refused_in_one_line_or_gives_finite_updates(
    lora: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.getbasetemp() / "changed_lora"
    folder.mkdir(exist_ok=True)
    for name in (CONFIG, WEIGHTS):
        (folder / name).write_bytes((lora / name).read_bytes())
    if data.draw(st.booleans()):
        edit_tensors(folder / WEIGHTS, lora / WEIGHTS, data)
    else:
        text = json_like(json.loads((lora / CONFIG).read_text())).map(as_bytes)
        (folder / CONFIG).write_bytes(data.draw(st.one_of(text, text, damaged((lora / CONFIG).read_bytes()))))
    model = build("hf_bert").float()
    with time_limit():
        try:
            [updates] = read_updates(folder, find_projections(model))
        except TensLoRAError as error:
            one_line(error, folder)
            return
    assert all(update.isfinite().all() for layer in updates for update in layer)
    assert [[tuple(update.shape) for update in layer] for layer in updates] == [[(24, 24)] * 3] * 2
