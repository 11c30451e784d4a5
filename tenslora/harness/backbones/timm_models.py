"""Vision Transformers of timm."""

from __future__ import annotations

import difflib
import math
import zipfile
from collections.abc import Collection, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tenslora.errors import TensLoRAError, first_line
from tenslora.files import read_json, unlike_a_files
from tenslora.forms import shown
from tenslora.harness.backbones.head import Backbone
from tenslora.harness.backbones.hub import building, fetching, require_readable, wrong_checkpoint
from tenslora.harness.backbones.image_input import ImageInput, require_whole_patches, resolve_image_input
from tenslora.harness.config import ModelConfig
from tenslora.harness.config.schema import OPTIONS_ELSEWHERE
from tenslora.harness.quick_start import import_timm

EMBEDDED = Path(__file__).parent / "vit_digits.safetensors"
"""The checkpoint in the package, which scripts/pretrain_vit_digits.py wrote."""


def load_timm(config: ModelConfig, classes: int) -> Backbone:
    """Load a model of timm, with the head that timm initialises; see `tenslora.harness.backbones.load_backbone`."""
    timm = import_timm()
    from_hub = config.pretrained and config.checkpoint is None
    _require_known(timm, config, from_hub)
    options: dict[str, Any] = {"num_classes": classes}
    if config.channels is not None:
        options["in_chans"] = config.channels
    takes_any = config.declares_images and {"dynamic_img_size", "strict_img_size"} & config.options.keys()
    if config.image_size is not None and not takes_any:
        declared = timm.get_pretrained_cfg(_current_name(timm, config))
        if declared is not None and declared.fixed_input_size:  # other models take images of any size
            options["img_size"] = config.image_size
    options |= config.options
    with building(config), fetching(config) if from_hub else nullcontext():
        model = timm.create_model(config.architecture, pretrained=from_hub, **options)
    classifier = model.get_classifier()
    head = list(classifier) if isinstance(classifier, tuple) else [classifier]
    image_input = resolve_image_input(config, _own_input(model, config, options))
    path = weights_file(config.checkpoint) if config.pretrained and config.checkpoint is not None else None
    if path is not None:  # before the other checks, whose messages would name what follows from the arguments
        _require_arguments_of(path.with_name("config.json"), model, config, options)
    patches = getattr(model, "patch_embed", None)
    stride = getattr(getattr(patches, "proj", None), "stride", None)  # XCiT's patches have no proj with one stride
    require_whole_patches(config, image_input.size, getattr(patches, "patch_size", None), stride)
    backbone = Backbone(model, head, "x", image_input)
    if path is not None:
        _load_weights(backbone, config, path)
    return backbone


def create_arguments(config: ModelConfig, backbone: Backbone) -> dict[str, Any]:
    """The arguments with which timm.create_model makes a model like a loaded one, but for the number of classes.

    Args:
        config: the model's settings.
        backbone: the loaded model.
    """
    assert backbone.image_input is not None
    arguments = {"in_chans": backbone.image_input.channels, **config.options}
    if vars(backbone.model)["pretrained_cfg"].get("fixed_input_size"):
        arguments["img_size"] = backbone.image_input.size
    return arguments


def _require_arguments_of(file: Path, model: nn.Module, config: ModelConfig, options: Mapping[str, Any]) -> None:
    """Refuse weights of a model of another architecture or with other arguments, where the shapes do not tell.

    Args:
        file: timm's config.json beside the weights, which may be missing.
        model: the model.
        config: its settings.
        options: the arguments with which it was made.
    """
    saved = read_json(file) if file.is_file() else {}
    saved = saved if isinstance(saved, dict) else {}
    arguments = saved.get("model_args")
    known = {"in_chans", "img_size", *OPTIONS_ELSEWHERE, *options}
    left = {
        name: value
        for name, value in (arguments.items() if isinstance(arguments, dict) else ())
        if name not in known and "drop" not in name
    }
    own, architecture = (str(name).partition(".")[0] for name in (config.architecture, saved.get("architecture")))
    is_other = saved.get("architecture") is not None and architecture != own
    if not (left or is_other):
        return
    made = f"its architecture {shown(architecture)}" if is_other else f"its model_args {shown(left)}"
    timm = import_timm()
    try:
        if is_other and not timm.is_model(architecture):  # create_model would download a repository of such a name
            raise ValueError(f"timm {timm.__version__} has no such model")
        other = timm.create_model(architecture if is_other else config.architecture, **options, **left)
    except Exception as error:  # what is in the file is anybody's
        raise wrong_checkpoint(config, file, f"{made} do{'es' * is_other} not make one") from error
    if _plain_attributes(other) != _plain_attributes(model):
        if is_other:
            raise TensLoRAError(
                f"model.architecture={config.architecture}: must be {architecture}, the architecture of these "
                f"weights ({file})"
            )
        raise TensLoRAError(
            f"model.options={shown(config.options)}: must have the arguments of the model whose weights these are, "
            f"{shown(left)} ({file})"
        )


