"""Reads a LoRA that PEFT saved, without PEFT."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from tenslora.attachment import uncompiled
from tenslora.errors import TensLoRAError
from tenslora.files import read_json, read_safetensors, require_finite, require_tensors
from tenslora.forms import from_json, shown
from tenslora.peft.patterns import first_matches
from tenslora.projections import Stage, TargetLinear, features, is_conv1d, is_linear, paths_to_adapt

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""The files in the folder that PEFT's `save_pretrained` writes."""

_PICKLE = "adapter_model.bin"
"""The file of the weights as PEFT wrote it before it knew safetensors."""

_PARTS = "adapter_model-*-of-*.safetensors"
"""The files of the weights that transformers writes where they are larger than its max_shard_size."""

PREFIX = "base_model.model."
"""What PEFT puts in front of the names of a model's own weights."""

_Prefix = tuple[str, str]  # of modules' paths: in the file, and in the model in its place

# The values of PEFT's init_lora_weights that leave the backbone's own weights as they are.
_INITS_OF_LORA_ALONE = (True, False, "gaussian", "eva", "orthogonal")
# PEFT's settings with which an adapter does something else than to add one product of two matrices to each weight.
_OTHER_METHODS = (
    "lora_bias",
    "use_qalora",
    "use_bdlora",
    "layer_replication",
    "alora_invocation_tokens",
    "trainable_token_indices",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)


@dataclass(frozen=True)
class SavedLora:
    """The settings of a saved LoRA that its updates depend on, under PEFT's names.

    Args:
        peft_type: the method, "LORA".
        r: the rank.
        lora_alpha: multiplies the updates, after division by r or, with use_rslora, by sqrt(r).
        use_rslora: see lora_alpha.
        use_dora: whether the adapter is a DoRA, which is refused.
        rank_pattern: the ranks of the modules that have another one, by regular expressions of their paths.
        alpha_pattern: likewise for lora_alpha.
        bias: which biases were trained; only "none" is accepted.
        target_parameters: the ends of the paths of weights that are adapted as parameters, and not by their modules.
        init_lora_weights: the initialisation; those that change the backbone are refused.
        base_model_name_or_path: the folder or the hub's name of the backbone.

    Raises:
        TensLoRAError: for a value that is out of range, or if the adapter does more than add a product of two matrices
            to each weight.
    """

    peft_type: str
    r: int
    lora_alpha: float
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    bias: str = "none"
    target_parameters: list[str] | None = None
    init_lora_weights: bool | str | None = True
    base_model_name_or_path: str | None = None

    def __post_init__(self) -> None:
        for rank in (self.r, *(self.rank_pattern or {}).values()):
            if rank < 1:
                raise TensLoRAError(f"r={rank}: must be at least 1")
        if self.bias != "none":
            raise TensLoRAError(f"bias={self.bias}: must be none, because a tensor of updates cannot hold biases")
        if self.init_lora_weights not in _INITS_OF_LORA_ALONE:
            raise TensLoRAError(
                f"init_lora_weights={self.init_lora_weights}: changes the backbone's weights too; save the adapter "
                f"again with PEFT's path_initial_model_for_weight_conversion, which turns it into a plain LoRA"
            )

    def ranks(self, names: Sequence[str]) -> dict[str, int]:
        """The rank of each of some modules.

        Args:
            names: the modules' paths.

        Raises:
            TensLoRAError: if rank_pattern cannot be matched.
        """
        patterns = self.rank_pattern or {}
        matching = first_matches(list(patterns), names)
        return {name: patterns[matching[name]] if name in matching else self.r for name in names}

    def scalings(self, names: Sequence[str]) -> dict[str, float]:
        """What the product of the two matrices of each of some modules is multiplied by.

        Args:
            names: the modules' paths.

        Raises:
            TensLoRAError: if a pattern cannot be matched.
        """
        patterns = self.alpha_pattern or {}
        matching = first_matches(list(patterns), names)
        alphas = {name: patterns[matching[name]] if name in matching else self.lora_alpha for name in names}
        return {
            name: alphas[name] / (rank**0.5 if self.use_rslora else rank) for name, rank in self.ranks(names).items()
        }


