"""Loads a finished run: its backbone with the weights that the run trained."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from multiprocessing import current_process
from pathlib import Path
from pickle import PickleError
from typing import Any

import numpy as np
import torch
from torch import nn

from tenslora.errors import TensLoRAError, first_line, require_path, require_type
from tenslora.files import read_header, require_file
from tenslora.harness.backbones import Backbone, load_backbone, load_tokenizer
from tenslora.harness.backbones.answer import answer_of, is_same
from tenslora.harness.backbones.hub import source_setting
from tenslora.harness.backbones.image_input import ImageInput
from tenslora.harness.cache import reading_anew
from tenslora.harness.config import DatasetConfig, ImageDatasetConfig, RunConfig, TextDatasetConfig, validate
from tenslora.harness.config.checks import shown
from tenslora.harness.data import OWN_FILES, Dataset, Examples, load_dataset, load_tests
from tenslora.harness.data.encoding import encode
from tenslora.harness.data.examples import shortened, user_path
from tenslora.harness.data.glue import GLUE_TASKS
from tenslora.harness.data.unlabelled import unlabelled
from tenslora.harness.forms import Record, read_form
from tenslora.harness.predictions import Prediction, Predictions, by_name
from tenslora.harness.run_folder import RunFolder
from tenslora.harness.training.evaluation import Evaluation, evaluate, predict
from tenslora.harness.training.precision import round_frozen_weights
from tenslora.harness.training.processes import Processes, most_threads
from tenslora.harness.training.tasks import TASKS
from tenslora.pretrained import load, read_weights, running_statistics

_MOVING = threading.Lock()
"""Held while a model is moved, so that threads that share it do not move it at once."""

_OF_A_COMPUTATION = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    NameError,
    OSError,
    PickleError,  # of the workers' examples
    RuntimeError,
    TypeError,
    ValueError,
)
"""What a computation may raise. Any other error is that of a program's signal handler, such as Celery's time limit."""

_RUN = "_tenslora_run"
"""The attribute of a loaded model that holds the digest of its run. Copies and pickles of the model keep it."""


@dataclass(frozen=True, eq=False)  # like the module that it holds, a loaded run is equal to itself alone
class LoadedRun:
    """A finished run, ready to use.

    It predicts and is scored in evaluation mode. Afterwards the model's modules have the modes that they had. Its
    record and the parts of its backbone are checked at each call, because a program may change them in place.

    Args:
        run: the run's settings.
        record: the run's result.json.
        backbone: the backbone with the trained head, and with the adapter attached if the run had one. It is in
            evaluation mode. With an adapter, only the adapter's parameters require gradients, and the head is frozen.
            Without one, those that the run trained do.
        tokenizer: the tokenizer of a text model; None for an image model.
        files: the run's folder, by its absolute path without links.

    Raises:
        TensLoRAError: for settings that are not valid, a record that has not its form, or another object in the place
            of one, which `dataclasses.replace` may bring in.
    """

    run: RunConfig
    record: dict[str, Any]
    backbone: Backbone
    tokenizer: Any
    files: RunFolder

    def __post_init__(self) -> None:
        object.__setattr__(self, "run", _checked(self.run))
        self._check_parts()

    def _check_parts(self) -> None:
        """Check what the run holds now."""
        require_type("backbone", self.backbone, Backbone)
        require_type("backbone.model", self.backbone.model, nn.Module)
        require_type("backbone.head", self.backbone.head, list)
        for module in self.backbone.head:
            require_type("backbone.head", module, nn.Module)
        require_type("backbone.image_input", self.backbone.image_input, ImageInput, type(None))
        require_type("files", self.files, RunFolder)
        require_type("record", self.record, dict)
        object.__setattr__(self, "record", read_form(Record, self.record, Path("record"), "record"))
        if self.run.model.modality == "text":
            from transformers import PreTrainedTokenizerBase

            require_type("tokenizer", self.tokenizer, PreTrainedTokenizerBase)
        if (self.backbone.image_input is None) != (self.run.model.modality == "text"):
            raise TensLoRAError(f"backbone: must be one for {self.run.model.modality}s, as in the run")
        if getattr(self.backbone.model, _RUN, self.record["digest"]) != self.record["digest"]:
            raise TensLoRAError("record: must be that of the run whose model the backbone has; load the run again")

    @property
    def task(self) -> str:
        """The name of the run's task, see `training.tasks.TASKS`."""
        return str(self.record["task"])

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, by class number; () for a regression."""
        return tuple(self.record["classes"])

    @property
    def text_columns(self) -> tuple[str, ...]:
        """The columns of a text dataset that hold its one or two sentences; () for images."""
        if self.run.model.modality == "image":
            return ()
        earlier = GLUE_TASKS.get(self.run.dataset.name)  # the only texts of earlier versions, whose records lack them
        return tuple(self.record["text_columns"] or (earlier.sentences if earlier else ()))

    @property
    def image_input(self) -> ImageInput | None:
        """How the run turned a test image into the model's input; None for a text model."""
        return self.backbone.image_input_on(self.run.dataset)

    @reading_anew()
    def predict(
        self,
        inputs: Sequence[Any],
        *,
        device: str | None = None,
        batch_size: int | None = None,
        shared: bool = False,
    ) -> list[Prediction]:
        """Predict the classes or the values of inputs, encoded as the run's test examples were.

        Args:
            inputs: for an image model paths, PIL images, or arrays of bytes of shape (height, width) or (height, width,
                channels); for a text model sentences, or pairs of sentences.
            device: auto, cpu, cuda or cuda:<index>; None for the run's own.
            batch_size: the number of inputs per batch; None for that of the run's tests.
            shared: whether the processes that torchrun has started share the work. All of them must then ask for the
                same. Otherwise this process works alone.

        Returns:
            A prediction for each input, in order.

        Raises:
            TensLoRAError: for inputs that the model does not take, for an image that cannot be read, and if the model's
                outputs are not finite or no longer as many as the run has classes.
        """
        self._check_parts()
        examples = unlabelled(inputs, self.run.model.modality)
        if not len(examples):
            return []
        columns = self.text_columns
        if columns and len(columns) != (given := len(examples.inputs[0])):
            raise TensLoRAError(
                f"{given} sentence{'s' if given > 1 else ''} for each input: must be {len(columns)}, as in the run's "
                f"dataset ({', '.join(columns)})"
            )
        require_type("batch_size", batch_size, int, type(None))
        if batch_size is not None and batch_size < 1:
            raise TensLoRAError(f"batch_size={batch_size}: must be at least 1")
        dataset = Dataset(examples, examples, self.classes, self.task)
        trainer = replace(self.run.trainer, workers=0, eval_batch_size=batch_size or self.run.trainer.eval_batch_size)
        with self._on(device, shared) as processes:
            data = encode(dataset, self.run.dataset, self.backbone, self.tokenizer)
            model, count = self.backbone.model, len(self.classes) or 1
            _, predictions = predict(model, data.scored, data.collate, TASKS[self.task], trainer, processes, count)
        _require_finite(predictions)
        return by_name(predictions.outputs, self.classes)

    @reading_anew()
    def evaluate(
        self,
        dataset: ImageDatasetConfig | TextDatasetConfig | None = None,
        *,
        device: str | None = None,
        shared: bool = False,
    ) -> Evaluation:
        """Score the model as the run scored it after its last epoch.

        On the device and with the number of processes of the run, the result is the record's to the last digit. In
        another thread than the main one the run's `trainer.workers` are not started, and the thread reads by itself.

        Args:
            dataset: the settings of the dataset to score the model on; None for the run's own. A user's own files in
                another place need no examples for training. If they have no split to test on, all are for testing.
            device: auto, cpu, cuda or cuda:<index>; None for the run's own.
            shared: whether the processes that torchrun has started share the work. All of them must then ask for the
                same. Otherwise this process works alone.

        Returns:
            The loss, the scores and the predictions.

        Raises:
            TensLoRAError: for settings that are not valid, for a metric of another task, if the dataset cannot be
                loaded, if it has a class that the run's dataset has not, if it has another number of sentences in each
                example, if examples would be drawn otherwise than in the run, so that the run has trained on some of
                them, or if the model's outputs are not finite or no longer as many as the run has classes.
        """
        self._check_parts()
        require_type("dataset", dataset, ImageDatasetConfig, TextDatasetConfig, type(None))
        config = self.run.dataset
        if dataset:  # of a program, where nothing has checked it
            config = _checked(replace(self.run, dataset=dataset)).dataset
        TASKS[self.task].check_metrics(config.metrics or TASKS[self.task].metrics, len(self.classes) or 1)
        is_own = _place(config) == _place(self.run.dataset)
        if is_own:
            _require_held_out(config, self.run.dataset)
            loaded = load_dataset(config, self.run.seed)
        else:
            config = replace(config, validation=None) if config.source in OWN_FILES else config
            loaded = load_tests(config, self.run.seed, self.classes)
        loaded = _renumbered(loaded, self.task, self.classes, config)
        if len(loaded.text_columns) != (count := len(self.text_columns)):
            raise TensLoRAError(
                f"dataset={config.name}: must have {count} sentence{'s' * (count > 1)} in each example, as in the "
                f"run's dataset ({', '.join(self.text_columns)}), and not {', '.join(loaded.text_columns)}"
            )
        # A process of a pool must not start workers, and one that a thread of a pool has forked cannot end.
        is_alone = threading.current_thread() is threading.main_thread() and not current_process().daemon
        trainer = self.run.trainer if is_alone else replace(self.run.trainer, workers=0)
        with self._on(device, shared) as processes:
            if is_own and loaded.is_drawn:
                self._require_drawn_as_in_the_run(loaded, config)
            # The training examples are not used, and need not be tokenized.
            data = encode(replace(loaded, train=loaded.scored), config, self.backbone, self.tokenizer)
            count = len(self.classes) or 1
            evaluation = evaluate(self.backbone.model, data, trainer=trainer, processes=processes, count=count)
        for predictions in evaluation.predictions.values():
            _require_finite(predictions)
        return evaluation

    def _require_drawn_as_in_the_run(self, dataset: Dataset, config: DatasetConfig) -> None:
        """Refuse data that has changed: other rows would be drawn for scoring, some of which the run has trained on."""
        record, counts = self.record, []
        found = record
        with suppress(TensLoRAError):  # a record that is no longer there
            found = self.files.read_record()
        # The same settings may have been trained anew, which changes the weights and not the digest.
        if any(found[name] != record[name] for name in ("digest", "sha256")):
            raise TensLoRAError(f"{self.files.path}: is the folder of another run; load the run again")
        if config.scored_on == self.run.dataset.scored_on:
            counts.append((config.scored_on, record[f"{config.scored_on}_examples"], len(dataset.scored)))
            in_training = record["train_examples"]
        else:  # on the test split, of a run that has held out a validation split
            in_training = record["train_examples"] + record["validation_examples"]
        if config.train_size == self.run.dataset.train_size:
            counts.append(("train", in_training, len(dataset.train)))
        changes = [
            f"{own:,} {split} examples, and there are {count:,} now" for split, own, count in counts if count != own
        ]
        with suppress(TensLoRAError):  # a damaged file of predictions, which nothing else here needs
            kept = self.files.read_predictions().get(config.scored_on)
            if kept and kept.labels.tolist() != np.asarray(dataset.scored.labels, kept.labels.dtype).tolist():
                changes.append("other labels")
        if not changes:
            with suppress(TensLoRAError):  # a checkpoint that is no longer there, or is of another version
                header = read_header(self.files.checkpoint)
                if header.get("digest") == record["digest"] and header.get("start"):
                    own = self.run.dataset
                    data = encode(load_dataset(own, self.run.seed), own, self.backbone, self.tokenizer)
                    if data.digest() != header["start"]["data"]:
                        tokenizer = ", or another tokenizer" if own.modality == "text" else ""
                        changes.append(f"other examples, or the same in another order{tokenizer}")
        if changes:
            raise TensLoRAError(
                f"dataset={config.name}: has changed since the run, which had {changes[0]}; what is drawn from it now "
                f"has been trained on in part"
            )

    @contextmanager
    def _on(self, device: str | None, shared: bool) -> Iterator[Processes]:
        """A context in which the model is on a device, with the run's number of threads or what this machine allows."""
        require_type("device", device, str, torch.device, type(None))  # 0 and False would mean the run's own
        require_type("shared", shared, bool)
        kinds = {weight.dtype for weight in self.backbone.head_parameters().values()}
        if self.run.model.library == "timm" and kinds - {torch.float32}:  # transformers casts its inputs by itself
            raise TensLoRAError(
                f"{type(self.backbone.model).__name__}: has been made {', '.join(sorted(map(str, kinds)))} since it "
                f"was loaded, and takes images in torch.float32; load the run again"
            )
        before, threads = torch.get_num_threads(), self.run.trainer.threads
        try:
            threads = threads and min(threads, most_threads())
            own = self.run.trainer.device
            processes = Processes(own if device is None else device, threads, alone=not shared)
        except TensLoRAError as error:
            if not str(error).startswith("trainer.device="):  # the processes that the environment tells of
                raise
            if device is None:
                raise TensLoRAError(f"{error}; give another device (--device)") from error
            raise TensLoRAError(str(error).replace("trainer.device", "--device", 1)) from error
        wanted = torch.empty(0, device=processes.device).device  # as tensors name it: cuda:0 for cuda
        with _MOVING:
            _move(self.backbone.model, wanted)
        is_usual = torch.get_default_device().type == "cpu"
        try:
            with nullcontext() if is_usual else torch.device("cpu"):  # a program may have set another default
                yield processes
        except torch.OutOfMemoryError as error:
            raise TensLoRAError(f"a single example does not fit into the memory of {processes.name}") from error
        except (TensLoRAError, TimeoutError):  # an alarm of the program's
            raise
        except _OF_A_COMPUTATION as error:  # of a model that a program may have changed
            raise TensLoRAError(
                f"{type(self.backbone.model).__name__}: cannot compute its outputs ({first_line(error)}); if it was "
                f"changed since it was loaded, load the run again"
            ) from error
        finally:
            torch.set_num_threads(before)


