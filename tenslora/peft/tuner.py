"""TensLoRA as a method of PEFT: `get_peft_model(model, TensLoraConfig(...))`.

PEFT wraps each adapted Linear in a tuner layer, and this tuner's layers only say which updates are active. The updates
themselves come from the same `LayerUpdate` and `Adapter` as in `attachment.attach`. An adapter's tensors belong to
all layers at once, so they are submodules of the tuner, as the shared matrices of VeRA are.
"""

from __future__ import annotations

import copy
import dataclasses
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, suppress
from typing import Any, ClassVar, NoReturn, cast, get_type_hints

import numpy as np
import peft
import torch
from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    check_adapters_to_merge,
    check_target_module_exists,
    onload_layer,
)
from peft.utils import register_peft_method
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import Tensor, nn

from tenslora.adapted_linear import NO_NUMBERS, LayerUpdate, add_updates
from tenslora.adapter import Adapter, StagedAdapter, make_adapter
from tenslora.adapter_config import AdapterConfig
from tenslora.attachment import (
    copied_adapters,
    device_of,
    keep_gradients,
    layer_updates,
    missing_matrices,
    not_compiled,
    peft_undone_on_error,
    require_apart,
    require_called,
    require_finite_sum,
    require_in_order,
    require_no_other_adapter,
    require_own_weights,
    require_stored_weight,
)
from tenslora.constructions import Geometry, adapted_matrices
from tenslora.errors import TensLoRAError
from tenslora.files import require_finite, require_tensors
from tenslora.forms import from_json, typed
from tenslora.forward_pass import ForwardPass, listed
from tenslora.peft.patterns import LONGEST, first_matches
from tenslora.peft.quantised import QuantisedWeights, warn_of_rounding
from tenslora.projections import (
    Stage,
    TargetLinear,
    features,
    find_projections,
    is_conv1d,
    is_linear,
    is_plain,
    require_weights_of_their_own,
)
from tenslora.ranks import RankStrategy, explicit
from tenslora.tensor_update import TensorUpdate

METHOD = "tenslora"
"""The method's name in PEFT. In adapter_config.json it is written in capitals, as `peft_type`."""

_ADAPTERS = f"{METHOD}_adapters"

# The names that PEFT adds to modules_to_save for a task, of which a model need not have all.
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}

# For these tasks it adds them to the user's settings after the tuner has been made, and expects to find them in the
# tuner's.
_HEAD_NAMED_LATER = ("TOKEN_CLS", "QUESTION_ANS")

# Of an adapter's settings, what may differ from those that it was made with: its ranks may have been pruned, and PEFT
# adds the names of a head.
_MAY_CHANGE = ("ranks", "modules_to_save")


def register() -> None:
    """Make PEFT know the method.

    PEFT takes only methods that its enumeration `PeftType` names, and it has no function that adds a name. An
    enumeration keeps its members in three dicts, by name, by value and in order; the new member is put there as Python
    itself would put it. Nothing else in PEFT is touched: `register_peft_method` does the rest.

    Raises:
        TensLoRAError: if this version of PEFT, or of Python, keeps its methods in some other way.
    """
    name = METHOD.upper()
    if name in PeftType.__members__:  # a notebook has imported the package anew, with new classes
        PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(name)] = TensLoraConfig
        PEFT_TYPE_TO_TUNER_MAPPING[PeftType(name)] = TensLoraModel
        return
    if not hasattr(BaseTuner, "_remove_adapter_name_from_key"):
        raise TensLoRAError(f"peft {peft.__version__}: must be 0.21 or later for a TensLoraConfig")
    try:
        member = str.__new__(PeftType, name)
        member._name_, member._value_ = name, name
        member._sort_order_ = len(PeftType)
        member.__objclass__ = PeftType
        PeftType._member_map_[name] = PeftType._value2member_map_[name] = member
        PeftType._member_names_.append(name)
        type.__setattr__(PeftType, name, member)
        if PeftType(name) is not member or member not in list(PeftType):
            raise AttributeError(f"PeftType has no {name}")
        register_peft_method(name=METHOD, config_cls=TensLoraConfig, model_cls=TensLoraModel)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise TensLoRAError(
            f"peft {peft.__version__}: cannot be extended with a method of its own here ({error}); tenslora.attach "
            f"needs no PEFT"
        ) from error