def read_config(folder: Path) -> SavedLora:
    """Read the settings of a saved LoRA.

    Args:
        folder: a folder that PEFT's `save_pretrained` wrote.

    Returns:
        The settings in its adapter_config.json.

    Raises:
        TensLoRAError: if there are no settings, or if they are not those of a plain LoRA; see `SavedLora`.
    """
    path = folder / CONFIG
    data = read_json(path)
    try:
        kind = isinstance(data, dict) and ("DoRA" if data.get("use_dora") is True else data.get("peft_type", "LORA"))
        if kind and kind != "LORA":
            raise TensLoRAError(f"must be a plain LoRA, whose updates are products of two matrices, not {kind}")
        lora = from_json(SavedLora, data, ignore_others=True)
        for setting in _OTHER_METHODS:
            if value := data.get(setting):
                raise TensLoRAError(
                    f"{setting}={shown(value)}: must be off, because the updates are more than products"
                )
    except TensLoRAError as error:
        raise TensLoRAError(f"{path}: {error}") from error
    return lora


def read_updates(
    folder: Path, stages: Sequence[Stage], choice: str | None = None, model: nn.Module | None = None
) -> list[list[list[Tensor]]]:
    """Read the updates that a saved LoRA makes, PEFT's scaling included.

    Args:
        folder: a folder that PEFT's `save_pretrained` wrote.
        stages: those of the model that the LoRA is for, from `find_projections`.
        choice: the settings that chose the stages' matrices, for a message; None for adapt alone.
        model: the model, by which a message tells matrices that could be chosen from those that cannot; None if it is
            not at hand.

    Returns:
        ``updates[stage][layer][m]``, the update of the m-th of `Geometry.matrices` in that layer of the stage, with
        shape (d_in, width). It is zero if the LoRA does not adapt that matrix.

    Raises:
        TensLoRAError: if the LoRA adapts anything beside the stages' matrices, if its sizes are not the model's, or
            if all of its updates are zero.
    """
    config, path = read_config(folder), folder / WEIGHTS
    if not path.exists() and (folder / _PICKLE).exists():
        raise TensLoRAError(
            f"{folder / _PICKLE}: is a pickle, which could run code; save the LoRA again in safetensors"
        )
    if not path.exists() and (parts := sorted(folder.glob(_PARTS))):
        raise TensLoRAError(
            f"{parts[0]}: is one of {len(parts)} parts of the LoRA; save it again in one file, with a larger "
            f"max_shard_size"
        )
    tensors = read_safetensors(path)[1]
    matrices = {key: tensor for key, tensor in tensors.items() if ".lora_" in key}
    if tensors and not any(re.search(r"\.lora_(embedding_)?[AB]\b", key) for key in matrices):
        raise TensLoRAError(
            f"{path}: has no lora_A and no lora_B; must hold them as PEFT names them, not {min(tensors)}"
        )
    saved = _modules(matrices)
    targets = {target.path: (index, target) for index, (_, of_stage) in enumerate(stages) for target in of_stage}
    prefixes = _prefixes(matrices, {path: target.linear for path, (_, target) in targets.items()})
    paths = [_paths(saved, prefix, targets) for prefix in prefixes]
    if not paths[0] and model is not None:  # it may adapt none but matrices that the stages leave out
        prefixes = _prefixes(matrices, {path: part for path, part in model.named_modules() if is_linear(part)})
    found = {saved[name]: targets[path] for name, path in paths[0].items()}
    if named := [key for key in matrices if re.search(r"\.lora_[^.]+\.[^.]+\.weight$", key)]:
        raise TensLoRAError(
            f"{path}: {min(named)} has an adapter's name in it, as in a model's own state dict; save the LoRA with "
            f"PEFT's save_pretrained, or take the name out"
        )
    if biases := [key for key in matrices if key.endswith(".lora_B.bias")]:
        raise TensLoRAError(f"{path}: {min(biases)} is a bias of lora_B, which a tensor of updates cannot hold")
    if wrapped := [key for key in matrices if key.startswith("module.")]:
        raise TensLoRAError(
            f"{path}: {min(wrapped)} begins with module., as under DistributedDataParallel; must begin with {PREFIX}"
        )
    with_prefix = {name for name in saved if name.startswith(prefixes[0][0])}
    existing = with_prefix if model is None else _paths(saved, prefixes[0], dict(model.named_modules())).keys()
    if saved and not found and (model is None or not existing):
        raise TensLoRAError(
            f"{folder}: adapts {min(saved)} and others; this model has none of them; names of an older transformers "
            f"may become the model's own if PEFT loads the LoRA and saves it again"
        )
    if nowhere := saved.keys() - existing:
        raise TensLoRAError(f"{folder}: adapts {min(nowhere)}; this model has no such layer")
    if left := set(saved.values()) - found.keys():
        could_be_chosen = saved if model is None else _paths(saved, prefixes[0], paths_to_adapt(model))
        if never := left - {saved[name] for name in could_be_chosen}:
            raise TensLoRAError(
                f"{folder}: adapts {min(never)}, which no choice of matrices can adapt; train the LoRA without it, or "
                f"merge the LoRA into the model"
            )
        raise _left_out(folder, min(left), stages, choice)
    if len(prefixes) > 1:
        name = min(saved)
        raise TensLoRAError(
            f"{folder}: adapts {name} and others, which may be this model's {paths[0][name]} or {paths[1][name]}; "
            f"choose one of the two, in PEFT by target_modules"
        )
    try:
        products = _products(config, matrices, {name: target for name, (_, target) in found.items()})
    except TensLoRAError as error:
        raise TensLoRAError(f"{path}: {error}") from error
    updates = [
        [[torch.zeros(geometry.d_in, width) for width in geometry.widths] for _ in range(geometry.layers)]
        for geometry, _ in stages
    ]
    for name, (stage, target) in found.items():
        update = products[name]
        remainder = update.clone()
        for columns in target.columns:
            own = columns.of(update).flatten(1)
            updates[stage][target.layer][target.group[columns.matrix]] = own.T if target.writes_to_stream else own
            columns.of(remainder).zero_()
        if remainder.any():  # the Linear holds other matrices too, which the geometry leaves out
            raise _left_out(folder, name, stages, choice)
    if not any(update.any() for of_stage in updates for layer in of_stage for update in layer):
        raise TensLoRAError(f"{folder}: its updates are all zero, as before any training")
    if lacking := _lacking(folder, paths[0].values(), targets):
        warnings.warn(
            f"{folder}: has no update of {lacking[0]}, which its target_modules name ({len(lacking)} such); these are "
            f"taken for zero",
            stacklevel=2,
        )
    return updates


