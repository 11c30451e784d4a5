"""An adapter and the head that was trained beside it, kept in one folder or on the hub."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import huggingface_hub
import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml
from accelerate.utils import compile_regions
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrizations
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from tenslora import (
    AdapterConfig,
    RankStrategy,
    TensLoRAError,
    adapt_tensor,
    attach,
    detach,
    load,
    load_tensors,
    merge,
    pretrained,
    push_to_hub,
    save_pretrained,
    save_tensors,
    unmerge,
)
from tenslora.attachment import adapter_of
from tests.hub_server import serving
from tests.models import build, inputs, logits
from tests.plain_transformer import PlainTransformer


def trained(name: str = "hf_bert", head: str = "classifier") -> nn.Module:
    """A model whose adapter and head have random entries, in float64."""
    model = build(name)
    attach(model, AdapterConfig("qkv_depth"), train=[head]).double()
    scramble(model)
    return model


def scramble(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(("name", "head"), [("hf_bert", "classifier"), ("hf_vit", "classifier"), ("timm_vit", "head")])
def test_a_loaded_model_computes_what_the_saved_one_did_and_can_be_trained_on(
    name: str, head: str, tmp_path: Path
) -> None:
    model, other = trained(name, head), build(name)
    assert save_pretrained(model, tmp_path / "new") == tmp_path / "new"
    assert {file.name for file in (tmp_path / "new").iterdir()} == {"adapter.safetensors", "head.safetensors"}
    assert set(load_file(tmp_path / "new" / "head.safetensors")) == {f"{head}.weight", f"{head}.bias"}
    load(other, tmp_path / "new").double()
    assert torch.equal(logits(other, inputs(name)), logits(model, inputs(name)))
    assert trainable(other) == trainable(model)


def test_an_adapter_alone_replaces_an_adapter_with_a_head(tmp_path: Path) -> None:
    save_pretrained(trained(), tmp_path)
    alone = build("hf_bert")
    attach(alone, AdapterConfig("depth"))
    save_pretrained(alone, tmp_path)
    other = build("hf_bert")
    assert load(other, tmp_path).config.tensor_mode == "depth"
    assert {name.partition(".")[0] for name in trainable(other)} == {"tenslora"}
    single = build("hf_bert")
    load(single, str(tmp_path / "adapter.safetensors"))
    assert {name.partition(".")[0] for name in trainable(single)} == {"tenslora"}


class TwoHeads(PlainTransformer):
    """A batch norm and two heads that share their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(24)
        self.out, self.again = nn.Linear(24, 2), nn.Linear(24, 2)
        self.again.weight = self.out.weight