@reading_anew()  # a notebook or a server goes on while files change, and may change the tokenizer that it gets
def load_run(folder: str | Path, checkpoint: str | Path | None = None) -> LoadedRun:
    """Load the backbone as the run did, and then the weights that the run trained.

    Args:
        folder: the run's folder.
        checkpoint: the backbone's weights, a file or folder, if they have moved since the run.

    Returns:
        The run, ready to use.

    Raises:
        TensLoRAError: if there is no completed run in the folder, if its backbone cannot be loaded, or if its weights
            or its adapter are not those of the run.
    """
    require_type("checkpoint", checkpoint, str, Path, type(None))
    files = RunFolder(require_path("folder", folder))
    record = _finished(files)
    own_folder = files.path.resolve()  # a link, such as one to the latest run, may lead to another run later
    try:
        run = validate(record["config"])
    except TensLoRAError as error:  # of settings that a later version has, or that somebody has written
        raise TensLoRAError(f"{files.result}: not a readable record (config: {error})") from error
    if run.digest() != record["digest"]:
        raise TensLoRAError(f"{files.result}: not a readable record (config: is of a run with other settings)")
    if checkpoint is not None:
        if run.adapter and require_path("checkpoint", checkpoint).resolve().is_relative_to(own_folder):
            raise TensLoRAError(
                f"--checkpoint {checkpoint}: must be the weights that the run started from; those in the run's folder "
                f"have the run's update already, which would be added twice"
            )
        run = replace(run, model=replace(run.model, checkpoint=str(checkpoint)))
    try:
        backbone, tokenizer = _load_backbone(run, record, files.path)
    except TensLoRAError as error:
        if not str(error).startswith("model.checkpoint=") or os.path.exists(str(run.model.checkpoint)):
            raise
        raise TensLoRAError(f"{error}; if it has moved, give its place (--checkpoint)") from error
    _require_backbone_of(run, record, backbone, tokenizer)
    if run.adapter:
        require_file(files.adapter)  # which load would look for on the hub
        adapter = load(backbone.model, files.adapter)
        for name, value in vars(adapter.config).items():
            if value != (own := getattr(run.adapter, name)):
                raise TensLoRAError(f"{files.adapter}: is the adapter of another run ({name}={value}, and here {own})")
    path = files.weights(run.tensor_mode)
    weights = read_weights(path, backbone.model)
    trained = dict(backbone.model.named_parameters()) if run.tensor_mode == "full" else backbone.head_parameters()
    if lacking := sorted((trained.keys() | running_statistics(backbone.model).keys()) - weights.keys()):
        raise TensLoRAError(f"{path}: lacks {lacking[0]}")
    for file in (files.adapter, path) if run.adapter else (path,):
        files.require_written(file, record)
    backbone.model.load_state_dict(weights, strict=False)
    if run.adapter:
        adapter.trained_beside = frozenset(trained)  # for save_pretrained
    else:
        for name, parameter in backbone.model.named_parameters():
            if name not in trained:
                parameter.requires_grad_(False)
    if run.trainer.precision == "bf16":
        round_frozen_weights(backbone.model, of_quantised=True)
    backbone.model.eval()
    setattr(backbone.model, _RUN, record["digest"])
    return LoadedRun(run, record, backbone, tokenizer, RunFolder(own_folder))