@dataclasses.dataclass
class TensLoraConfig(PeftConfig):  # type: ignore[misc]
    """The settings of a TensLoRA adapter in PEFT.

    They are those of `AdapterConfig`, with the fields of a rank strategy beside them, and PEFT's own for the choice of
    modules.

    Args:
        tensor_mode: the construction, one of `constructions.CONSTRUCTIONS`.
        rank_strategy: "isoparameters" or "isorank", see `ranks.RankStrategy`.
        r: for isorank, the rank; for isoparameters, the LoRA rank whose number of parameters is matched.
        ranks: the rank of each mode, or for a model of several stages a list of them for each stage; None lets
            rank_strategy choose. The ranks that isoparameters has chosen are saved here, so that a saved adapter does
            not depend on the rule that chose them. Set them and first_step to None before the settings of a saved
            adapter make one for another model.
        rank_options: further fields of `ranks.RankStrategy`, such as {"rule": "uniform"}.
        alpha: multiplies the update; unlike lora_alpha, it is not divided by the rank.
        scaling: "direct", or "first_step" to give the adapter the first step of LoRA at rank r.
        adapt: the matrices to adapt: letters of "qkvo", "mlp", or "all"; None means "qkv", or those that target_modules
            matches.
        factorization: "tucker", "cp", "tensor_train" or "tensor_guide".
        init: how the factors start.
        head_layout: "aligned" or "interleaved".
        tensor_seeds: "distinct" or "equal".
        seed: the seed of the tensors' random streams.
        dropout: the probability that an entry of the adapter's input is zeroed in training.
        rank_dropout: the probability that a component of h = x @ left is zeroed in a training step.
        target_modules: names or a regular expression, as in LoraConfig; None adapts all layers.
        exclude_modules: names or a regular expression of modules to leave out, as in LoraConfig.
        layers_to_transform: the indices of the layers to adapt, as in LoraConfig. PEFT reads the first number in a
            module's path; in Swin that is the stage's index.
        layers_pattern: the name of the list that the index counts, as in LoraConfig. In Swin "blocks" counts the layers
            of every stage.
        modules_to_save: modules that are trained and saved beside the adapter, such as a new head.
        first_step: written when the adapter is made: the first step with a scale of 1, see `Adapter`; for a model of
            several stages, that of each stage.

    Raises:
        TensLoRAError: for a value that is out of range; the message names the field, its value and what is valid.
    """

    tensor_mode: str = "qkv_depth"
    rank_strategy: str = "isoparameters"
    r: int = 4
    ranks: Sequence[int | Sequence[int]] | None = None
    rank_options: dict[str, Any] | None = None
    alpha: float = 4.0
    scaling: str = "direct"
    adapt: str | None = None
    factorization: str = "tucker"
    init: str = "orthogonal"
    head_layout: str = "aligned"
    tensor_seeds: str = "distinct"
    seed: int = 0
    dropout: float = 0.0
    rank_dropout: float = 0.0
    target_modules: Sequence[str] | Set[str] | str | None = None
    exclude_modules: Sequence[str] | Set[str] | str | None = None
    layers_to_transform: Sequence[int] | int | None = None
    layers_pattern: Sequence[str] | str | None = None
    modules_to_save: Sequence[str] | None = None
    first_step: float | list[float] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType[METHOD.upper()]
        self.made_for: list[Geometry] | None = None  # no field, so it is not saved
        types = get_type_hints(TensLoraConfig)
        for name in vars(TensLoraConfig)["__annotations__"]:
            value = _of_python(getattr(self, name))
            setattr(self, name, value)
            if name != "rank_options":  # whose values the rank strategy knows
                typed(types[name], value, name)
        if str(self.target_modules).lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
            raise TensLoRAError(
                f"target_modules={self.target_modules}: must be names or a regular expression of attention projections "
                f"and feed-forward blocks; without it, adapt=all adapts all of these"
            )
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))  # PEFT saves a set as a sorted list
        if self.layers_pattern and self.layers_to_transform is None:
            raise TensLoRAError(f"layers_pattern={self.layers_pattern}: needs layers_to_transform beside it")
        for step in self.first_step if isinstance(self.first_step, list) else [self.first_step]:
            if step is not None and step <= 0:
                raise TensLoRAError(f"first_step={step}: must be above 0")
        self.adapter_config("qkv" if self.adapt is None else self.adapt)

    def __setattr__(self, name: str, value: Any) -> None:
        # The constructor, which sets each for the first time, takes what a saved adapter has.
        if name in ("r", "rank_strategy", "rank_options") and {name, "ranks"} <= vars(self).keys():
            before = getattr(self, name)
            if self.ranks is not None and _of_python(value) != _of_python(before) and value != "explicit":
                raise TensLoRAError(
                    f"{name}={value}: would have no effect beside ranks={self.ranks}, which were chosen for "
                    f"{name}={before}; set ranks and first_step to None before"
                )
        super().__setattr__(name, value)

    def adapter_config(self, adapt: str) -> AdapterConfig:
        """The library's settings.

        Args:
            adapt: the matrices that are adapted.

        Raises:
            TensLoRAError: for a value that is out of range.
        """
        own = {field.name for field in dataclasses.fields(AdapterConfig)} - {"rank_strategy", "adapt"}
        options = self.rank_options or {}
        known = sorted({field.name for field in dataclasses.fields(RankStrategy)} - {"name", "rank", "ranks"})
        for name in options if isinstance(options, dict) else [options]:
            if name not in known:
                raise TensLoRAError(f"rank_options={name}: must be one of {', '.join(known)}")
        with _in_own_names():
            strategy = from_json(RankStrategy, {"name": self.rank_strategy, "rank": self.r, **options})
        if self.ranks is not None and not self._ranks_of_stages():
            strategy = dataclasses.replace(strategy, name="explicit", ranks=tuple(cast(list[int], self.ranks)))
        elif strategy.name == "explicit":
            raise TensLoRAError("ranks=None: must be the rank of each mode with rank_strategy=explicit")
        return AdapterConfig(rank_strategy=strategy, adapt=adapt, **{name: getattr(self, name) for name in own})

    def _ranks_of_stages(self) -> list[list[int]]:
        # The ranks of each stage, where they are given for each; otherwise an empty list.
        lists = [each for each in self.ranks or [] if isinstance(each, list)]
        if lists and len(lists) < len(self.ranks or []):
            raise TensLoRAError(f"ranks={self.ranks}: must be one rank for each mode, or a list of them for each stage")
        return lists

    def ranks_of(self, adapter: Adapter | StagedAdapter) -> list[list[int]]:
        """The ranks that these settings give each stage of an adapter which has been made from them.

        Args:
            adapter: the adapter, whose ranks may have been pruned since.
        """
        made = adapter.config
        if self.ranks is not None:
            return self._ranks_of_stages() or [cast(list[int], self.ranks)]
        geometries = [stage.geometry for stage in adapter.stages]
        return [list(made.rank_strategy.resolve(made.tensor_mode, each, made.factorization)) for each in geometries]

    def make_adapter(self, geometries: Sequence[Geometry]) -> Adapter | StagedAdapter:
        """Make the adapter of a model.

        Args:
            geometries: the dimensions of the model's stages.

        Raises:
            TensLoRAError: for settings that do not fit them.
        """
        config, stages = self.adapter_config(geometries[0].adapt), len(geometries)
        ranks: list[list[int]] | None = self._ranks_of_stages() or None
        steps = self.first_step if isinstance(self.first_step, list) else [self.first_step] * stages
        for name, given in (("ranks", ranks or geometries), ("first_step", steps)):
            if len(given) != stages:
                raise TensLoRAError(
                    f"{name}={getattr(self, name)}: has {len(given)} entries; must have {stages}, one for each "
                    f"stage of the model"
                )
        for geometry, of_stage in zip(geometries, ranks or [], strict=False):
            explicit(config.tensor_mode, geometry, of_stage, config.factorization)
        with _in_own_names():
            return make_adapter(config, geometries, ranks, steps)


@contextmanager
def _in_own_names() -> Iterator[None]:
    # An error of `RankStrategy` names its fields, which are called something else here.
    try:
        yield
    except TensLoRAError as error:
        line = re.sub(r"^(rank|name)=", lambda field: {"rank": "r=", "name": "rank_strategy="}[field[1]], str(error))
        raise TensLoRAError(line) from error