def _plain_attributes(model: nn.Module) -> list[Any]:
    plain = (bool, int, float, str, tuple, type(None))
    return [
        (path, type(module), {name: value for name, value in vars(module).items() if isinstance(value, plain)})
        for path, module in model.named_modules()
    ]


def _current_name(timm: Any, config: ModelConfig) -> str:
    """The name by which timm knows the model. Under a deprecated one it only builds the model."""
    name = str(config.architecture)
    return timm.models.get_deprecated_models().get(name) or name


def _require_known(timm: Any, config: ModelConfig, from_hub: bool) -> None:
    """Refuse a name that timm does not have, or that has no weights if they are to come from the hub."""
    name = str(config.architecture)
    if name.startswith("local-dir:"):
        raise TensLoRAError(
            f"model.architecture={name}: must be the name of a model of timm, as in the folder's config.json; give the "
            f"folder as model.checkpoint"
        )
    architecture, _, tag = name.partition(".")
    if not timm.is_model(name):
        known = [*timm.list_models(), *timm.list_pretrained()]
        similar = difflib.get_close_matches(name, known, n=3) or difflib.get_close_matches(architecture, known, n=3)
        hint = f"; similar names are {', '.join(similar)}" if similar else ""
        raise TensLoRAError(f"model.architecture={name}: timm {timm.__version__} has no such model{hint}")
    with_weights = timm.list_pretrained(f"{architecture}.*") if tag or from_hub else []
    if tag and name not in with_weights:
        raise TensLoRAError(
            f"model.architecture={name}: timm {timm.__version__} has no such weights; "
            f"{'it has ' + ', '.join(with_weights) if with_weights else f'it has none for {architecture}'}"
        )
    if from_hub and (current := _current_name(timm, config)) != name:
        raise TensLoRAError(
            f"model.architecture={name}: must be {current}, as timm calls the model and its weights now"
        )
    if from_hub and not timm.is_model_pretrained(name):
        raise TensLoRAError(
            f"model.architecture={name}: timm {timm.__version__} has no weights for it; set model.checkpoint to a file "
            f"or a folder of weights, or model.pretrained=false for random ones"
        )


def _own_input(model: nn.Module, config: ModelConfig, options: Mapping[str, Any]) -> ImageInput:
    """The images that a model takes according to timm's data config, or to that in the folder of its weights."""
    from timm.data import resolve_model_data_config

    if config.declares_images:
        return ImageInput(0, 0, (), ())  # of which all is replaced
    saved: dict[str, Any] = {}
    file = Path(config.checkpoint or "") / "config.json"
    if config.checkpoint is not None and file.is_file():
        saved = _pretrained_config(file)
    try:
        data = resolve_model_data_config(model, pretrained_cfg={**vars(model)["pretrained_cfg"], **saved})
        return _input_of(data, config, options)
    except TensLoRAError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise TensLoRAError(f"{file}: its images are of no form that timm has ({first_line(error)})") from error


def _pretrained_config(file: Path) -> dict[str, Any]:
    saved = read_json(file)
    own = saved.get("pretrained_cfg") or {} if isinstance(saved, dict) else None
    if not isinstance(own, dict):
        raise TensLoRAError(f"{file}: not a config of timm, an object with an object pretrained_cfg")
    return own