def _load_backbone(run: RunConfig, record: Mapping[str, Any], folder: Path) -> tuple[Backbone, Any]:
    """The backbone of the run in a folder, and its tokenizer, which is None for a model of images."""
    tokenizer = None
    if run.model.modality == "text":
        # A run with random weights trained a tokenizer on its own sentences. That tokenizer has to be trained again.
        sentences = [] if run.model.pretrained else load_dataset(run.dataset, run.seed).train.inputs
        if sentences and len(sentences) != record["train_examples"]:
            raise TensLoRAError(
                f"{folder}: its tokenizer was trained on its {record['train_examples']:,} training examples, and "
                f"dataset={run.dataset.name} has {len(sentences):,} now"
            )
        tokenizer = load_tokenizer(run.model, sentences)
    backbone = load_backbone(run.model, len(record["classes"]) or 1, run.seed, tokenizer)
    return backbone, tokenizer


def _require_backbone_of(run: RunConfig, record: Mapping[str, Any], backbone: Backbone, tokenizer: Any) -> None:
    """Refuse a backbone that is not the one of the record, which may lack what earlier versions did not record."""
    answered = None if run.tensor_mode == "full" else record["backbone_answer"]
    if answered and (answer := answer_of(backbone, tokenizer)) and not is_same(answer, answered):
        raise TensLoRAError(
            f"{source_setting(run.model)}: is not the backbone that the run started from; its weights, its config.json "
            f"or its tokenizer are others now"
        )
    images, own = backbone.image_input_on(run.dataset), record["image_input"]
    if images and own:
        for name, value in asdict(images).items():
            value = list(value) if isinstance(value, tuple) else value
            if value != own.get(name, value):
                raise TensLoRAError(
                    f"{source_setting(run.model)}: its images have {name}={shown(value)}, and had {shown(own[name])} "
                    f"when the run was trained on them"
                )