def _of_python(value: Any) -> Any:
    # What Hydra, numpy, torch and Python have for lists and numbers, as the lists and numbers that JSON can hold.
    if isinstance(value, (np.generic, np.ndarray, Tensor)):
        return value.tolist()
    if isinstance(value, Mapping):
        return {key: _of_python(each) for key, each in value.items()}
    if isinstance(value, (Sequence, Set)) and not isinstance(value, (str, bytes)):
        return [_of_python(each) for each in value]
    return value


class TensLoraLinear(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """An adapted Linear in a PEFT model.

    Args:
        base_layer: the Linear (or Conv1D) itself.
        adapters: the adapters of the whole model by name; they are the tuner's submodules, and not this layer's.
        model: the whole model, which knows how it was quantised.
    """

    has_tenslora_adapter = True  # which adapt_tensor looks for, here and at the layer below
    adapter_layer_names = (_ADAPTERS,)
    other_param_names = ("updates",)
    active_adapters: Sequence[str]  # this and the next are BaseTunerLayer's
    get_base_layer: Callable[[], nn.Module]

    def __init__(self, base_layer: nn.Module, adapters: nn.ModuleDict, model: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.updates: dict[str, LayerUpdate] = {}
        self._adapters, self._model = (adapters,), (model,)  # in tuples, so that they are no submodules of every layer
        self.merged_adapters: list[str] = []
        self.rounding: list[tuple[float, float]] = []  # of a quantised weight, until the tuner has told of it

    @property
    def tenslora_adapters(self) -> nn.ModuleDict:
        """The adapters of the whole model, by name."""
        return self._adapters[0]

    # Models and other methods of PEFT read these two, and PEFT's LoRA layers have them.
    @property
    def in_features(self) -> int:
        """The number of the Linear's inputs."""
        return features(self.get_base_layer())[0]

    @property
    def out_features(self) -> int:
        """The number of the Linear's outputs."""
        return features(self.get_base_layer())[1]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The output of the Linear, with the updates of all active adapters added.

        Args:
            x: (..., inputs).
            *args: passed on to the Linear.
            **kwargs: likewise.

        Returns:
            (..., outputs).
        """
        for update in self.updates.values():
            update.call.called = True
        if self.disable_adapters and self.merged:
            self.unmerge()
        active = [self.updates[name] for name in self.active_adapters if name in self.updates]
        if self.disable_adapters or self.merged or not active:
            return cast(Tensor, self.base_layer(x, *args, **kwargs))
        return add_updates(self.base_layer, active, x, *args, **kwargs)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What an adapter adds to the Linear's weight, alpha dW, in the weight's own orientation.

        Args:
            adapter: the adapter's name.

        Returns:
            (outputs, inputs), or (inputs, outputs) for a Conv1D; zeros if the adapter is on other layers alone.

        Raises:
            TensLoRAError: if the model has no adapter of that name.
        """
        if adapter in self.updates:
            return self.updates[adapter].dense()
        _require_known("adapter_name", [adapter], self.tenslora_adapters)
        linear = self.get_base_layer()
        inputs, outputs = features(linear)
        shape = (inputs, outputs) if is_conv1d(linear) else (outputs, inputs)
        return next(self.tenslora_adapters[adapter].parameters()).new_zeros(shape)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the updates to the Linear's weight.

        Args:
            safe_merge: whether to check first that the weight gets no NaN and no infinity.
            adapter_names: the adapters whose updates to add; None for the active ones.

        Raises:
            ValueError: if safe_merge finds a NaN or an infinity; the weight is then as it was.
            TensLoRAError: if the weight is of a kind that cannot be quantised again.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.updates:
                self._add_to_weight(self.get_delta_weight(name), name if safe_merge else None)
                self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Subtract the merged updates from the Linear's weight again."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        while self.merged_adapters:
            self._add_to_weight(-self.get_delta_weight(self.merged_adapters[-1]))
            if (name := self.merged_adapters.pop()) in self.updates:
                self.updates[name].added = ()

    def quantised_weights(self) -> QuantisedWeights | None:
        """How updates are added to the Linear's weight, if it is quantised; None for a plain one.

        Raises:
            TensLoRAError: if they cannot be: the weight is computed from other tensors, or cannot be quantised again.
        """
        linear, path = self.get_base_layer(), next(iter(self.updates.values())).call.path
        if is_plain(linear):
            require_stored_weight(path, linear)
            return None
        try:
            return QuantisedWeights(linear, self._model[0])
        except TensLoRAError as error:
            raise TensLoRAError(f"{path}: {error}") from error

    def _add_to_weight(self, update: Tensor, checked: str | None = None) -> None:
        linear, quantised = self.get_base_layer(), self.quantised_weights()
        plain = cast(Tensor, linear.weight) if quantised is None else None
        if checked is not None and not torch.isfinite(update if plain is None else plain + update.to(plain)).all():
            raise ValueError(f"NaNs detected in the merged weights. The adapter {checked} seems to be broken")
        if plain is not None:
            plain.add_(update.to(plain))
        elif quantised is not None:
            self.rounding.append(quantised.add(linear, update))

    def _replicate_for_data_parallel(self) -> NoReturn:
        # The copies would share the adapters' tensors, which no copy has as its own, across devices.
        raise TensLoRAError("DataParallel: cannot copy an adapter; start one process per device instead (torchrun)")

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter from the layer, as `peft.functional.delete_adapter` does layer by layer.

        Args:
            adapter_name: its name.
        """
        if adapter_name in self.updates:
            self.updates[adapter_name].call.called = True  # the first forward pass need not call the layer any more
        super().delete_adapter(adapter_name)

    def supports_lora_conversion(self, *_: Any) -> bool:
        """Whether PEFT's `convert_to_lora` takes this layer: it does, for each of its adapters."""
        return True

    def __repr__(self) -> str:
        return f"TensLora({self.base_layer!r})"


class _SettingsOfAll(dict[str, PeftConfig]):
    """The settings by the adapter's name. A second method of PEFT on the same model writes its own into the same dict.

    Args:
        configs: the settings so far.
        adapters: the model's TensLoRA adapters by name.

    Raises:
        TensLoRAError: if the settings of one method would replace those of the other, if a name would keep tensors
            from being saved, or if PEFT would take an adapter for one of the modules to save.
    """

    adapters: Mapping[str, nn.Module] = {}  # until pickle has given them back

    def __init__(self, configs: Mapping[str, PeftConfig], adapters: Mapping[str, nn.Module]) -> None:
        super().__init__(configs)
        self.adapters = adapters

    def __setitem__(self, name: str, config: PeftConfig) -> None:
        _require_no_other_method(self, name, config)
        _require_names_apart(self.adapters, [name])
        _require_no_module_to_save(self.adapters, [config])
        super().__setitem__(name, config)

    def update(self, *args: Any, **kwargs: Any) -> None:
        for name, config in dict(*args, **kwargs).items():
            self[name] = config


def _require_known(setting: str, names: Collection[str], known: Iterable[str]) -> None:
    known = list(known)
    have = f"this model, which has {', '.join(known) or 'none'}"
    if not names:
        raise TensLoRAError(f"{setting}=[]: must name an adapter of {have}, or be None for the active ones")
    for name in names:
        if name not in known:
            raise TensLoRAError(f"{setting}={name}: is no adapter of {have}")


def _require_no_other_method(configs: Mapping[str, PeftConfig], name: str, config: PeftConfig) -> None:
    if name in configs and (kind := configs[name].peft_type) != config.peft_type:
        raise TensLoRAError(
            f"adapter_name={name}: is already the name of an adapter on this model, of the method "
            f"{PeftType(kind).value}, whose settings would be lost; give the new adapter another name"
        )


class TensLoraModel(BaseTuner):  # type: ignore[misc]
    """The tuner that `get_peft_model` puts around a model.

    Args:
        model: any Transformer in which `find_projections` finds the matrices to adapt.
        peft_config: the settings by the adapter's name.
        adapter_name: the adapter's name.
        low_cpu_mem_usage: as for PEFT's other tuners.
        state_dict: as for PEFT's other tuners.

    Raises:
        TensLoRAError: if the model has such an adapter already, or if the new one does not fit the model; see
            `attachment.attach`.
    """

    uses_shared_state = True
    prefix = f"{METHOD}_"
    tuner_layer_cls = TensLoraLinear
    peft_config: dict[str, PeftConfig]
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        # PEFT has warned, and would go on: the new adapter would take the places of the old one's updates.
        if any(isinstance(module, TensLoraLinear) for module in model.modules()):
            raise TensLoRAError(
                f"{type(model).__name__}: has a TensLoRA adapter in PEFT already; take it off first with unload, or "
                f"put another beside it with add_adapter or load_adapter, each of the PeftModel that it was made with, "
                f"or make the model anew"
            )
        own = peft_config if isinstance(peft_config, dict) else {adapter_name: peft_config}
        settings = getattr(model, "peft_config", {})
        if not isinstance(settings, Mapping):  # PEFT would add the new adapter's to them
            raise TensLoRAError(
                f"{type(model).__name__}: its attribute peft_config is of type {type(settings).__name__}; must be "
                f"PEFT's, or absent (a __getattr__ must raise AttributeError for a name that it does not know)"
            )
        for name, config in own.items():
            _require_no_other_method(settings, name, config)
        with peft_undone_on_error(model):
            super().__init__(model, peft_config, adapter_name, *args, **kwargs)

    def _pre_injection_hook(self, *_: Any) -> None:
        self.tenslora_adapters = nn.ModuleDict()
        self.peft_config = _SettingsOfAll(self.peft_config, self.tenslora_adapters)  # type: ignore[arg-type]
        self._forward_passes: dict[str, ForwardPass] = {}
        self._planned: dict[str, LayerUpdate] = {}
        self._declared: dict[str, TensLoraConfig] = {}  # the settings that each adapter was made with
        self.register_state_dict_pre_hook(_describe_adapters)
        self.register_load_state_dict_pre_hook(_require_adapters_tensors)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Make an adapter and put it on the model.

        Args:
            model: the model.
            adapter_name: the name of the adapter, whose settings are in `peft_config`.
            *args: as for PEFT's other tuners.
            **kwargs: likewise.

        Raises:
            TensLoRAError: if the adapter does not fit the model; see `attachment.attach`.
        """
        given = cast(TensLoraConfig, self.peft_config[adapter_name])
        if given.modules_to_save is None and given.task_type in _HEAD_NAMED_LATER:
            given.modules_to_save = []
        config = copy.copy(given)  # the user may have use for it again
        config.__post_init__()  # what was set after the constructor has its form only now
        if isinstance(given.modules_to_save, list):  # to which PEFT adds the head's name later
            config.modules_to_save = given.modules_to_save
        with _linears_in_place(self.model):
            stages = chosen_stages(self.model, config)
        adapted = [target.path for stage in stages for target in stage.targets]
        require_apart(config.modules_to_save or (), adapted, ", or leave this one out with exclude_modules")
        require_called(self.model, config.modules_to_save or ())
        geometries = [stage.geometry for stage in stages]
        adapter = config.make_adapter(geometries)
        _require_names_apart({**self.tenslora_adapters, adapter_name: adapter}, self.peft_config)
        _require_no_module_to_save({adapter_name: adapter}, self.peft_config.values())
        _warn_of_another_model(given, geometries)
        _warn_of_no_module(self.model, config)
        ranks, steps = ([getattr(each, name) for each in adapter.stages] for name in ("ranks", "unscaled_first_step"))
        if config.rank_strategy == "isoparameters":
            config.ranks = list(ranks[0]) if len(stages) == 1 else [list(each) for each in ranks]
        config.first_step, config.adapt = steps[0] if len(stages) == 1 else steps, adapter.config.adapt
        config.made_for = geometries
        if config.target_modules is None:
            config.target_modules = _names_of(self.model, set(adapted), config)
        self.peft_config[adapter_name] = config
        on_meta = any(parameter.is_meta for parameter in adapter.parameters())  # low_cpu_mem_usage; loading fills them
        for of_stage, (_, targets) in zip(adapter.stages, stages, strict=True):
            weight = cast(Tensor, targets[0].linear.weight)
            device = torch.device("meta") if on_meta else device_of(targets[0].linear)
            # Types of 8 bits and fewer only store a weight: torch does not compute in them.
            of_stage.to(device, weight.dtype if weight.is_floating_point() and weight.dtype.itemsize > 1 else None)
        kinds = {
            TensorUpdate: "updates of adapt_tensor, which PEFT freezes and does not save with its adapter; train them "
            "on with requires_grad_(True), and keep them with save_tensors",
            Adapter: "an adapter of attach, which PEFT freezes and does not save with its own; train it on with "
            "requires_grad_(True), and keep it with save_pretrained",
        }
        for kind, what in kinds.items():
            if any(isinstance(part, kind) and next(part.parameters()).requires_grad for part in model.modules()):
                warnings.warn(f"{type(model).__name__}: has {what}", stacklevel=2)
        keep_gradients(model)
        forward_pass = ForwardPass(model)
        # PEFT keeps this for the parameters of an adapter that are in the model's layers.
        requiring = [(each, each.requires_grad) for each in self.tenslora_adapters.parameters()]
        self._planned = layer_updates(adapter, stages, forward_pass)
        self._forward_passes[adapter_name] = forward_pass
        try:
            self.tenslora_adapters[adapter_name] = adapter
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            forward_pass.put_hooks(model)
            self._declared[adapter_name] = copy.deepcopy(config)
        except BaseException:
            self._forget(adapter_name)
            raise
        finally:
            self._planned = {}
            for parameter, requires_grad in requiring:
                parameter.requires_grad = requires_grad

    def stages(self, adapter_name: str) -> list[Stage]:
        """The stages of the matrices that an adapter adapts, see `find_projections`.

        Args:
            adapter_name: the adapter's name.
        """
        with _linears_in_place(self.model):
            return chosen_stages(self.model, cast(TensLoraConfig, self.peft_config[adapter_name]))

    def _prepare_adapter_config(self, peft_config: PeftConfig, *_: Any) -> PeftConfig:
        return peft_config  # PEFT would choose target_modules by the model's type

    def _check_target_module_exists(self, peft_config: PeftConfig, key: str) -> bool:
        if key in self._planned:
            return True
        if not self._planned:  # PEFT's inspect_matched_modules asks once the adapter is on
            layer = self.model.get_submodule(key)
            name = next((name for name, own in self.peft_config.items() if own is peft_config), "")
            return isinstance(layer, TensLoraLinear) and name in layer.updates
        # PEFT counts the modules that were excluded, and warns if there are none.
        return cast(
            bool, bool(peft_config.exclude_modules) and check_target_module_exists(_named(peft_config, ()), key)
        )

    def _create_and_replace(
        self,
        _: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **__: Any,
    ) -> None:
        if not isinstance(target, TensLoraLinear):
            layer = TensLoraLinear(target, self.tenslora_adapters, self.model)
            layer.train(target.training)
            self._replace_module(parent, target_name, layer, target)
            target = layer
        target.updates[adapter_name] = self._planned[current_key]

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, _: nn.Module) -> None:
        # PEFT's own asks every module for a weight, and a head of several layers that was trained too has none.
        setattr(parent, child_name, new_module)
        if isinstance(new_module, TensLoraLinear):
            new_module.base_layer.has_tenslora_adapter = True  # type: ignore[assignment]
        else:
            vars(new_module).pop("has_tenslora_adapter", None)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # A PeftModel of another method around this one passes the call on for its own adapters, too.
        if not autocast_adapter_dtype or adapter_name not in self.tenslora_adapters:
            return
        adapter = self.tenslora_adapters[adapter_name]
        if next(adapter.parameters()).dtype in (torch.float16, torch.bfloat16):
            adapter.float()

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter.

        Args:
            adapter_name: its name.
        """
        super().delete_adapter(adapter_name)
        self._forget(adapter_name)

    def _forget(self, adapter_name: str) -> None:
        self._forward_passes.pop(adapter_name).remove_hooks()
        self._declared.pop(adapter_name, None)
        if adapter_name in self.tenslora_adapters:
            del self.tenslora_adapters[adapter_name]

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Add the updates to the weights, as PEFT's other tuners do; a warning tells of the rounding of quantised ones.

        Args:
            adapter_names: as for PEFT's other tuners.
            safe_merge: likewise.

        Raises:
            TensLoRAError: if the model has no adapter of one of the names, or if a weight is of a kind that cannot be
                quantised again, is another module's too, or would hold a NaN or an infinity with its update. No weight
                is changed then.
        """
        self._require_mergeable(adapter_names)
        self._check_merge_allowed()
        with self._rounding_told():
            _merge(_innermost_first(self.model), adapter_names, safe_merge)
        layers = [module for module in self.model.modules() if isinstance(module, TensLoraLinear)]
        updates = [layer.updates[name] for layer in layers for name in layer.merged_adapters if name in layer.updates]
        new = [update for update in updates if not update.merged]
        with suppress(TensLoRAError):  # without a copy, unmerge subtracts the update that the adapter has then
            copies = copied_adapters(new)
            for update in new:
                update.added = (copies[id(update)],)

    @torch.no_grad()
    def _require_mergeable(self, adapter_names: list[str] | None) -> None:
        # Every layer is looked at before the first weight is changed.
        if adapter_names is not None and not isinstance(adapter_names, str):  # PEFT says what is wrong with a text
            _require_known("adapter_names", adapter_names, self.peft_config)
        weights: dict[str, Tensor] = {}
        for layer in (module for module in self.model.modules() if isinstance(module, TensLoraLinear)):
            wanted = layer.active_adapters if adapter_names is None else adapter_names
            names = [name for name in wanted if name in layer.updates and name not in layer.merged_adapters]
            if not names:  # the layer's adapter may have been deleted, too
                continue
            linear, quantised = layer.get_base_layer(), layer.quantised_weights()
            on_meta = any(own.is_meta for name in names for own in layer.tenslora_adapters[name].parameters())
            if on_meta and device_of(linear).type != "meta":
                raise TensLoRAError(NO_NUMBERS)
            path, (first, *others) = layer.updates[names[0]].call.path, map(layer.get_delta_weight, names)
            if quantised is None:
                weights[path] = cast(Tensor, linear.weight)
                require_finite_sum(path, weights[path], sum(others, first))
            else:
                quantised.require_finite_sum(path, linear, sum(others, first))
        require_own_weights(self.model, weights)

    def unmerge_adapter(self) -> None:
        """Subtract from the weights what `merge_adapter` added, also where the adapter was changed in between."""
        with self._rounding_told():
            super().unmerge_adapter()

    @contextmanager
    def _rounding_told(self) -> Iterator[None]:
        layers = [module for module in self.model.modules() if isinstance(module, TensLoraLinear)]
        yield
        warn_of_rounding(self.model, [change for layer in layers for change in layer.rounding])
        for layer in layers:
            layer.rounding.clear()

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        with self._rounding_told():
            if merge:
                self._require_mergeable(adapter_names)
                # PEFT merges the outermost layers alone, and drops those below them.
                layers = _innermost_first(self.model)
                below = {part for layer in layers for part in layer.modules() if part is not layer}
                _merge([layer for layer in layers if layer in below], adapter_names, safe_merge)
            model = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        for forward_pass in self._forward_passes.values():
            forward_pass.remove_hooks()
        return cast(nn.Module, model)

    @contextmanager
    def _enable_peft_forward_hooks(self, *_: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise ValueError("TensLoRA does not support adapter_names: its tensors belong to all samples at once.")
        yield

    def add_weighted_adapter(self, *_: Any, **__: Any) -> None:
        """Not supported: a sum of factorised tensors is no tensor of the same ranks.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "TensLoRA does not support add_weighted_adapter; base_model.set_adapter takes several."
        )

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        # PEFT saves what it finds. A PeftModel around the inner model alone knows the adapter's settings, and has none
        # of its tensors. A process that is not to save has an empty state dict.
        own: dict[str, Tensor] = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, *args, **kwargs
        )
        parts = [part for part in model.modules() if isinstance(part, (TensLoraModel, TensLoraLinear))]
        adapter = next(
            (each.tenslora_adapters[adapter_name] for each in parts if adapter_name in each.tenslora_adapters), None
        )
        if adapter is not None:  # without the buffers that a profiler adds to every module
            names = tuple(cast(Adapter | StagedAdapter, adapter).tensor_names())
            own = {key: tensor for key, tensor in own.items() if f"{_ADAPTERS}." not in key or key.endswith(names)}
        count = 1 if adapter is None else len(list(adapter.parameters()))
        found = sum(f"{_ADAPTERS}." in key for key in own)
        if state_dict and found < count:
            raise TensLoRAError(
                f"{type(model).__name__}: has {found} of the {count} tensors of the adapter {adapter_name}, and PEFT "
                f"would save it without the others; save it by the PeftModel that it was made with, and the others "
                f"with selected_adapters"
            )
        for key, tensor in own.items():
            if f"{_ADAPTERS}." in key and not tensor.is_meta:
                require_finite(f"cannot be saved: {key}", tensor)
        return own

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        remapped: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        # PEFT passes on the keys that it does not know, and load_state_dict would leave the adapter as it was.
        # FullyShardedDataParallel leaves its own part out of a state dict's keys. accelerate gives an empty state dict
        # to each process but the first.
        in_group = torch.distributed.is_available() and torch.distributed.is_initialized()
        is_first = not in_group or torch.distributed.get_rank() == 0
        parts = {path.replace("_fsdp_wrapped_module.", ""): part for path, part in model.named_modules()}
        own = {path: part for path, part in parts.items() if path.endswith(f"{_ADAPTERS}.{adapter_name}")}
        if not own:
            raise TensLoRAError(
                f"{type(model).__name__}: has no tensors of the adapter {adapter_name}; load it into the PeftModel "
                f"that it was made with"
            )
        if (state_dict or is_first) and not any(key.startswith(tuple(f"{path}." for path in own)) for key in remapped):
            path, adapter = next(iter(own.items()))
            wanted = f"{path.removesuffix(adapter_name)}{cast(Adapter | StagedAdapter, adapter).tensor_names()[0]}"
            found = min(state_dict, key=lambda key: f"{_ADAPTERS}." not in key, default="nothing")
            raise TensLoRAError(
                f"{_ADAPTERS}.{adapter_name}: the saved adapter does not fit: has none of its tensors, such as "
                f"{wanted}, but {found}"
            )
        return remapped

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        before, found, after = key.partition(f"{_ADAPTERS}.{adapter_name}.")
        if found:
            return f"{before}{_ADAPTERS}.{after}"
        return str(super()._remove_adapter_name_from_key(key, adapter_name))