@pytest.mark.parametrize("earlier", ["depth with head", "depth alone"])
def test_an_adapter_that_cannot_be_written_leaves_the_older_one_its_head(earlier: str, tmp_path: Path) -> None:
    model = PlainTransformer()
    attach(model, AdapterConfig("depth"), train=["head"] if "head" in earlier else [])
    save_pretrained(model, tmp_path)
    (tmp_path / "adapter.safetensors").unlink()
    (tmp_path / "adapter.safetensors").mkdir()  # which no file can replace
    before = {path.name: path.is_file() and path.read_bytes() for path in tmp_path.iterdir()}
    detach(model)
    attach(model, AdapterConfig("depth"), train=["head", "norm1"])
    with pytest.raises(TensLoRAError, match=r"adapter\.safetensors: cannot be written"):
        save_pretrained(model, tmp_path)
    assert {path.name: path.is_file() and path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_disk_that_is_full_leaves_the_older_adapter_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half_copied(_: Path, to: Path) -> None:
        to.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    model = trained()
    save_pretrained(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(shutil, "copyfile", half_copied)
    with pytest.raises(TensLoRAError, match=r"/head\.safetensors: cannot be kept until the new one is there \(No sp"):
        save_pretrained(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    for act in (lambda: save_pretrained(model, ""), lambda: load(build("hf_bert"), "")):
        with pytest.raises(TensLoRAError, match=r"^(folder|source)='': must not be empty"):
            act()


def test_weights_that_are_divided_among_processes_are_saved_whole(tmp_path: Path) -> None:
    model, batch = trained("separate", "head"), inputs("separate")
    expected = logits(model, batch)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        sharded = fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        save_pretrained(sharded, tmp_path)
        for tensor in sharded.tenslora.tensors:
            tensor.reset_parameters()
        start = {name: own.full_tensor() for name, own in sharded.tenslora.named_parameters()}
    finally:
        dist.destroy_process_group()
    fresh = attach(build("separate"), adapter_of(model).config).state_dict()
    assert all(torch.equal(own, fresh[name]) for name, own in start.items())
    again = build("separate")
    load(again, tmp_path).double()
    torch.testing.assert_close(logits(again, batch), expected, rtol=0, atol=1e-6)


def test_weights_that_a_state_dict_puts_in_place_are_those_that_are_saved(tmp_path: Path) -> None:
    # As after a forward pass under fully_shard, which frees the memory of the parameters that a module had until then.
    model = trained("separate", "head")
    expected = logits(model, inputs("separate"))

    def divided(module: nn.Module, *_: Any) -> None:
        hook.remove()
        before = module.get_submodule("head").weight
        module.get_submodule("head").weight = nn.Parameter(before.detach().clone())  # type: ignore[operator]
        before.data.fill_(float("nan"))  # type: ignore[operator]

    hook = model.register_state_dict_pre_hook(divided)  # type: ignore[no-untyped-call]
    load(again := build("separate"), save_pretrained(model, tmp_path))
    torch.testing.assert_close(logits(again.double(), inputs("separate")), expected, rtol=0, atol=1e-6)


def test_what_else_may_be_given_as_a_source_is_told(tmp_path: Path) -> None:
    model = build("hf_bert")
    with pytest.raises(TensLoRAError, match=r"^source=https://hf\.co/a/b: must be a path on disk, or user/name of a"):
        load(model, "https://hf.co/a/b")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(TensLoRAError, match=r": holds an adapter that PEFT has saved; PeftModel\.from_pretrained"):
        load(model, tmp_path)


@dataclasses.dataclass(frozen=True)
class OwnConfig(AdapterConfig):
    note: str = "mine"


@dataclasses.dataclass(frozen=True)
class OwnStrategy(RankStrategy):
    note: str = "mine"


@dataclasses.dataclass(frozen=True)
class UncheckedConfig(AdapterConfig):
    def __post_init__(self) -> None:
        pass


@pytest.mark.parametrize("setting", ["dropout", "alpha", "seed", "init", "rank_strategy"])
def test_settings_that_a_class_of_ones_own_has_not_checked_are_checked(setting: str) -> None:
    with pytest.raises(TensLoRAError, match=rf"^{setting}="):
        attach(PlainTransformer(), UncheckedConfig("qkv", **{setting: "big"}))  # type: ignore[arg-type]


def test_the_fields_of_a_class_of_ones_own_are_not_saved(tmp_path: Path) -> None:
    model = PlainTransformer()
    attach(model, OwnConfig("qkv", rank_strategy=OwnStrategy("isorank")))
    loaded = load(PlainTransformer(), save_pretrained(model, tmp_path))
    assert loaded.config == AdapterConfig("qkv", rank_strategy=RankStrategy("isorank"))


def test_a_path_from_the_home_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    attach(model := PlainTransformer(), AdapterConfig("qkv"))
    with pytest.raises(TensLoRAError, match=r"^folder=~/saved: must not begin with ~, which only a shell replaces by"):
        save_pretrained(model, "~/saved")
    with pytest.raises(TensLoRAError, match=r"^source=~/saved: must not begin with ~"):
        load(PlainTransformer(), Path("~/saved"))
    assert not list(tmp_path.iterdir())


def test_a_heads_buffers_and_tied_weights_are_kept(tmp_path: Path) -> None:
    model, other = TwoHeads(), TwoHeads()
    attach(model, AdapterConfig("qkv"), train=["norm", "out", "again"])
    model.norm(torch.randn(8, 24))
    save_pretrained(model, tmp_path)
    load(other, tmp_path)
    assert other.norm.state_dict().keys() == model.norm.state_dict().keys()
    assert all(torch.equal(tensor, model.norm.state_dict()[name]) for name, tensor in other.norm.state_dict().items())
    assert torch.equal(other.again.weight, model.out.weight)
    assert other.again.weight is other.out.weight


def with_batch_norms() -> nn.Module:
    """A frozen batch norm before the head, and in the head one without weights of its own."""
    torch.manual_seed(0)
    model = PlainTransformer()
    model.head = nn.Sequential(nn.BatchNorm1d(24), nn.BatchNorm1d(24, affine=False), nn.Linear(24, 2))  # type: ignore[assignment]
    return model


def test_running_statistics_that_training_has_moved_are_kept(tmp_path: Path) -> None:
    model, other, x = with_batch_norms(), with_batch_norms(), torch.randn(8, 5, 24)
    attach(model, AdapterConfig("qkv"), train=["head.2"])
    before = model.eval()(x)
    model.train()(3 * x + 2)
    after = model.eval()(x)
    assert not torch.allclose(before, after, atol=0.01)
    load(other, save_pretrained(model, tmp_path))
    assert torch.equal(other.eval()(x), after)
    assert trainable(other) == trainable(model)
    saved = load_file(tmp_path / "head.safetensors")
    save_file({**saved, "head.0.num_batches_tracked": torch.tensor(-1)}, tmp_path / "head.safetensors")
    with pytest.raises(TensLoRAError, match=r"head\.0\.num_batches_tracked holds a negative number$"):
        load(with_batch_norms(), tmp_path)


@pytest.mark.parametrize("again", [False, True])
def test_a_head_whose_gradients_are_switched_off_is_saved(again: bool, tmp_path: Path) -> None:
    model, batch = trained(), inputs("hf_bert")
    if again:  # what load has found is kept too
        save_pretrained(model, tmp_path / "earlier")
        model = build("hf_bert")
        load(model, tmp_path / "earlier")
        model.double()
    model = copy.deepcopy(model).requires_grad_(False)  # as a moving average is, or a model for evaluation
    save_pretrained(model, tmp_path)
    other = build("hf_bert")
    load(other, tmp_path)
    other.double()
    torch.testing.assert_close(logits(other, batch), logits(model, batch), rtol=0, atol=1e-6)
    assert {name for name, each in other.named_parameters() if each.requires_grad and "tenslora" not in name} == {
        "classifier.weight",
        "classifier.bias",
    }


def test_a_frozen_head_in_the_place_of_a_trained_one_is_not_left_out(tmp_path: Path) -> None:
    model = trained()
    model.classifier = nn.Sequential(nn.Linear(24, 3), nn.ReLU())
    save_pretrained(model, tmp_path / "trainable")
    assert load_file(tmp_path / "trainable" / "head.safetensors").keys() == {"classifier.0.weight", "classifier.0.bias"}
    model.requires_grad_(False)
    in_its_place = r"classifier\.0\.weight, classifier\.0\.bias in its place"
    with pytest.raises(TensLoRAError, match=rf"^classifier\.bias: was trained beside the adapter, and {in_its_place}"):
        save_pretrained(model, tmp_path / "frozen")
    model.classifier = nn.BatchNorm1d(24, affine=False)  # its statistics are saved
    with pytest.warns(
        UserWarning, match=r"^classifier\.bias, classifier\.weight: trained beside the adapter, and not "
    ):
        save_pretrained(model, tmp_path / "without")


@pytest.mark.parametrize("path", ["head", "0.head"])
def test_a_trained_head_that_was_taken_off_is_told(path: str, tmp_path: Path) -> None:
    def built() -> nn.Module:
        model = PlainTransformer() if path == "head" else nn.Sequential(PlainTransformer())
        attach(model, AdapterConfig("qkv"), train=["head"])
        return model

    model = built()
    holder, head = model.get_submodule(path.removesuffix("head").rstrip(".")), model.get_submodule(path)
    told = rf"{path}\.bias, {path}\.weight: trained beside the adapter, and not saved"
    for without in (nn.Identity(), nn.ReLU(), None):
        holder.register_module("head", without)
        with pytest.warns(UserWarning, match=f"^{told}"):
            save_pretrained(model, tmp_path)
    del holder.head
    with pytest.warns(UserWarning, match=f"^{told}"):
        save_pretrained(model, tmp_path)
    assert not (tmp_path / "head.safetensors").exists()
    holder.renamed = head
    with warnings.catch_warnings(action="error"):
        save_pretrained(model, tmp_path)
    assert len(load_file(tmp_path / "head.safetensors")) == 2
    model = built()
    model.get_submodule(path).register_parameter("bias", None)
    with pytest.warns(UserWarning, match=rf"^{path}\.bias: trained beside the adapter, and not saved"):
        save_pretrained(model, tmp_path)


def test_updates_of_other_weights_are_trained_and_loaded_beside_the_adapter(tmp_path: Path) -> None:
    def fresh() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv1d(24, 24, 1), nn.Flatten(2), PlainTransformer(width=24)).eval()

    model, x = fresh(), torch.randn(2, 24, 24, generator=torch.Generator().manual_seed(1))
    frozen = adapt_tensor(cast(PlainTransformer, model[2]).head, "weight", 2).requires_grad_(False)
    update = adapt_tensor(model[0], "weight", 2)
    attach(model, AdapterConfig("qkv_depth"))
    assert all(own.requires_grad for own in update.parameters())
    assert not any(own.requires_grad for own in frozen.parameters())
    scramble(model)
    save_pretrained(model, tmp_path)
    tensors = save_tensors(model, tmp_path / "tensors.safetensors")
    other = fresh()
    with pytest.raises(
        TensLoRAError, match=r"has no weight 0\.parametrizations.*; put the parametrization on first, as load_t"
    ):
        load(other, tmp_path)
    load_tensors(other, tensors)
    load(other, tmp_path)
    torch.testing.assert_close(other(x), model(x), rtol=0, atol=1e-6)


def test_the_update_of_a_weight_that_is_the_models_own_is_missed_by_name(tmp_path: Path) -> None:
    model = PlainTransformer(width=24)
    model.positions = nn.Parameter(torch.ones(5, 24))
    other = copy.deepcopy(model)
    attach(model, AdapterConfig("qkv_depth"))
    adapt_tensor(model, "positions", 2)
    save_pretrained(model, tmp_path)
    with pytest.raises(TensLoRAError, match=r"has no weight parametrizations.*; put the parametrization on first"):
        load(other, tmp_path)


def test_a_tied_weight_is_loaded_in_both_places_of_a_model_that_does_not_tie_it(tmp_path: Path) -> None:
    model, other = TwoHeads(), TwoHeads()
    attach(model, AdapterConfig("qkv"), train=["again"])
    scramble(model)
    other.again.weight = nn.Parameter(torch.zeros(2, 24))
    load(other, save_pretrained(model, tmp_path))
    assert torch.equal(other.out.weight, model.out.weight) and torch.equal(other.again.weight, model.again.weight)
    load(again := TwoHeads(), tmp_path)
    assert again.out.weight is again.again.weight and torch.equal(again.out.weight, model.out.weight)
    save_file({"out.weight": torch.zeros(2, 24)}, tmp_path / "head.safetensors", {"tenslora": '{"tied": [1]}'})
    with pytest.raises(
        TensLoRAError, match=r"head\.safetensors: not a readable safetensors file \(tied must be an obj"
    ):
        load(TwoHeads(), tmp_path)


class WithState(nn.Linear):
    def get_extra_state(self) -> dict[str, float]:
        return {"temperature": 4.0}

    def set_extra_state(self, state: Any) -> None:
        pass


@pytest.mark.parametrize("trained", [True, False])
def test_a_trained_modules_extra_state_that_is_not_saved_is_told(trained: bool, tmp_path: Path) -> None:
    model = PlainTransformer()
    model.head = WithState(24, 2)
    attach(model, AdapterConfig("qkv"), train=["head"] if trained else [])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        save_pretrained(model, tmp_path)
    assert [str(each.message)[:38] for each in told] == ["head: what its get_extra_state returns"] * trained


def test_two_values_for_one_tied_weight_are_refused(tmp_path: Path) -> None:
    model = TwoHeads()
    model.again.weight = nn.Parameter(torch.zeros(2, 24))
    attach(model, AdapterConfig("qkv"), train=["out", "again"])
    save_pretrained(model, tmp_path)
    problem = r"(again|out)\.weight and (again|out)\.weight have different values, and are one weight in TwoHeads$"
    with pytest.raises(TensLoRAError, match=problem):
        load(TwoHeads(), tmp_path)
    with torch.no_grad():
        model.again.weight.copy_(model.out.weight)
    load(other := TwoHeads(), save_pretrained(model, tmp_path))
    assert torch.equal(other.out.weight, model.out.weight)


def test_a_name_stands_for_every_module_that_ends_with_it() -> None:
    model = build("hf_bert")
    attach(model, AdapterConfig("qkv"), train=["LayerNorm", "encoder.layer.1.output.dense"])
    parts = {name.rpartition(".")[0] for name in trainable(model) if not name.startswith("tenslora.")}
    assert "bert.encoder.layer.1.output.dense" in parts and "bert.encoder.layer.0.output.dense" not in parts
    norms = {path for path, module in model.named_modules() if isinstance(module, nn.LayerNorm)}
    assert parts - {"bert.encoder.layer.1.output.dense"} == norms


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (["clasifier"], r"^train=clasifier: must be the name of a module .* in \w+, such as classifier, bert"),
        (["dropout"], r"^train=dropout: must be the name of a module with parameters"),
        (["classifier.weight"], r"^train=classifier.weight: .* parameter.*get_parameter\('classifier.weight'\)\.req"),
        (["ssifier"], r"^train=ssifier: must be"),
        ([""], r"^train=: must be"),
        ("classifier", r"^train=classifier: must be a list of names, such as \['classifier'\]$"),
    ],
)  # fmt: skip
def test_a_module_that_is_not_there_is_one_line_and_changes_nothing(train: Any, message: str) -> None:
    model = build("hf_bert")
    with pytest.raises(TensLoRAError, match=message):
        attach(model, AdapterConfig("qkv"), train=train)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not hasattr(model, "tenslora")


