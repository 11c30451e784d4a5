"""Finished runs, loaded: the model scores what the record says."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import dispatch_model, init_empty_weights
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertConfig, BertModel, BertTokenizerFast

from tenslora import load, save_pretrained
from tenslora.adapter import make_adapter
from tenslora.attachment import adapter_of
from tenslora.errors import TensLoRAError
from tenslora.files import read_safetensors, write_safetensors
from tenslora.harness.backbones import EMBEDDED, load_backbone
from tenslora.harness.data import Dataset, Examples, load_dataset
from tenslora.harness.export import export
from tenslora.harness.load_run import LoadedRun, _renumbered, load_run
from tenslora.harness.run_folder import RunFolder
from tests import records
from tests.harness.conftest import TINY_BERT
from tests.running import SHORT, accuracy_of, configured, record, run


@pytest.mark.parametrize("finished", ["digits_run", "sentences_run"])
def test_a_run_with_an_adapter_scores_what_its_record_says(finished: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(finished)
    loaded = load_run(folder)
    assert adapter_of(loaded.backbone.model).ranks == tuple(loaded.record["ranks"])
    assert accuracy_of(loaded) == record(folder)["metrics"]["history"][-1]["accuracy"]


def test_the_library_reads_the_folder_of_a_run(digits_run: Path) -> None:
    loaded = load_run(digits_run)
    model = load_backbone(loaded.run.model, len(loaded.classes), loaded.run.seed + 1).model
    load(model, digits_run)
    expected = loaded.backbone.model.state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_full_fine_tuning_scores_what_its_record_says(tmp_path: Path) -> None:
    run(tmp_path, *SHORT, "tensor_mode=full", "optimizer.lr=0.001")
    assert accuracy_of(load_run(tmp_path)) == record(tmp_path)["metrics"]["last"]


@pytest.mark.parametrize("mode", ["head_only", "full"])
def test_a_run_that_was_overwritten_leaves_no_weights(mode: str, digits_run: Path, tmp_path: Path) -> None:
    shutil.copytree(digits_run, tmp_path / "run")
    run(tmp_path / "run", *SHORT, f"tensor_mode={mode}", "trainer.epochs=1", "overwrite=true")
    weights = {"head_only": "head.safetensors", "full": "model.safetensors"}[mode]
    left = {file.name for file in (tmp_path / "run").glob("*.safetensors")}
    assert left == {weights, "checkpoint.safetensors", "predictions.safetensors"}


def test_a_run_that_diverges_leaves_nothing_of_an_earlier_one(digits_run: Path, tmp_path: Path) -> None:
    shutil.copytree(digits_run, tmp_path / "run")
    with pytest.raises(TensLoRAError, match="diverged"):
        run(tmp_path / "run", *SHORT, "optimizer.lr=1e9", "trainer.epochs=1", "overwrite=true")
    assert not {"adapter.safetensors", "head.safetensors"}.intersection(map(str, os.listdir(tmp_path / "run")))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"head.bias": None}, "lacks head.bias"),
        ({"head.bias": torch.full((5,), float("inf"))}, "head.bias holds a NaN or an infinity"),
        ({"other": torch.zeros(1)}, "VisionTransformer has no weight other"),
    ],
)
def test_a_damaged_head_is_refused(
    changes: dict[str, torch.Tensor | None], problem: str, digits_run: Path, tmp_path: Path
) -> None:
    shutil.copytree(digits_run, tmp_path / "run")
    head = tmp_path / "run" / "head.safetensors"
    weights = {**load_file(head), **changes}
    save_file({name: tensor for name, tensor in weights.items() if tensor is not None}, head)
    with pytest.raises(TensLoRAError, match=rf"head\.safetensors: {problem}"):
        load_run(tmp_path / "run")


def test_the_adapter_of_another_run_is_refused(digits_run: Path, tmp_path: Path) -> None:
    shutil.copytree(digits_run, tmp_path / "run")
    adapter = adapter_of(load_run(digits_run).backbone.model)
    other = make_adapter(replace(adapter.config, alpha=1.0), [stage.geometry for stage in adapter.stages])
    other.save(tmp_path / "run" / "adapter.safetensors")
    problem = r"adapter\.safetensors: is the adapter of another run \(alpha=1\.0, and here 4\.0\)$"
    with pytest.raises(TensLoRAError, match=problem):
        load_run(tmp_path / "run")


def test_the_backbone_may_have_moved(digits_run: Path, tmp_path: Path) -> None:
    shutil.copy(EMBEDDED, tmp_path / "moved.safetensors")
    loaded = load_run(digits_run, tmp_path / "moved.safetensors")
    assert accuracy_of(loaded) == record(digits_run)["metrics"]["last"]


def test_a_checkpoint_that_is_no_path_is_one_line(digits_run: Path) -> None:
    with pytest.raises(TensLoRAError, match=r"^checkpoint=a\\x00: must be a path, which has no character NUL$"):
        load_run(digits_run, "a\0")
    with pytest.raises(TensLoRAError, match=r"^checkpoint='\\ud800': must be a path, which has no such character"):
        load_run(digits_run, checkpoint="\ud800")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"device": 0}, "device: must be of type str or device or None, and is of type int$"),
        ({"device": False}, "device: must be of type str or device or None, and is of type bool$"),
        ({"device": ""}, "--device=: must be auto, cpu, cuda or cuda:<index>$"),
        ({"shared": "yes"}, "shared: must be of type bool, and is of type str$"),
    ],
)
def test_another_device_than_was_meant_is_not_taken(asked: dict[str, Any], message: str, digits_run: Path) -> None:
    loaded = load_run(digits_run)
    image = np.zeros((8, 8), np.uint8)
    assert loaded.predict([image], device=torch.device("cpu")) == loaded.predict([image])  # type: ignore[arg-type]
    for ask in (loaded.evaluate, lambda **given: loaded.predict([image], **given)):
        with pytest.raises(TensLoRAError, match=f"^{message}"):
            ask(**asked)


def test_a_run_is_not_loaded_onto_its_own_export(digits_run: Path, tmp_path: Path) -> None:
    shutil.copytree(digits_run, tmp_path / "run")
    export(tmp_path / "run", "merged", tmp_path / "run" / "merged")
    with pytest.raises(TensLoRAError, match=r"^--checkpoint .*merged: must be the weights that the run started from; "):
        load_run(tmp_path / "run", tmp_path / "run" / "merged")


def test_a_run_is_loaded_whatever_precision_is_set_around_it(digits_run: Path) -> None:
    before = torch.get_float32_matmul_precision()
    expected = load_run(digits_run).backbone.model.state_dict()
    try:
        torch.set_float32_matmul_precision("medium")
        torch.set_default_dtype(torch.bfloat16)
        weights = load_run(digits_run).backbone.model.state_dict()
        assert torch.get_default_dtype() == torch.bfloat16
        torch.set_default_dtype(torch.float32)
        assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            load_run(digits_run)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_float32_matmul_precision(before)


def test_the_library_saves_a_loaded_run_with_its_head(digits_run: Path, tmp_path: Path) -> None:
    loaded = load_run(digits_run)
    save_pretrained(loaded.backbone.model, tmp_path)
    fresh = load_backbone(loaded.run.model, len(loaded.classes), 1).model.eval()
    load(fresh, tmp_path)
    images = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(fresh(images), loaded.backbone.model.eval()(images))


def test_what_a_loaded_run_cannot_take_is_one_line(digits_run: Path) -> None:
    loaded, image = load_run(digits_run), np.zeros((8, 8), dtype=np.uint8)
    with pytest.raises(TensLoRAError, match=r"^batch_size: must be of type int or None, and is "):
        loaded.predict([image], batch_size=4.0)  # type: ignore[arg-type]
    with pytest.raises(TensLoRAError, match=r"^dataset: must be of type ImageDatasetConfig or TextDatasetConfig or N"):
        loaded.evaluate({"root": "other"})  # type: ignore[arg-type]
    loaded.backbone.model.half()
    with pytest.raises(TensLoRAError, match=r"^VisionTransformer: has been .* loaded, and .*; load the run again$"):
        loaded.predict([image])


@pytest.mark.parametrize(
    ("part", "value", "problem"),
    [
        ("tokenizer", None, "tokenizer: must be of type PreTrainedTokenizerBase, and is None"),
        ("tokenizer", dict, "tokenizer: must be of type PreTrainedTokenizerBase, and is of type type"),
        ("record", {}, "record: not a readable record"),
        ("record", None, "record: must be of type dict, and is None"),
        ("backbone", nn.Linear(2, 2), "backbone: must be of type Backbone, and is of type Linear"),
        ("files", "runs/digits", "files: must be of type RunFolder, and is of type str"),
    ],
)
def test_a_part_that_is_no_part_of_a_run_is_refused(
    part: str, value: Any, problem: str, sentences_run: Path, digits_run: Path
) -> None:
    loaded = load_run(sentences_run)
    assert replace(loaded, record={**loaded.record}).record == loaded.record
    with pytest.raises(TensLoRAError, match=f"^{problem}"):
        replace(loaded, **{part: value})
    if value is None and part == "tokenizer":
        with pytest.raises(TensLoRAError, match=r"^backbone\.model: must be of type Module, and is of type method$"):
            replace(loaded, backbone=replace(loaded.backbone, model=loaded.backbone.model.forward))  # type: ignore[arg-type]
        with pytest.raises(TensLoRAError, match=r"^backbone: must be one for texts, as in the run$"):
            replace(loaded, backbone=load_run(digits_run).backbone)
        other: Any
        for name, other in (("head", "x"), ("head", ["x"]), ("image_input", "x")):
            with pytest.raises(TensLoRAError, match=rf"^backbone\.{name}: must be of type "):
                replace(loaded, backbone=replace(loaded.backbone, **{name: other}))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"task": None}, r"record: not a readable record \(task=null: "),
        ({"classes": [1, 2]}, r"record: not a readable record \(classes"),
        ({"text_columns": 7}, r"record: not a readable record \(text_columns=7: "),
        ({"train_examples": "9"}, r"record: not a readable record \(train_examples="),
    ],
)
def test_a_record_that_is_changed_in_place_is_checked(
    changes: dict[str, Any], problem: str, sentences_run: Path
) -> None:
    loaded = load_run(sentences_run)
    loaded.record.update(changes)
    for ask in (loaded.evaluate, lambda: loaded.predict(["the cat sat"])):
        with pytest.raises(TensLoRAError, match=f"^{problem}"):
            ask()


def test_parts_of_two_runs_do_not_make_one(digits_run: Path, sentences_run: Path, regression_run: Path) -> None:
    loaded, other = load_run(regression_run), load_run(sentences_run)
    parts: dict[str, Any]
    for parts in ({"record": other.record}, {"backbone": copy.deepcopy(other.backbone)}):
        with pytest.raises(TensLoRAError, match=r"^record: must be that of the run whose model the backbone has; "):
            replace(loaded, **parts)
    with pytest.raises(TensLoRAError, match=rf"^{digits_run}: is the folder of another run; load the run again$"):
        replace(loaded, files=RunFolder(digits_run)).evaluate()
    assert len({loaded, other, loaded}) == 2


def test_a_folder_that_was_trained_anew_is_told(regression_run: Path, tmp_path: Path) -> None:
    folder = RunFolder(shutil.copytree(regression_run, tmp_path / "run"))
    loaded = load_run(folder.path)
    record = json.loads(folder.result.read_text())
    record["sha256"] = dict.fromkeys(record["sha256"], "0" * 64)
    folder.result.write_text(json.dumps(record))
    with pytest.raises(TensLoRAError, match=rf"^{folder.path}: is the folder of another run; load the run again$"):
        loaded.evaluate()


def test_a_tokenizer_that_was_changed_so_that_it_fails_is_told(
    sentences_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_run(sentences_run)
    monkeypatch.setattr(type(loaded.tokenizer), "__call__", None)
    with pytest.raises(TensLoRAError, match=r"^BertFor\w+: cannot compute its outputs \(.* not callable\); "):
        loaded.predict(["the cat sat"])


def test_a_model_that_was_changed_so_that_it_cannot_compute_is_told(digits_run: Path) -> None:
    loaded = load_run(digits_run)
    loaded.backbone.model.set_input_size((16, 16))  # type: ignore[operator]
    for ask in (loaded.evaluate, lambda: loaded.predict([np.zeros((8, 8), np.uint8)])):
        with pytest.raises(TensLoRAError, match=r"^VisionTransformer: cannot compute its outputs \(.* run again$"):
            ask()


def test_a_default_device_of_the_programs_does_not_matter(digits_run: Path) -> None:
    loaded, image = load_run(digits_run), np.ones((8, 8), np.uint8)
    usual = loaded.predict([image])
    with torch.device("meta"):
        assert loaded.predict([image]) == usual
        assert torch.empty(0).is_meta


@pytest.mark.parametrize("kind", [TimeoutError, type("SoftTimeLimitExceeded", (Exception,), {})])
def test_the_exception_of_a_programs_signal_handler_comes_through(kind: type[Exception], digits_run: Path) -> None:
    def end(*_: object) -> None:
        raise kind("after a minute")

    loaded = load_run(digits_run)
    before = signal.signal(signal.SIGALRM, end)
    loaded.backbone.model.register_forward_pre_hook(lambda *_: signal.raise_signal(signal.SIGALRM))
    try:
        with pytest.raises(kind, match=r"^after a minute$"):
            loaded.predict([np.zeros((8, 8), np.uint8)])
    finally:
        signal.signal(signal.SIGALRM, before)


def test_a_run_is_not_loaded_without_numbers(digits_run: Path) -> None:
    with init_empty_weights(), pytest.raises(TensLoRAError, match=r"^a backbone has no numbers on the device meta"):
        load_run(digits_run)


def test_a_current_folder_that_is_gone_is_told(
    digits_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, gone = load_run(digits_run), tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    for ask in (loaded.evaluate, lambda: load_run(digits_run)):
        with pytest.raises(TensLoRAError, match=r"^the current folder is gone; change to another one \(os\.chdir\)$"):
            ask()


@pytest.mark.parametrize(
    ("finished", "outputs", "problem"),
    [
        ("sentences_run", 3, "must have 2 outputs for an example, as in the run, and has 3"),
        ("sentences_run", 1, "must have 2 outputs for an example, as in the run, and has 1"),
        ("regression_run", 2, "must have 1 output for an example, as in the run, and has 2"),
    ],
)
def test_a_model_with_another_number_of_outputs_is_refused(
    finished: str, outputs: int, problem: str, request: pytest.FixtureRequest
) -> None:
    loaded = load_run(request.getfixturevalue(finished))
    loaded.backbone.model.classifier = nn.Linear(24, outputs)
    text = "a cat" if finished == "sentences_run" else ("a cat", "a dog")
    for ask in (loaded.evaluate, lambda: loaded.predict([text])):
        with pytest.raises(TensLoRAError, match=f"^BertForSequenceClassification: {problem}; load the run again$"):
            ask()


def test_a_model_that_is_on_its_device_is_not_moved(digits_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_run(digits_run)
    monkeypatch.setattr(loaded.backbone.model, "to", None)  # torch takes a weight out of its module to move it
    assert len(loaded.predict([np.zeros((8, 8), dtype=np.uint8)])) == 1


@pytest.mark.filterwarnings("ignore:The following device_map keys")  # accelerate wants cls_token and pos_embed there
def test_a_model_whose_weights_accelerate_keeps_elsewhere_stays_there(digits_run: Path, tmp_path: Path) -> None:
    loaded, images = load_run(digits_run), [np.full((8, 8), value, np.uint8) for value in (0, 90, 200)]
    expected, loss = loaded.predict(images), loaded.evaluate().loss
    model = loaded.backbone.model
    blocks = {f"blocks.{number}": "disk" if number == 1 else "cpu" for number in range(4)}
    others = {name: "cpu" for name, _ in (*model.named_children(), *model.named_parameters(recurse=False))}
    del others["blocks"]
    dispatch_model(model, {**others, **blocks}, "cpu", offload_dir=tmp_path / "weights")
    assert any(weight.is_meta for weight in model.parameters())
    assert loaded.predict(images) == expected
    assert loaded.evaluate().loss == loss


def test_a_model_without_numbers_is_refused(digits_run: Path) -> None:
    loaded = load_run(digits_run)
    loaded.backbone.model.head.to("meta")
    problem = r"^VisionTransformer: head\.weight is on the device meta, which has no numbers; load the run again$"
    for ask in (loaded.evaluate, lambda: loaded.predict([np.zeros((8, 8), np.uint8)])):
        with pytest.raises(TensLoRAError, match=problem):
            ask()


def test_a_run_without_an_adapter_is_as_frozen_as_it_was(tmp_path: Path) -> None:
    run(tmp_path, *SHORT, "tensor_mode=head_only", "trainer.epochs=1")
    model = load_run(tmp_path).backbone.model
    assert {name for name, weight in model.named_parameters() if weight.requires_grad} == {"head.weight", "head.bias"}


def test_outputs_that_are_not_finite_are_refused(digits_run: Path, tmp_path: Path) -> None:
    shutil.copytree(digits_run, tmp_path / "run")
    head = tmp_path / "run" / "head.safetensors"
    signs = 1 - 2 * (torch.arange(64) % 2)
    save_file({name: signs.sign() * 3e38 + 0 * w if w.ndim == 2 else w for name, w in load_file(head).items()}, head)
    (tmp_path / "run" / "result.json").write_text(json.dumps({**record(digits_run), "sha256": {}}))
    loaded = load_run(tmp_path / "run")
    with pytest.raises(TensLoRAError, match=r"^the model's outputs are not finite; "):
        loaded.evaluate()
    with pytest.raises(TensLoRAError, match=r"^the model's outputs are not finite; "):
        loaded.predict([np.zeros((32, 32), dtype=np.uint8)])


def test_a_record_with_a_setting_of_a_later_version_is_named(digits_run: Path, tmp_path: Path) -> None:
    config = {**record(digits_run)["config"], "later": {"name": 1}}
    RunFolder(tmp_path).write_record({**record(digits_run), "config": config})
    with pytest.raises(TensLoRAError, match=r"result\.json: not a readable record \(config: later: there is no such"):
        load_run(tmp_path)


def test_it_predicts_what_the_run_predicted(sentences_run: Path) -> None:
    loaded = load_run(str(sentences_run))
    sentences = load_dataset(loaded.run.dataset, loaded.run.seed).test.inputs
    kept = RunFolder(sentences_run).read_predictions()["test"]
    expected = [loaded.classes[number] for number in kept.predicted]
    assert [each.answer for each in loaded.predict(sentences)] == expected
    assert [each.answer for each in loaded.predict([sentence for (sentence,) in sentences], batch_size=7)] == expected
    assert loaded.predict([]) == []
    for each in loaded.predict(["the cat sat 3 times"]):
        assert sum(each.probabilities.values()) == pytest.approx(1)


def test_a_tokenizer_that_was_trained_on_other_data_is_refused(
    sentences_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_more(*given: Any) -> Dataset:
        dataset = load_dataset(*given)
        return replace(dataset, train=Examples([*dataset.train.inputs, ("a",)], [*dataset.train.labels, 0]))

    monkeypatch.setattr("tenslora.harness.load_run.load_dataset", with_more)
    with pytest.raises(TensLoRAError, match=r"run: its tokenizer was trained on its 40 .* has 41 now$"):
        load_run(sentences_run)


def test_data_that_has_changed_is_not_drawn_from_again(tmp_path: Path) -> None:
    rows = [f"the {('cat', 'dog', 'bird')[n % 3]} sat {n} times,{'abb'[n % 3]}" for n in range(40)]
    file = tmp_path / "rows.csv"
    for setting, scored in (("dataset.train_fraction=0.7", "12 test"), ("dataset.validation=0.25", "8 validation")):
        file.write_text("\n".join(["text,label", *rows]))
        folder = tmp_path / scored
        run(folder, "dataset=text", f"dataset.root={file}", setting, *TINY_BERT, "trainer.epochs=1")
        loaded = load_run(folder)
        assert loaded.evaluate().scores["accuracy"] == record(folder)["metrics"]["last"]
        assert len(loaded.evaluate(replace(loaded.run.dataset, validation=None)).predictions["test"].labels) in (8, 12)
        changed = f"dataset=rows: has changed since the run, which had {scored} examples, and there are"
        file.write_text("\n".join(["text,label", *rows, *rows[:5]]))
        with pytest.raises(TensLoRAError, match=f"^{changed}"):
            loaded.evaluate(replace(loaded.run.dataset, metrics=("f1",)))
        file.write_text("\n".join(["text,label", *sorted(rows)]))
        with pytest.raises(TensLoRAError, match=r"^dataset=rows: has changed since the run, which had other labels; "):
            loaded.evaluate(replace(loaded.run.dataset, metrics=("accuracy",)))


def test_a_dataset_with_another_number_of_sentences_is_refused(sentences_run: Path, tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text("premise,hypothesis,label\na,b,unacceptable\nc,d,acceptable\n")
    loaded = load_run(sentences_run)
    other = configured("dataset=text", f"dataset.root={tmp_path}/pairs.csv", "model=minilm").dataset
    problem = r"^dataset=pairs: must have 1 sentence in each example, .* \(sentence\), and not premise, hypothesis$"
    with pytest.raises(TensLoRAError, match=problem):
        loaded.evaluate(other)


@pytest.mark.parametrize("change", ["weights", "config.json", "tokenizer.json"])
def test_another_backbone_in_the_place_of_the_runs_is_refused(change: str, tmp_path: Path) -> None:
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] the quick brown fox was late , and 12 cafes were good ."
    (tmp_path / "vocab.txt").write_text("\n".join(words.split()))
    backbone = tmp_path / "backbone"
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(backbone)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = BertConfig(vocab_size=30, initializer_range=0.3, **sizes)
    BertModel(config).save_pretrained(backbone)
    (tmp_path / "rows.csv").write_text("\n".join(["text,label", *(f"the fox was {n},{n % 2}" for n in range(20))]))
    data = ["dataset=text", f"dataset.root={tmp_path}/rows.csv"]
    run(tmp_path / "run", *data, "model=hf_text", f"model.checkpoint={backbone}", "trainer.epochs=1")
    other = shutil.copytree(backbone, tmp_path / "other")
    assert accuracy_of(load_run(tmp_path / "run", other)) == record(tmp_path / "run")["metrics"]["last"]
    other = shutil.copytree(backbone, tmp_path / change)
    if change == "weights":
        BertModel(config).save_pretrained(other)
    else:
        written = json.loads((other / change).read_text())
        if change == "config.json":
            written["hidden_act"] = "relu"
        else:
            numbers = written["model"]["vocab"]
            numbers["fox"], numbers["was"] = numbers["was"], numbers["fox"]
        (other / change).write_text(json.dumps(written))
    problem = rf"^model\.checkpoint={other}: is not the backbone that the run started from; its weights"
    with pytest.raises(TensLoRAError, match=problem):
        load_run(tmp_path / "run", other)


def test_a_backbone_that_has_changed_in_its_place_is_noticed(digits_run: Path, tmp_path: Path) -> None:
    weights = tmp_path / "weights.safetensors"
    shutil.copy(EMBEDDED, weights)
    load_run(digits_run, weights)
    save_file({name: -tensor for name, tensor in load_file(weights).items()}, weights)
    with pytest.raises(TensLoRAError, match=rf"^model\.checkpoint={weights}: is not the backbone that the run"):
        load_run(digits_run, weights)
    weights.unlink()
    with pytest.raises(TensLoRAError, match=r"^model\.checkpoint=\S+: no such file.*; if it has moved, .*--checkpoint"):
        load_run(digits_run, weights)


def test_images_that_have_changed_in_their_place_are_noticed(digits_run: Path, tmp_path: Path) -> None:
    for name in ("5", "8"):
        (tmp_path / name).mkdir()
        Image.fromarray(np.full((8, 8), 20 * int(name), np.uint8)).save(tmp_path / name / "0.png")
    loaded = load_run(digits_run)
    other = configured("dataset=image_folder", f"dataset.root={tmp_path}", "dataset.transform.flip=false").dataset
    first = loaded.evaluate(other).predictions["test"]
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "5" / "0.png")
    replaced = loaded.evaluate(other).predictions["test"]
    assert np.array_equal(first.outputs[1], replaced.outputs[1])
    assert not np.array_equal(first.outputs[0], replaced.outputs[0])
    shutil.copy(tmp_path / "5" / "0.png", tmp_path / "8" / "1.png")
    assert loaded.evaluate(other).predictions["test"].labels.tolist() == [0, 3, 3]


def test_a_loaded_run_has_a_tokenizer_of_its_own(sentences_run: Path) -> None:
    loaded, changed = load_run(sentences_run), load_run(sentences_run)
    sentences = ["the cat sat 3 times", "a dog"]
    expected = loaded.predict(sentences)
    assert changed.predict(sentences) == expected
    changed.tokenizer.model_max_length = 4
    assert changed.predict(sentences) != expected
    assert loaded.predict(sentences) == load_run(sentences_run).predict(sentences) == expected


def test_images_that_the_backbone_takes_otherwise_now_are_refused(digits_run: Path, tmp_path: Path) -> None:
    shutil.copytree(digits_run, tmp_path / "run")
    changed = record(digits_run)
    changed["image_input"]["mean"] = [0.25]
    (tmp_path / "run" / "result.json").write_text(json.dumps(changed))
    problem = r"^model\.checkpoint=embedded: its images have mean=\[0\.5\], and had \[0\.25\] when the run was trained"
    with pytest.raises(TensLoRAError, match=problem):
        load_run(tmp_path / "run")


def test_a_smaller_machine_predicts_with_fewer_threads(digits_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_run(digits_run)
    loaded = replace(loaded, run=replace(loaded.run, trainer=replace(loaded.run.trainer, threads=4096)))
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    before = torch.get_num_threads()
    assert len(loaded.predict([np.zeros((8, 8), np.uint8)])) == 1
    assert torch.get_num_threads() == before


def test_a_thread_scores_without_worker_processes(digits_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = _with(load_run(digits_run), "trainer", workers=1)
    loss = load_run(digits_run).evaluate().loss
    monkeypatch.setattr(BaseProcess, "start", lambda _: pytest.fail("starts a worker"))
    with pytest.raises(pytest.fail.Exception, match="starts a worker"):
        loaded.evaluate()
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(loaded.evaluate).result().loss == loss


def test_the_modes_of_a_model_stay_as_they_were(digits_run: Path) -> None:
    loaded, images = load_run(digits_run), [np.zeros((8, 8), np.uint8)]
    model = loaded.backbone.model
    assert not any(module.training for module in model.modules())  # ready to use
    answer = loaded.predict(images)
    model.train()
    next(model.children()).eval()
    modes = [module.training for module in model.modules()]
    assert loaded.predict(images) == answer
    loaded.evaluate()
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_loaded_run_works_in_its_own_process_alone(
    rank: str, digits_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, images = load_run(digits_run), [np.full((8, 8), value, np.uint8) for value in (0, 90, 200)]
    answers, loss = loaded.predict(images), loaded.evaluate().loss
    for name, value in {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("accelerate.Accelerator", lambda **_: pytest.fail("waits for another process"))
    assert loaded.predict(images) == answers
    assert loaded.evaluate().loss == loss
    for ask in (lambda: loaded.predict(images, shared=True), lambda: loaded.evaluate(shared=True)):
        with pytest.raises(pytest.fail.Exception, match="waits for another process"):
            ask()


def test_a_loaded_run_finds_its_folder_from_another_one(
    digits_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(digits_run.parent)
    loaded = load_run(digits_run.name)
    monkeypatch.chdir(tmp_path)
    assert loaded.files.path == digits_run.resolve()
    assert loaded.files.read_predictions().keys() == {"test"}


def test_a_loaded_run_knows_the_folder_that_a_link_led_to(digits_run: Path, tmp_path: Path) -> None:
    latest = tmp_path / "latest"
    latest.symlink_to(digits_run)
    loaded = load_run(latest)
    latest.unlink()
    latest.symlink_to(tmp_path)
    assert loaded.files.path == digits_run.resolve()
    assert loaded.files.read_predictions().keys() == {"test"}


def test_other_data_may_number_the_classes_otherwise(digits_run: Path) -> None:
    classes = ("5", "6", "7", "8", "9")
    examples = Examples([0, 0, 0], [0, 1, 1])
    config = load_run(digits_run).run.dataset
    renumbered = _renumbered(Dataset(examples, examples, ("6", "9")), "classification", classes, config)
    assert renumbered.classes == classes
    assert renumbered.test.labels == [1, 4, 4]
    with pytest.raises(TensLoRAError, match="the run has no class ten; its classes are 5, 6, 7, 8, 9"):
        _renumbered(Dataset(examples, examples, ("9", "ten")), "classification", classes, config)
    with pytest.raises(TensLoRAError, match=r"the run has no class 10, .* 21 and 78 more; its classes are 5, "):
        _renumbered(Dataset(examples, examples, tuple(map(str, range(10, 100)))), "classification", classes, config)
    with pytest.raises(TensLoRAError, match="must be a classification, as the run was, and it is a regression"):
        _renumbered(Dataset(examples, examples, (), "regression"), "classification", classes, config)


def test_a_run_that_left_no_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TensLoRAError, match=r"^a{500}: no such folder"):  # longer than a name can be
        load_run("a" * 500)
    with pytest.raises(TensLoRAError, match=rf"^{tmp_path}/none: no such folder"):
        load_run(tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(TensLoRAError, match=rf"^{tmp_path}/file: is a file; must be a run's folder$"):
        load_run(tmp_path / "file")
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    with pytest.raises(TensLoRAError, match=r"run: must be the folder of a finished run, with its result\.json$"):
        load_run(folder.path)
    folder.checkpoint.touch()
    with pytest.raises(
        TensLoRAError, match=r"run: the run is not finished; train\.py goes on with it with resume=true"
    ):
        load_run(folder.path)
    records.diverged(folder, configured())
    with pytest.raises(TensLoRAError, match=rf"^{folder.path}: the run has diverged; it left no weights$"):
        load_run(folder.path)
    with pytest.raises(TensLoRAError, match=rf"with its result\.json, such as {folder.path}$"):
        load_run(tmp_path)


@pytest.mark.parametrize("name", ["adapter.safetensors", "head.safetensors"])
def test_weights_that_another_run_wrote_are_refused(name: str, digits_run: Path, tmp_path: Path) -> None:
    shutil.copytree(digits_run, tmp_path / "run")
    assert record(digits_run)["sha256"][name] == hashlib.sha256((digits_run / name).read_bytes()).hexdigest()
    header, tensors = read_safetensors(digits_run / name)
    write_safetensors(tmp_path / "run" / name, {key: 1.5 * tensor for key, tensor in tensors.items()}, header)
    problem = rf"^{tmp_path}/run/{name}: is not the file that the run wrote; its SHA-256 is not that in result\.json$"
    with pytest.raises(TensLoRAError, match=problem):
        load_run(tmp_path / "run")
    earlier = record(digits_run)
    del earlier["sha256"]  # of a version that did not write it
    (tmp_path / "run" / "result.json").write_text(json.dumps(earlier))
    load_run(tmp_path / "run")
    (tmp_path / "run" / name).unlink()
    with pytest.raises(TensLoRAError, match=rf"^{tmp_path}/run/{name}: no such file$"):
        load_run(tmp_path / "run")


@pytest.mark.parametrize(
    ("finished", "changes", "message"),
    [
        ("digits_run", {"metrics": ("f1",)}, r"dataset\.metrics=f1: must be one of accuracy, matthews for a classif"),
        ("digits_run", {"metrics": ("pearson",)}, r"dataset\.metrics=pearson: must be one of accuracy, matthews for"),
        ("digits_run", {"metrics": ("nope",)}, r"dataset\.metrics=\[nope\]: nope must be one of accuracy"),
        ("digits_run", {"metrics": "accuracy"}, r"dataset\.metrics=accuracy: must be a list, written \[accuracy\]"),
        ("digits_run", {"train_size": "many"}, r"dataset\.train_size=many: must be"),
        ("regression_run", {"metrics": ("accuracy",)}, r"dataset\.metrics=accuracy: must be one of pearson, spearman"),
        ("regression_run", None, r"model=minilm: takes texts, and dataset=digits holds images"),
    ],
)
def test_what_a_run_cannot_be_scored_on_is_one_line(
    finished: str, changes: dict[str, Any] | None, message: str, request: pytest.FixtureRequest
) -> None:
    loaded = load_run(request.getfixturevalue(finished))
    dataset = configured().dataset if changes is None else replace(loaded.run.dataset, **changes)
    with pytest.raises(TensLoRAError, match=f"^{message}") as caught:
        loaded.evaluate(dataset)
    assert "\n" not in str(caught.value)


def test_a_root_may_be_a_path(regression_run: Path) -> None:
    loaded = load_run(regression_run)
    assert loaded.run.dataset.root is not None
    elsewhere: Any = Path(loaded.run.dataset.root)
    assert loaded.evaluate(replace(loaded.run.dataset, root=elsewhere)).scores == loaded.evaluate().scores


def test_another_task_under_the_same_root_is_another_dataset(tmp_path: Path) -> None:
    for task, count in (("RTE", 30), ("QNLI", 40)):
        (tmp_path / task).mkdir()
        lines = [f"{n}\ta cat {n % 3}\ta dog {n % 5}\t{'not_' * (n % 2)}entailment" for n in range(count)]
        for split in ("train", "dev"):
            (tmp_path / task / f"{split}.tsv").write_text("\n".join(["index\ta\tb\tlabel", *lines]))
    run(tmp_path / "run", "dataset=rte", f"dataset.root={tmp_path}", "dataset.validation=0.2", *TINY_BERT)
    loaded = load_run(tmp_path / "run")
    other = replace(loaded.run.dataset, name="qnli", validation=None)
    assert len(loaded.evaluate(other).predictions["test"].labels) == 40
    assert len(loaded.evaluate(replace(other, validation=0.25)).predictions["validation"].labels) == 10
    with pytest.raises(TensLoRAError, match=r"^dataset\.validation=0\.25: must be 0\.2, as in the run"):
        loaded.evaluate(replace(loaded.run.dataset, validation=0.25))


def _with(loaded: LoadedRun, group: str, **changes: Any) -> LoadedRun:
    """A loaded run some of whose settings a program has replaced."""
    run: Any = loaded.run
    return replace(loaded, run=replace(run, **{group: replace(getattr(run, group), **changes)}))


@pytest.mark.parametrize(
    ("group", "changes", "message"),
    [
        ("trainer", {"precision": "fp16"}, r"trainer\.precision=fp16: must be one of fp32, bf16$"),
        ("trainer", {"eval_batch_size": -1}, r"trainer\.eval_batch_size=-1: must be at least 1, or null$"),
        ("trainer", {"threads": "two"}, r"trainer\.threads=two: must be a whole number$"),
        ("trainer", {"workers": None}, r"trainer\.workers=null: must be a whole number$"),
        ("trainer", {"device": torch.device("cpu")}, r"trainer\.device=cpu: must be a number, a text, "),
        ("dataset", {"transform": None}, r"dataset\.transform=null: must be a group of settings"),
        ("dataset", {"train_size": 0}, r"dataset\.train_size=0: must be at least 1, or null$"),
        ("model", {"geometry": 3}, r"run: must hold the settings of a run \("),
    ],
)
def test_settings_that_a_program_has_replaced_are_checked(
    group: str, changes: dict[str, Any], message: str, digits_run: Path
) -> None:
    loaded = load_run(digits_run)
    with pytest.raises(TensLoRAError, match=f"^{message}"):
        _with(loaded, group, **changes)
    with pytest.raises(TensLoRAError, match=r"^run: must be of type RunConfig, and is None$"):
        replace(loaded, run=None)  # type: ignore[arg-type]


def test_settings_that_a_program_has_replaced_are_used(digits_run: Path) -> None:
    loaded = load_run(digits_run)
    images = [np.full((8, 8), value, np.uint8) for value in (0, 90, 200)]
    assert replace(loaded).run == loaded.run
    assert _with(loaded, "trainer", eval_batch_size=2.0).run.trainer.eval_batch_size == 2  # as on the command line
    rounded = _with(loaded, "trainer", precision="bf16").predict(images)
    assert rounded != loaded.predict(images)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_regression_is_scored_alike_whatever_type_is_the_default(dtype: torch.dtype, regression_run: Path) -> None:
    loaded = load_run(regression_run)
    try:
        torch.set_default_dtype(dtype)
        evaluation = loaded.evaluate()
    finally:
        torch.set_default_dtype(torch.float32)
    last = loaded.record["metrics"]["history"][-1]
    assert evaluation.predictions["test"].labels.dtype == np.float32
    assert {"test_loss": evaluation.loss, **evaluation.scores}.items() <= last.items()