def _innermost_first(model: nn.Module) -> list[nn.Module]:
    # The layers of every method of PEFT. One that lies around another may multiply the other's weight, and must then
    # find the other's update in it. PEFT unmerges the outermost first.
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)][::-1]


def _merge(layers: Iterable[Any], adapter_names: list[str] | None, safe_merge: bool) -> None:
    for layer in layers:
        with onload_layer(layer):
            layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)


def chosen_stages(model: nn.Module, config: TensLoraConfig) -> list[Stage]:
    """The stages of the matrices that an adapter with some settings adapts, see `find_projections`.

    Args:
        model: the model, with its own Linear layers.
        config: the settings.

    Raises:
        TensLoRAError: if they leave nothing to adapt, if their patterns cannot be matched, or if a layer has another
            adapter.
    """
    _require_timely_patterns(config, [path for path, _ in model.named_modules()])
    stages = _chosen(model, config)
    require_no_other_adapter(stages)
    return stages


def _require_timely_patterns(config: TensLoraConfig, paths: Sequence[str]) -> None:
    # PEFT matches these by itself, for as long as it takes.
    for name in ("target_modules", "exclude_modules"):
        if isinstance(pattern := getattr(config, name), str):
            _first_matches(name, [pattern], paths, "{}")
    layers = config.layers_pattern or []
    _first_matches("layers_pattern", [layers] if isinstance(layers, str) else layers, paths, r".*\.{}\.(\d+)\..*")