def _move(model: nn.Module, device: torch.device) -> None:
    """Move a model to a device unless it is there, or accelerate's hooks bring its weights to where it computes."""
    if all(tensor.device == device for tensor in (*model.parameters(), *model.buffers())):
        return
    hooks = [hook for module in model.modules() if (hook := getattr(module, "_hf_hook", None))]
    if any(hasattr(each, "execution_device") for hook in hooks for each in getattr(hook, "hooks", [hook])):
        return
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise TensLoRAError(
                f"{type(model).__name__}: {name} is on the device meta, which has no numbers; load the run again"
            )
    model.to(device)


def _checked(run: RunConfig) -> RunConfig:
    """Settings that a program may have replaced by others, checked as those of a run are before it trains."""
    require_type("run", run, RunConfig)
    try:
        settings = run.settings()
    except (AttributeError, KeyError, TypeError) as error:  # a group of settings that is something else
        raise TensLoRAError(f"run: must hold the settings of a run ({first_line(error)})") from error
    return validate(settings)


def _finished(files: RunFolder) -> dict[str, Any]:
    """The record of a completed run."""
    if not os.path.exists(files.result):  # unlike Path.exists, it also answers where a name is too long for a file
        if not os.path.isdir(files.path):
            what = "is a file; must be a run's folder" if os.path.exists(files.path) else "no such folder"
            raise TensLoRAError(f"{files.path}: {what}")
        if files.checkpoint.is_file():
            raise TensLoRAError(f"{files.path}: the run is not finished; train.py goes on with it with resume=true")
        runs = sorted(files.path.glob(f"*/{files.result.name}"))
        hint = f", such as {runs[0].parent}" if runs else ""
        raise TensLoRAError(f"{files.path}: must be the folder of a finished run, with its result.json{hint}")
    record = files.read_record()
    if record["status"] != "completed":
        raise TensLoRAError(f"{files.path}: the run has {record['status']}; it left no weights")
    return record