def _lacking(folder: Path, adapted: Collection[str], targets: Iterable[str]) -> list[str]:
    # The modules that a LoRA would have adapted in other layers than those that it holds. PEFT's settings may leave
    # layers out, and other modules of such a name may have come with another model.
    settings = read_json(folder / CONFIG)
    names = settings.get("target_modules")
    narrower = any(settings.get(name) not in (None, []) for name in ("exclude_modules", "layers_to_transform"))
    if not isinstance(names, list) or narrower:
        return []
    alike = {re.sub(r"\d+", "#", path) for path in adapted}
    return [
        path
        for path in targets
        if path not in adapted
        and re.sub(r"\d+", "#", path) in alike
        and any(isinstance(name, str) and _ends_with(path, name) for name in names)
    ]


def read_others(folder: Path, stages: Sequence[Stage] = (), names: Container[str] = ()) -> dict[str, Tensor]:
    """Read what was trained and saved beside a LoRA, such as a head.

    Args:
        folder: a folder that PEFT's `save_pretrained` wrote.
        stages: those of the model that the LoRA is for, whose paths may have another prefix than those in the file.
        names: of the model's weights.

    Returns:
        The weights by their names in the file, without those of torch.compile's wrappers. A weight that is the model's
        under the prefix of the stages has the name that PEFT would give it in the model.
    """
    weights = read_safetensors(folder / WEIGHTS)[1]
    matrices = {name: weight for name, weight in weights.items() if ".lora_" in name}
    old, new = _prefixes(matrices, {target.path: target.linear for stage in stages for target in stage.targets})[0]
    others = {}
    for name, weight in weights.items():
        saved = uncompiled(name)
        own = new + saved.removeprefix(PREFIX + old)
        if ".lora_" not in name:
            if weight.is_floating_point():  # and not the number of batches that a batch norm has seen
                require_finite(f"{folder / WEIGHTS}: {name}", weight)
            others[PREFIX + own if saved.startswith(PREFIX + old) and own in names else saved] = weight
    return others