def test_another_model_is_told_by_the_adapter_and_not_by_the_head(tmp_path: Path) -> None:
    save_pretrained(trained("hf_bert"), tmp_path)
    other = PlainTransformer(layers=3)
    with pytest.raises(TensLoRAError, match=r"^the adapter does not fit PlainTransformer: layers is 2 in the adapter"):
        load(other, tmp_path)
    assert all(parameter.requires_grad for parameter in other.parameters())


def test_a_head_that_does_not_fit_is_one_line_and_changes_nothing(tmp_path: Path) -> None:
    model = PlainTransformer(classes=3)
    attach(model, AdapterConfig("qkv"), train=["head"])
    save_pretrained(model, tmp_path)
    other = PlainTransformer(classes=2)
    message = r"head\.bias has the shape \(3,\), and in PlainTransformer \(2,\); build the model with as many"
    with pytest.raises(TensLoRAError, match=message):
        load(other, tmp_path)
    del other.head
    with pytest.raises(TensLoRAError, match=r"has no weight head\.bias; load\(model, .* loads the adapter alone$"):
        load(other, tmp_path)
    assert not hasattr(other, "tenslora")


def test_what_holds_no_adapter_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(TensLoRAError, match=r"must hold adapter\.safetensors, which save_pretrained writes$"):
        load(PlainTransformer(), tmp_path)
    saved = tmp_path / "step-5/adapter.safetensors"
    saved.parent.mkdir()
    saved.touch()
    with pytest.raises(TensLoRAError, match=rf"writes; there is {saved}$"):
        load(PlainTransformer(), tmp_path)
    shutil.rmtree(saved.parent)
    for name in (str(tmp_path / "missing"), "missing.safetensors", "a/missing.safetensors", "missing"):
        with pytest.raises(TensLoRAError, match=r"no such file or folder, and not the name of a repository on the hub"):
            load(PlainTransformer(), name)
    link = tmp_path / "adapter.safetensors"
    link.symlink_to("/gone/file")
    for source in (link, tmp_path):
        with pytest.raises(TensLoRAError, match=rf"^{link}: is a link to /gone/file, which does not exist$"):
            load(PlainTransformer(), source)
    link.unlink()
    with pytest.raises(TensLoRAError, match="has no adapter"):
        save_pretrained(PlainTransformer(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_adapter_goes_to_the_hub_and_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "models" / "someone" / "digits"

    def create_repo(repo_id: str, private: bool, exist_ok: bool) -> None:
        assert (repo_id, private, exist_ok) == ("someone/digits", True, True)
        repository.mkdir(parents=True)
        (repository / ".repository").touch()

    def upload_folder(repo_id: str, folder_path: str, commit_message: str, delete_patterns: str) -> SimpleNamespace:
        assert (repo_id, delete_patterns) == ("someone/digits", "head.safetensors")
        shutil.copytree(folder_path, repository, dirs_exist_ok=True)
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/{commit_message.split()[0]}")

    def file_exists(repo_id: str, name: str) -> bool:
        return (tmp_path / "models" / repo_id / name).exists()

    monkeypatch.setattr(huggingface_hub, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub, "file_exists", file_exists)
    monkeypatch.setattr(huggingface_hub, "upload_folder", upload_folder)
    model, other = trained(), build("hf_bert")
    vars(model)["name_or_path"] = "google-bert/bert-base-uncased"  # as from_pretrained sets it
    assert push_to_hub(model, "someone/digits", private=True) == "https://hub/someone/digits/commit/Upload"
    _, metadata, card = (repository / "README.md").read_text().split("---\n", maxsplit=2)
    assert yaml.safe_load(metadata) == {
        "base_model": "google-bert/bert-base-uncased",
        "library_name": "tenslora",
        "tags": ["tenslora"],
    }
    assert all(word in card for word in ("# digits", "qkv_depth", 'load(model, "someone/digits")'))
    (repository / "README.md").write_text("written by its owner")
    monkeypatch.setattr(huggingface_hub, "create_repo", lambda *_, **__: None)
    push_to_hub(model, "someone/digits")
    assert (repository / "README.md").read_text() == "written by its owner"

    with serving(tmp_path) as server:
        (repository / "large.bin").write_text("not wanted")
        # The client reads these settings from the environment when it is imported.
        settings = {"endpoint": server.endpoint, "cache_dir": tmp_path / "cache", "token": False}
        download = partial(huggingface_hub.snapshot_download, **settings)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        load(other, "someone/digits").double()
        fetched = [request for request in server.requests if "resolve" in request and request.startswith("GET")]
        with pytest.raises(TensLoRAError) as missing:
            load(build("hf_bert"), "someone/else")
    assert torch.equal(logits(other, inputs("hf_bert")), logits(model, inputs("hf_bert")))
    assert sorted(request.rpartition("/")[2] for request in fetched) == ["adapter.safetensors", "head.safetensors"]
    assert str(missing.value).startswith("someone/else: no such folder, and not found on the hub (")
    assert "\n" not in str(missing.value)


def test_what_the_hub_refuses_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def create_repo(*_: Any, **__: Any) -> None:
        raise OSError("401 Client Error: Unauthorized\nInvalid credentials")

    model = trained()
    with pytest.raises(TensLoRAError, match="repo_id=digits: must be the name of a repository, user/name"):
        push_to_hub(model, "digits")
    monkeypatch.setattr("huggingface_hub.create_repo", create_repo)
    with pytest.raises(TensLoRAError, match=r"^repo_id=a/b: the hub refuses \(401 Client Error: Unauthorized\)$"):
        push_to_hub(model, "a/b")
    monkeypatch.setattr("huggingface_hub.create_repo", lambda *_, **__: json.loads("<html>"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: b"\xff".decode())
    with pytest.raises(TensLoRAError, match=r"not found on the hub \(the hub's cache holds a damaged file; delete"):
        load(build("hf_bert"), "a/b")
    with pytest.raises(TensLoRAError, match=r"the hub refuses \(what answers under the hub's address is not the hub"):
        push_to_hub(model, "a/b")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for wanted in (lambda: push_to_hub(model, "a/b"), lambda: load(detached(model), "a/b")):
        with pytest.raises(TensLoRAError, match=r"^a/b: the hub needs another package, pip install huggingface_hub$"):
            wanted()


def detached(model: nn.Module) -> nn.Module:
    detach(model)
    return model


@pytest.mark.parametrize(
    ("weight", "problem"),
    [
        (torch.full((2, 24), float("nan")), "classifier.weight holds a NaN or an infinity"),
        (torch.full((2, 24), 1e300, dtype=torch.float64), "classifier.weight holds a NaN or an infinity"),
        (torch.zeros(2, 24, dtype=torch.int64), "classifier.weight has the type int64; must be one of float32"),
        (torch.zeros(2, 24, dtype=torch.complex64), "classifier.weight has the type complex64"),
        (
            torch.zeros(3, 24),
            r"classifier.weight has the shape \(3, 24\), and in BertForSequenceClassification \(2, 24\)",
        ),
    ],
)
def test_a_damaged_head_is_refused_and_leaves_the_model_as_it_was(weight: Tensor, problem: str, tmp_path: Path) -> None:
    save_pretrained(trained(), tmp_path)
    save_file({"classifier.weight": weight}, tmp_path / "head.safetensors")
    model = build("hf_bert")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(TensLoRAError, match=rf"head\.safetensors: {problem}"):
        load(model, tmp_path)
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


def test_the_counters_of_a_trained_batch_norm_are_loaded_as_integers(tmp_path: Path) -> None:
    def with_norm() -> nn.Module:
        model = build("separate")
        model.add_module("norm", nn.BatchNorm1d(24))
        return model

    model, other = with_norm(), with_norm()
    attach(model, AdapterConfig("depth"), train=["norm"])
    model.get_buffer("norm.num_batches_tracked").fill_(5)
    load(other, save_pretrained(model, tmp_path))
    assert other.get_buffer("norm.num_batches_tracked") == 5
    weights = load_file(tmp_path / "head.safetensors")
    save_file({**weights, "norm.num_batches_tracked": torch.tensor(5.0)}, tmp_path / "head.safetensors")
    with pytest.raises(TensLoRAError, match=r"norm.num_batches_tracked has the type torch.float32"):
        load(with_norm(), tmp_path)


def test_a_head_that_is_too_large_for_the_models_type_is_refused(tmp_path: Path) -> None:
    model = trained()
    with torch.no_grad():
        model.get_parameter("classifier.weight").fill_(1e5)
    save_pretrained(model, tmp_path)
    half = build("hf_bert").half()
    with pytest.raises(TensLoRAError, match=r"classifier\.weight has numbers that are too large for torch\.float16"):
        load(half, tmp_path)
    assert not hasattr(half, "tenslora")


def test_a_head_that_cannot_be_read_is_not_left_out(tmp_path: Path) -> None:
    head = save_pretrained(trained(), tmp_path) / "head.safetensors"
    head.unlink()
    head.symlink_to("nowhere")
    with pytest.raises(TensLoRAError, match=r"head\.safetensors: is a link to nowhere, which does not exist$"):
        load(build("hf_bert"), tmp_path)
    model = build("hf_bert")
    attach(model, AdapterConfig("qkv"))
    save_pretrained(model, tmp_path)
    assert not head.is_symlink()
    head.mkdir()
    with pytest.raises(TensLoRAError, match=r"head\.safetensors: cannot be removed"):
        save_pretrained(model, tmp_path)


def test_an_adapter_that_has_lost_its_head_is_not_loaded_without_it(tmp_path: Path) -> None:
    model = trained()
    (save_pretrained(model, tmp_path) / "head.safetensors").unlink()
    other = build("hf_bert")
    weights = r"it was saved beside the adapter with classifier\.bias, classifier\.weight; load\(model, '.*"
    with pytest.raises(TensLoRAError, match=rf"head\.safetensors: is missing; {weights}adapter\.safetensors'\)"):
        load(other, tmp_path)
    assert not hasattr(other, "tenslora")
    loaded = load(other, tmp_path / "adapter.safetensors")
    assert all(map(torch.equal, loaded.parameters(), cast(nn.Module, model.tenslora).float().parameters()))


def test_a_head_that_was_saved_with_another_adapter_is_not_loaded(tmp_path: Path) -> None:
    model, other = trained(), build("hf_bert")
    save_pretrained(model, tmp_path / "earlier")
    with torch.no_grad():
        model.get_parameter("classifier.bias").add_(1)
    save_pretrained(model, tmp_path / "later")
    # As while the folder is written, or after it was killed between the two.
    shutil.copy(tmp_path / "later" / "head.safetensors", tmp_path / "earlier")
    with pytest.raises(TensLoRAError, match=r"head\.safetensors: is not the one that was saved with adapter"):
        load(other, tmp_path / "earlier")
    assert not hasattr(other, "tenslora")


def test_a_head_of_another_librarys_parameters_is_loaded(tmp_path: Path) -> None:
    class Manifold(nn.Parameter):
        pass

    model, other = trained(), build("hf_bert")
    save_pretrained(model, tmp_path)
    head: Any = other.get_submodule("classifier")
    head.weight = Manifold(head.weight.detach())
    load(other, tmp_path)
    assert torch.equal(other.get_parameter("classifier.weight"), model.get_parameter("classifier.weight"))
    assert type(head.weight) is Manifold


def test_a_head_that_is_replaced_while_it_is_read_is_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As where rsync brings a later adapter, and then its head.
    model, other = trained(), build("hf_bert")
    earlier = save_pretrained(model, tmp_path / "earlier")
    with torch.no_grad():
        model.get_parameter("classifier.bias").add_(1)
    later = save_pretrained(model, tmp_path / "later")
    shutil.copy(later / "adapter.safetensors", earlier)
    places = pretrained._places

    def after_the_head_was_read(model: nn.Module) -> dict[str, Tensor]:
        shutil.copy(later / "head.safetensors", earlier)
        return places(model)

    monkeypatch.setattr(pretrained, "_places", after_the_head_was_read)
    with pytest.raises(TensLoRAError, match=r"head\.safetensors: is not the one that was saved with adapter"):
        load(other, earlier)
    assert load(other, earlier)


@pytest.mark.parametrize("name", ["classifier.bias", "tenslora.tensors.0.core"])
def test_what_load_would_refuse_is_not_saved(name: str, tmp_path: Path) -> None:
    model = trained()
    before = {path.name: path.read_bytes() for path in save_pretrained(model, tmp_path).iterdir()}
    model.get_parameter(name).data.view(-1)[0] = math.nan
    reason = rf"cannot be written: {name.removeprefix('tenslora.')} holds a NaN or an infinity"
    with pytest.raises(TensLoRAError, match=reason):
        save_pretrained(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_model_on_the_device_meta_is_not_loaded_into(tmp_path: Path) -> None:
    save_pretrained(trained(), tmp_path)
    for where in ("classifier", ""):
        model = build("hf_bert")
        model.get_submodule(where).to("meta")
        with pytest.raises(TensLoRAError, match=r"on the device meta.*numbers would be lost"):
            load(model, tmp_path)
        assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(TensLoRAError, match=r"^BertForSequenceClassification: is on the device meta"):
        load(model, tmp_path / "adapter.safetensors")


def test_a_trained_weight_that_holds_the_update_is_not_saved(tmp_path: Path) -> None:
    model, other = trained(head="query"), build("hf_bert")
    expected = logits(model, inputs("hf_bert"))
    merge(model)
    with pytest.raises(
        TensLoRAError, match=r"query: its weight is trained and has the adapter's update in it; unmerge"
    ):
        save_pretrained(model, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    unmerge(model)
    load(other, save_pretrained(model, tmp_path)).double()
    torch.testing.assert_close(logits(other, inputs("hf_bert")), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "ranks"),
    [
        ({"alpha": np.float32(0.5), "seed": np.int64(3)}, RankStrategy("isorank", rank=cast(int, np.int64(2)))),
        ({"alpha": Fraction(1, 2), "dropout": np.float32(0)}, RankStrategy(scale=cast(float, np.float32(1)))),
        ({}, RankStrategy("explicit", ranks=tuple(np.array([2, 3, 3, 2])))),
    ],
)
def test_settings_in_numbers_of_other_libraries_are_saved(
    settings: dict[str, Any], ranks: RankStrategy, tmp_path: Path
) -> None:
    model, other = PlainTransformer(), PlainTransformer()
    other.load_state_dict(model.state_dict())
    attach(model, AdapterConfig("qkv_depth", ranks, **settings), train=["head"])
    scramble(model)
    load(other, save_pretrained(model, tmp_path))
    x = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(1))
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["qkv_depth", "lora"])
def test_an_adapter_is_in_float32_where_the_default_type_has_16_bits(
    mode: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model, others = PlainTransformer(), [PlainTransformer(), PlainTransformer()]
    expected = copy.deepcopy(attach(model, AdapterConfig(mode)).state_dict())
    scramble(model)
    saved = model.get_submodule("tenslora").state_dict()
    save_pretrained(model, tmp_path)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        fresh, loaded = attach(others[0], AdapterConfig(mode)), load(others[1], tmp_path)
    finally:
        torch.set_default_dtype(before)
    for adapter, values in ((fresh, expected), (loaded, saved)):
        for name, tensor in adapter.state_dict().items():
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, values[name])


def test_a_default_device_without_numbers_does_not_matter_to_a_model_that_has_them(tmp_path: Path) -> None:
    save_pretrained(trained(), tmp_path)
    one, other = build("hf_bert"), build("hf_bert")
    with torch.device("meta"):
        attach(one, AdapterConfig("qkv_depth"))
        load(other, tmp_path)
    assert not any(parameter.is_meta for model in (one, other) for parameter in model.parameters())


def test_a_compiled_model_is_saved_under_the_models_own_names(tmp_path: Path) -> None:
    model, other = trained(), build("hf_bert")
    save_pretrained(torch.compile(model, backend="eager"), tmp_path)  # type: ignore[arg-type]
    load(other, tmp_path).double()
    assert torch.equal(logits(other, inputs("hf_bert")), logits(model, inputs("hf_bert")))


@pytest.mark.parametrize("compiled", ["head", "blocks.1", "regions"])
def test_parts_that_are_compiled_are_saved_under_their_own_names(compiled: str, tmp_path: Path) -> None:
    model = PlainTransformer()
    attach(model, AdapterConfig("qkv_depth"), train=["head"])
    scramble(model)
    x = torch.randn(2, 5, 24)
    expected, used = model(x), model
    if compiled == "regions":
        used = compile_regions(model, backend="eager")
    else:
        model.set_submodule(compiled, torch.compile(model.get_submodule(compiled), backend="eager"))  # type: ignore[arg-type]
    torch.testing.assert_close(used(x), expected)
    save_pretrained(used, tmp_path)
    other, of_parts = PlainTransformer(), PlainTransformer()
    of_parts.head = torch.compile(of_parts.head, backend="eager")  # type: ignore[assignment]
    for each in (other, of_parts):
        load(each, tmp_path)
        assert torch.equal(each.head.weight, model.head.weight)
    merge(used)
    torch.testing.assert_close(used(x), expected)
    detach(used)
    assert not hasattr(used, "tenslora") and not hasattr(model, "tenslora")


@pytest.mark.parametrize("part", ["head", "blocks.1"])
@pytest.mark.parametrize("before", [True, False])
def test_parts_that_are_checkpointed_are_saved_under_their_own_names(part: str, before: bool, tmp_path: Path) -> None:
    def wrap(model: PlainTransformer) -> PlainTransformer:
        model.set_submodule(part, checkpoint_wrapper(model.get_submodule(part)))
        return model

    def build_model() -> PlainTransformer:
        torch.manual_seed(0)
        model = PlainTransformer()
        model.head = nn.Sequential(nn.BatchNorm1d(24), nn.Linear(24, 2))  # type: ignore[assignment]
        return model

    model, x = build_model(), torch.randn(4, 5, 24, generator=torch.Generator().manual_seed(0))
    if before:
        wrap(model)
    attach(model, AdapterConfig("qkv_depth"), train=["head", "norm1"])
    if not before:
        wrap(model)
    scramble(model)
    model.train()(x)  # which moves the statistics of the norm
    expected = model.eval()(x)
    save_pretrained(model, tmp_path)
    assert not any("_checkpoint" in name for name in load_file(tmp_path / "head.safetensors"))
    for other in (build_model(), wrap(build_model())):
        load(other, tmp_path)
        torch.testing.assert_close(other.eval()(x), expected)
    adapter = detach(model)
    with pytest.warns(UserWarning, match=r"trained beside this adapter before, and frozen"):
        attach(build_model(), adapter)


def _with_spectral_norm(model: PlainTransformer) -> None:
    parametrizations.spectral_norm(model.head)


def _with_orthogonal_weight(model: PlainTransformer) -> None:
    parametrizations.orthogonal(model.head)


def _with_a_centre(model: PlainTransformer) -> None:
    centre = nn.Module()
    centre.register_buffer("centre", torch.randn(24))
    centre.forward = lambda x: x - centre.centre
    model.head = nn.Sequential(centre, nn.Linear(24, 2))  # type: ignore[assignment]


@pytest.mark.parametrize("change", [_with_spectral_norm, _with_orthogonal_weight, _with_a_centre])
def test_what_a_head_keeps_in_modules_without_parameters_is_saved(
    change: Callable[[PlainTransformer], None], tmp_path: Path
) -> None:
    model, other, x = PlainTransformer(), PlainTransformer(), torch.randn(2, 5, 24)
    for each in (model, other):
        change(each)
    backbone = {name: each for name, each in model.state_dict().items() if not name.startswith("head")}
    other.load_state_dict(backbone, strict=False)
    attach(model, AdapterConfig("qkv"), train=["head"])
    load(other, save_pretrained(model.eval(), tmp_path))
    torch.testing.assert_close(other.eval()(x), model(x), rtol=0, atol=1e-6)


def test_threads_may_save_into_one_folder(tmp_path: Path) -> None:
    model = PlainTransformer()
    attach(model, AdapterConfig("qkv"), train=["head"])
    save_pretrained(model, tmp_path)
    with ThreadPoolExecutor(4) as threads:
        for saved in [threads.submit(save_pretrained, model, tmp_path) for _ in range(40)]:
            saved.result()
    assert {file.name for file in tmp_path.iterdir()} == {"adapter.safetensors", "head.safetensors"}


def test_a_signal_handler_may_save_while_a_save_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, fsync, moments = PlainTransformer(), os.fsync, []
    attach(model, AdapterConfig("qkv"), train=["head"])
    save_pretrained(model, tmp_path)
    saved = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def interrupted(file: int) -> None:
        fsync(file)
        moments.append(file)
        monkeypatch.setattr(os, "fsync", fsync)
        save_pretrained(model, tmp_path)
        monkeypatch.setattr(os, "fsync", interrupted)

    monkeypatch.setattr(os, "fsync", interrupted)
    save_pretrained(model, tmp_path)
    assert len(moments) == 2  # once in the midst of each file
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == saved


def test_trained_weights_that_share_memory_are_saved(tmp_path: Path) -> None:
    def tied() -> PlainTransformer:
        model = PlainTransformer()
        model.add_module("other", nn.Linear(24, 2))
        model.get_parameter("other.weight").data = model.head.weight.data
        return model

    model, other = tied(), tied()
    attach(model, AdapterConfig("depth"), train=["head", "other"])
    scramble(model)
    load(other, save_pretrained(model, tmp_path))
    for name in ("head.weight", "other.weight"):
        assert torch.equal(other.get_parameter(name), model.get_parameter(name))


def test_a_mask_of_infinities_beside_a_trained_weight_is_no_damage(tmp_path: Path) -> None:
    def masked(entry: float = -math.inf) -> PlainTransformer:
        model = PlainTransformer()
        model.head.register_buffer("mask", torch.full((3, 3), entry).triu(1))
        return model

    model, other = masked(), masked()
    attach(model, AdapterConfig("depth"), train=["head"])
    load(other, save_pretrained(model, tmp_path))
    with pytest.raises(TensLoRAError, match=r"head\.mask holds a NaN or an infinity"):
        load(masked(0.0), tmp_path)


def test_a_head_that_cannot_take_the_saved_weights_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = PlainTransformer()
    attach(model, AdapterConfig("depth"), train=["head"])
    save_pretrained(model, tmp_path)
    quantised, expanded, inferred, lazy = (PlainTransformer() for _ in range(4))
    lazy.head = nn.LazyLinear(2)
    quantize_(quantised, Int8WeightOnlyConfig())
    expanded.head.weight = nn.Parameter(torch.ones(2, 1).expand(2, 24))
    with torch.inference_mode():
        inferred.head = nn.Linear(24, 2)
    for other, problem in (
        (quantised, "quantised in the model"),
        (expanded, "entries share memory"),
        (inferred, r"made in torch\.inference_mode"),
        (lazy, r"^head\.weight: has no size before"),
    ):
        with pytest.raises(TensLoRAError, match=problem):
            load(other, tmp_path)
        assert not hasattr(other, "tenslora")