def _require_finite(predictions: Predictions) -> None:
    if not np.isfinite(predictions.outputs).all():
        raise TensLoRAError("the model's outputs are not finite; its weights, or those of the run, are damaged")


def _place(config: DatasetConfig) -> list[Any]:
    """Where the test examples of a dataset are."""
    root = None if config.root is None else os.path.realpath(user_path(config.root))  # however it is spelt
    of_root = None if config.source in OWN_FILES else config.name  # GLUE's tasks may all lie under one root
    return [root, of_root, *(getattr(config, name, None) for name in ("hub", "hub_config", "test_list"))]


def _require_held_out(config: DatasetConfig, trained: DatasetConfig) -> None:
    """Refuse settings that would score a run, on its own dataset, on examples that it has trained on."""
    names = ["train_fraction"]  # what the seed draws, and from which examples
    if config.scored_on == "validation":
        names += ["validation", "train_size", "train_splits", "test_split"]
    for name in names:
        value, own = getattr(config, name, None), getattr(trained, name, None)
        if value != own:
            raise TensLoRAError(
                f"dataset.{name}={shown(value)}: must be {shown(own)}, as in the run; otherwise it would be scored on "
                f"examples that it has trained on"
            )


def _renumbered(dataset: Dataset, task: str, classes: Sequence[str], config: DatasetConfig) -> Dataset:
    """A dataset whose classes have the numbers that they had in the run."""
    if dataset.task != task:
        raise TensLoRAError(f"dataset={config.name}: must be a {task}, as the run was, and it is a {dataset.task}")
    if dataset.classes == classes:
        return dataset
    numbers: Mapping[str, int] = {name: number for number, name in enumerate(classes)}
    if unknown := [name for name in dataset.classes if name not in numbers]:
        raise TensLoRAError(
            f"dataset={config.name}: the run has no class {shortened(unknown)}; its classes are {shortened(classes)}"
        )
    number_of = [numbers[name] for name in dataset.classes]

    def renumbered(examples: Examples) -> Examples:
        return replace(examples, labels=[number_of[label] for label in examples.labels])

    return replace(
        dataset,
        test=renumbered(dataset.test),
        validation=dataset.validation and renumbered(dataset.validation),
        more_tests={name: renumbered(examples) for name, examples in dataset.more_tests.items()},
        classes=tuple(classes),
    )