def _warn_of_another_model(config: TensLoraConfig, geometries: Sequence[Geometry]) -> None:
    # Whoever has set first_step to None knows of it.
    if config.first_step is not None and config.made_for not in (None, geometries):
        kept = [f"{name}={value}" for name in ("ranks", "first_step") if (value := getattr(config, name)) is not None]
        warnings.warn(
            f"{', '.join(kept)}: taken over from an adapter of a model of other dimensions; set ranks and first_step "
            f"to None to have them chosen for this one",
            stacklevel=2,
        )


def _warn_of_no_module(model: nn.Module, config: TensLoraConfig) -> None:
    paths = [path for path, _ in model.named_modules(remove_duplicate=False)]
    for name in config.modules_to_save or ():
        if name not in _HEADS.get(config.task_type, ()) and not any(path.endswith(name) for path in paths):
            warnings.warn(
                f"modules_to_save={name}: is the end of no module's path in {type(model).__name__}, so PEFT trains and "
                f"saves none for it",
                stacklevel=2,
            )


def _first_matches(setting: str, patterns: Sequence[str], paths: Sequence[str], form: str) -> None:
    try:
        first_matches(patterns, paths, form)
    except TensLoRAError as error:
        raise TensLoRAError(f"{setting}={error}") from error


def _require_adapters_tensors(tuner: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    # PEFT would copy whatever a file holds, and take no notice of what it lacks. A file of another adapter holds
    # nothing for this one. The tuner's parts are loaded after this, the modules to save among them.
    for path, layer in tuner.named_modules():
        if isinstance(layer, TensLoraLinear) and f"{prefix}{path}.base_layer.weight" in state:
            for update in layer.updates.values():  # a merged model's weight holds the update that comes with it
                update.added = ()
    for name, adapter in cast(nn.ModuleDict, tuner.tenslora_adapters).items():
        path = f"{prefix}{_ADAPTERS}.{name}"
        own = {key.removeprefix(f"{path}."): tensor for key, tensor in state.items() if key.startswith(f"{path}.")}
        if own:
            # PEFT gives the adapter's name to the tensors for which the adapter has a place, and to no others.
            of_all = f"{prefix}{_ADAPTERS}."
            parts = tuple({f"{of_all}{key.partition('.')[0]}." for key in adapter.state_dict()})
            own |= {key.removeprefix(of_all): tensor for key, tensor in state.items() if key.startswith(parts)}
            try:
                require_tensors(own, {key: tensor.shape for key, tensor in adapter.state_dict().items()})
            except TensLoRAError as error:
                raise TensLoRAError(f"{path}: the saved adapter does not fit: {error}") from error


def _require_names_apart(adapters: Mapping[str, nn.Module], names: Iterable[str]) -> None:
    # Of an adapter, PEFT saves nothing whose name in the state dict has another adapter's name in it.
    for name, adapter in adapters.items():
        for key in adapter.state_dict():
            for other in {_ADAPTERS, *key.split(".")}.intersection(names) - {name}:
                raise TensLoRAError(
                    f"adapter_name={other}: is a part of {_ADAPTERS}.{name}.{key}, which PEFT would then not save with "
                    f"the adapter {name}; give the adapters other names"
                )


def _require_no_module_to_save(adapters: Mapping[str, nn.Module], configs: Iterable[PeftConfig]) -> None:
    # PEFT finds the modules to save by the ends of their paths, in the tuner too. It would train a copy of the adapter.
    to_save = [
        to_save
        for config in configs
        for to_save in (*(getattr(config, "modules_to_save", None) or ()), *_HEADS.get(config.task_type, ()))
    ]
    for name, adapter in adapters.items():
        for path, _ in adapter.named_modules(prefix=f"{_ADAPTERS}.{name}"):
            for module in to_save:
                if path.endswith(module):
                    raise TensLoRAError(
                        f"adapter_name={name}: {path} ends in {module}, and PEFT would take it for the module {module} "
                        f"of modules_to_save; give the adapter another name, or write more of the module's path"
                    )


def _own_layers(tuner: nn.Module) -> dict[str, TensLoraLinear]:
    layers = {path: layer for path, layer in tuner.named_modules() if isinstance(layer, TensLoraLinear)}
    own = next(cast(nn.ModuleDict, tuner.tenslora_adapters).parameters(), None)
    for path, layer in layers.items():
        if layer.tenslora_adapters is tuner.tenslora_adapters:
            continue
        if any(parameter is own for parameter in layer.tenslora_adapters.parameters()):  # the tuner itself is a copy
            model = type(not_compiled(cast(nn.Module, tuner.model))).__name__
            raise TensLoRAError(
                f"{model}: is compiled in regions, as by accelerate's compile_regions, and PEFT "
                f"would save the names of the compiled copy; save the model that was compiled"
            )
        raise TensLoRAError(
            f"{path}: is a copy of an adapted layer, and its update does not belong to the model's adapter; copy a "
            f"part of a model before get_peft_model, or after merge_and_unload"
        )
    return layers


def _describe_adapters(tuner: nn.Module, *_: Any) -> None:
    # PEFT asks for the state dict before it saves tensors and settings. Ranks may have been pruned; what else differs
    # cannot be saved.
    layers = _own_layers(tuner)
    for name, adapter in cast(nn.ModuleDict, tuner.tenslora_adapters).items():
        adapter = cast(Adapter | StagedAdapter, adapter)
        config = cast(dict[str, TensLoraConfig], tuner.peft_config).get(name)
        if config is None:  # whose tensors PEFT would save with those of another one
            raise TensLoRAError(
                f"peft_config: has no settings of the adapter {name}, which is on the model; give them back, and take "
                f"it off with delete_adapter"
            )
        adapter.require_as_declared()
        if made := cast(dict[str, TensLoraConfig], tuner._declared).get(name):  # None while it is put on
            _require_settings(config, made)
            updates = {path: layer.updates[name] for path, layer in layers.items() if name in layer.updates}
            # None are left after unload, and the adapter is saved all the same.
            if updates and (missing := missing_matrices(adapter, updates.values())):
                raise TensLoRAError(
                    f"{type(tuner.model).__name__}: {missing} of the matrices of the adapter {name} are no longer in "
                    f"the model, and no model could be given the adapter again; put the layers back"
                )
            require_in_order(updates)
        if (ranks := [list(stage.ranks) for stage in adapter.stages]) != config.ranks_of(adapter):
            config.ranks = [*(ranks[0] if len(ranks) == 1 else ranks)]


def _require_settings(config: TensLoraConfig, made: TensLoraConfig) -> None:
    now = copy.copy(config)
    now.__post_init__()  # which checks each value, and lets a list stand for a set
    for name in vars(TensLoraConfig)["__annotations__"]:
        if name not in _MAY_CHANGE and (value := getattr(now, name)) != (before := getattr(made, name)):
            raise TensLoRAError(
                f"{name}={_shown(value)}: was set after the adapter had been made with {name}={_shown(before)}, and "
                f"has no effect on it; set it back, or make an adapter with it"
            )


def choice(config: TensLoraConfig) -> str:
    """The settings that choose the matrices and layers to adapt, with their values, for a message.

    Args:
        config: the settings.
    """
    patterns = _patterns(config)
    by_letters = [] if config.target_modules is not None and not config.adapt else [f"adapt={config.adapt or 'qkv'}"]
    return ", ".join([*by_letters, *([patterns] if patterns else [])])


def _patterns(config: TensLoraConfig) -> str:
    names = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
    settings = {name: getattr(config, name) for name in names}
    # In PEFT an empty target_modules leaves nothing, and the others have no effect if they are empty.
    given = {
        name: value
        for name, value in settings.items()
        if value or value == 0 or (name == "target_modules" and value is not None)
    }
    return ", ".join(f"{name}={_shown(value)}" for name, value in given.items())


def _shown(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else value


def _chosen(model: nn.Module, config: TensLoraConfig) -> list[Stage]:
    # The matrices that adapt, target_modules, exclude_modules and layers_to_transform leave, in the layers that they
    # leave. PEFT's own function matches the names.
    stages = _widest(model, config)
    if not (shown := _patterns(config)):
        require_weights_of_their_own(stages)
        return stages
    last_names = {_last_name(target) for stage in stages for target in stage.targets}
    matching = _named(config, last_names if config.target_modules is None else config.target_modules)
    layers: dict[int, list[str]] = {}
    gated = set()
    for geometry, targets in stages:
        for target in targets:
            if check_target_module_exists(matching, target.path):
                names = [geometry.matrices[target.group[columns.matrix]] for columns in target.columns]
                layers.setdefault(target.model_layer, []).extend(names)
                gated.add(geometry.gated)
    if not layers:
        raise TensLoRAError(
            f"{shown}: must leave some of the model's attention projections, such as {stages[0].targets[0].path}"
        )
    first = next(iter(layers))
    for layer, names in layers.items():
        if set(names) != set(layers[first]):
            raise TensLoRAError(
                f"{shown}: must leave the same matrices in every layer, but leave {', '.join(layers[first])} in layer "
                f"{first} and {', '.join(names)} in layer {layer}"
            )
    found = find_projections(model, _adapt_of(layers[first], gated), layers)
    _warn_of_others(model, config, {target.path for stage in found for target in stage.targets})
    return found


def _warn_of_others(model: nn.Module, config: TensLoraConfig, adapted: set[str]) -> None:
    if config.target_modules is None:
        return
    others = [
        path
        for path, module in model.named_modules()
        if is_linear(module) and path not in adapted and check_target_module_exists(config, path)
    ]
    if others:
        warnings.warn(
            f"target_modules also match {listed(others)}, which can have no adapter here: only attention projections "
            f"and feed-forward blocks that the library knows can have one",
            stacklevel=2,
        )


def _names_of(model: nn.Module, adapted: set[str], config: TensLoraConfig) -> Any:
    # The target_modules by which PEFT finds the adapted layers, as its convert_to_lora does: their last names or, where
    # other modules are called so too, a pattern of the ends of their paths. A LoRA takes no pattern beside
    # layers_to_transform.
    def ends(path: str) -> tuple[str, ...]:
        parts = [r"\d+" if part.isdigit() else re.escape(part) for part in path.split(".")]
        return tuple(r"\.".join(parts[start:]) for start in reversed(range(len(parts))))

    own = {ends(path) for path in adapted}
    of_others = {each for path, _ in model.named_modules() if (others := ends(path)) not in own for each in others}
    distinct = {next((each for each in of_own if each not in of_others), of_own[-1]) for of_own in own}
    pattern = rf"(.*\.)?({'|'.join(sorted(distinct))})"
    last_names = {path.rpartition(".")[2] for path in adapted}
    if distinct == {of_own[0] for of_own in own} or config.layers_to_transform is not None or len(pattern) > LONGEST:
        return last_names  # PEFT keeps a set, and saves it as a list
    return pattern


def _last_name(target: TargetLinear) -> str:
    return target.path.rpartition(".")[2]


def _named(config: PeftConfig, names: Any) -> PeftConfig:
    named = copy.copy(config)
    named.target_modules = names
    return named


def _widest(model: nn.Module, config: TensLoraConfig) -> list[Stage]:
    # All matrices among which target_modules can choose.
    def chosen(path: str) -> bool:
        return bool(check_target_module_exists(_named(config, {path} if named is None else named), path))

    named = config.target_modules
    if config.adapt or named is None:
        return find_projections(model, config.adapt or "qkv", chosen=chosen)
    for adapt in ("all", "qkvo"):
        try:
            return find_projections(model, adapt, chosen=chosen)
        except TensLoRAError:  # this model's feed-forward block, or its attention's output, is not known
            continue
    return find_projections(model, "qkv", chosen=chosen)


def _adapt_of(names: Sequence[str], gated: Iterable[bool]) -> str:
    letters = "".join(letter for letter in "qkvo" if adapted_matrices(letter)[0] in names)
    for adapt in (letters, "mlp", "all"):
        if adapt and all(set(adapted_matrices(adapt, each)) == set(names) for each in gated):
            return adapt
    raise TensLoRAError(
        f"target_modules: match {', '.join(names)}; must match some of query, key, value and output, or the whole "
        f"feed-forward block, or both"
    )


@contextmanager
def _linears_in_place(model: nn.Module) -> Iterator[None]:
    # find_projections looks for Linear layers, and an earlier adapter has put tuner layers around them.
    layers = [(path, module) for path, module in model.named_modules() if isinstance(module, TensLoraLinear)]
    try:
        for path, layer in layers:
            model.set_submodule(path, layer.base_layer)
        yield
    finally:
        for path, layer in layers:
            model.set_submodule(path, layer)


__all__ = ["TensLoraConfig", "TensLoraLinear", "TensLoraModel", "register"]