def _input_of(data: Mapping[str, Any], config: ModelConfig, options: Mapping[str, Any]) -> ImageInput:
    """The images of timm's data config."""
    channels, height, width = data["input_size"]
    size = config.image_size or options.get("img_size", height if height == width else None)
    if not isinstance(size, int):
        raise TensLoRAError(f"model.image_size=null: {config.name} takes images of {height} x {width}; set one number")
    return ImageInput(
        size=size,
        channels=options.get("in_chans", channels),
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
        crop_ratio=size / math.floor(size / data["crop_pct"]),  # timm rounds the resized image's size down
        squash=data["crop_mode"] == "squash",
        interpolation=data["interpolation"],
    )


def _load_weights(backbone: Backbone, config: ModelConfig, path: Path) -> None:
    """Load a file's weights into a model, without the head's. The file must have all other weights."""
    from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

    model, of_head = backbone.model, backbone.head_parameters().keys()
    # Converted to float32, because the positions resampled below would be rounded to the precision of the file.
    weights = {
        name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in _read_weights(path).items()
    }
    expected = {name: tensor for name, tensor in model.state_dict().items() if name not in of_head}
    if isinstance(model, VisionTransformer):
        try:
            weights = checkpoint_filter_fn(weights, model)  # resamples the grid of positions to the image size
        except Exception as error:  # timm computes with the weights before anybody has checked their shapes
            first, *_ = [*_differences(weights, expected, of_head), first_line(error)]
            raise wrong_checkpoint(config, path, first) from error
    if differences := _differences(weights, expected, of_head):
        more = f" and {len(differences) - 1} more" if len(differences) > 1 else ""
        raise wrong_checkpoint(config, path, differences[0] + more)
    model.load_state_dict({name: weights[name] for name in expected}, strict=False)


def _differences(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], of_head: Collection[str]) -> list[str]:
    """In what a file's weights differ from those that a model has outside of its head."""
    differences = [f"lacks {name}" for name in expected if name not in weights]
    differences += [
        f"has {name}"
        for name in weights
        if name not in expected and name not in of_head and not name.startswith(("head", "fc"))
    ]
    for name, tensor in expected.items():
        saved = weights.get(name, tensor)
        if saved.shape != tensor.shape:
            empty = "" if saved.numel() else ", as DeepSpeed's ZeRO-3 saves what it has distributed"
            differences.append(f"has {name} of shape {tuple(saved.shape)}, not {tuple(tensor.shape)}{empty}")
    differences += [
        f"has {name} of type {weights[name].dtype}"
        for name, tensor in expected.items()
        if name in weights and tensor.is_floating_point() and not weights[name].is_floating_point()
    ]
    return differences


def weights_file(checkpoint: str) -> Path:
    """The file of weights that `model.checkpoint` names: "embedded", a file, or a folder with such a file.

    Args:
        checkpoint: the setting's value.

    Raises:
        TensLoRAError: if there is no such file.
    """
    path = EMBEDDED if checkpoint == "embedded" else Path(checkpoint)
    for file in (path, path / "model.safetensors", path / "pytorch_model.bin"):
        if file.is_file():
            require_readable(checkpoint, file)
            return file
    raise TensLoRAError(f"model.checkpoint={path}: no such file, nor a folder with model.safetensors in it")


def _read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a pickle in which nothing but tensors is allowed."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    not_tensors = TensLoRAError(
        f"model.checkpoint={path}: not a plain dictionary of tensors; save the model's state_dict()"
    )
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if zipfile.is_zipfile(path):
            names = zipfile.ZipFile(path).namelist()
            if not any(name.endswith("/data.pkl") for name in names):  # torch would ask for a report to its authors
                raise ValueError("a zip file that torch has not written, such as numpy's .npz")
            if any(name.endswith("/constants.pkl") for name in names):  # torch would advise to run what is in it
                raise ValueError("a TorchScript archive; save the model's state_dict")
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError) as error:
        raise TensLoRAError(f"model.checkpoint={path}: damaged, or not a checkpoint ({first_line(error)})") from error
    except Exception as error:  # the types by which pickle refuses anything but tensors are not documented
        raise not_tensors from error
    for key in ("model", "state_dict"):  # some training scripts nest the weights under one of these
        weights = weights.get(key, weights) if isinstance(weights, dict) else weights
    if not isinstance(weights, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in weights.items()
    ):
        raise not_tensors
    for name, tensor in weights.items():
        if (kind := unlike_a_files(tensor)) is not None:
            raise TensLoRAError(f"model.checkpoint={path}: {name} is a {kind}; must be a dense tensor with numbers")
    return weights