def _modules(names: Iterable[str]) -> dict[str, str]:
    # The saved modules' names in the file, by their names without torch.compile's wrappers.
    modules = {re.sub(r"\.lora_[^.]+(\.weight)?$", "", name.removeprefix(PREFIX)) for name in names}
    return {uncompiled(name): name for name in modules}


def _paths(saved: Iterable[str], prefix: _Prefix, paths: Container[str]) -> dict[str, str]:
    # The paths of the saved modules that a prefix leads to.
    old, new = prefix
    return {name: path for name in saved if name.startswith(old) and (path := new + name[len(old) :]) in paths}


def _prefixes(matrices: Mapping[str, Tensor], linears: Mapping[str, nn.Module]) -> list[_Prefix]:
    # A model with a head has a prefix in front of the backbone's paths, and either model may have a head: the LoRA's
    # own, or the one that is adapted. The prefix is the same for all paths. It is the one with which most matrices have
    # the sizes of the model's, and the shortest of these: one tower may be called blocks, and another visual.blocks.
    # Further ones that do as well, as for towers called text and vision, come after it.
    saved = _modules(matrices)
    prefixes = {
        (name.removesuffix(path), "") if _ends_with(name, path) else ("", path.removesuffix(name))
        for name in saved
        for path in linears
        if _ends_with(name, path) or _ends_with(path, name)
    }

    def fits(name: str, path: str) -> bool:
        a, b = (matrices.get(f"{PREFIX}{saved[name]}.lora_{which}.weight") for which in "AB")
        sizes = None if a is None or b is None else (*a.shape[1:], *b.shape[:1])
        return sizes == features(linears[path])

    scores = {}
    for prefix in sorted(prefixes, key=lambda pair: (len(pair[0] + pair[1]), pair)):
        placed = _paths(saved, prefix, linears)
        scores[prefix] = (sum(fits(*place) for place in placed.items()), len(placed))
    first = max(scores, key=lambda prefix: scores[prefix], default=("", ""))
    fitting = [prefix for prefix, score in scores.items() if score == scores[first] and score[0]]
    return [first, *(each for each in fitting if not all(map(str.startswith, each, first)))]


def _left_out(folder: Path, name: str, stages: Sequence[Stage], choice: str | None) -> TensLoRAError:
    choice = choice or f"adapt={stages[0].geometry.adapt}"
    return TensLoRAError(
        f"{folder}: adapts {name}, which the choice of {choice} leaves out; choose it too, or train the LoRA without it"
    )


def _ends_with(path: str, end: str) -> bool:
    return f".{path}".endswith(f".{end}")


def _products(
    config: SavedLora, matrices: Mapping[str, Tensor], found: Mapping[str, TargetLinear]
) -> dict[str, Tensor]:
    # The update of each module by its path, (inputs, outputs). PEFT's patterns know a parameter by its own path, and
    # PEFT takes its second dimension for the inputs, which is the outputs in a Conv1D.
    parameters = {
        name: path
        for name in found
        if any(_ends_with(path := f"{name}.weight", each) for each in config.target_parameters or ())
    }
    names = {name: parameters.get(name, name) for name in found}
    ranks, scalings = config.ranks([*names.values()]), config.scalings([*names.values()])
    turned = {name for name in parameters if is_conv1d(found[name].linear)}
    keys = {name: [f"{PREFIX}{name}.lora_{which}.weight" for which in "AB"] for name in found}
    shapes: dict[str, tuple[int, int]] = {}
    for name, target in found.items():
        columns, rows = reversed(features(target.linear)) if name in turned else features(target.linear)
        rank = ranks[names[name]]
        shapes |= zip(keys[name], [(rank, columns), (rows, rank)], strict=True)
    require_tensors(matrices, shapes)
    products = {}
    for name, (a, b) in keys.items():
        product = matrices[b].float() @ matrices[a].float()
        products[name] = (product if name in turned else product.T) * scalings[names[name]]
        require_finite(f"the update of {name}", products[name])
    return products
