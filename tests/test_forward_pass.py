"""The first forward pass of an adapted model is checked for layers that it does not call."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import transformers as hf
from peft import get_peft_model
from peft.functional import delete_adapter
from torch import Tensor, nn
from torch.nn import functional as F

from tenslora import AdapterConfig, TensLoRAError, attach, disabled
from tenslora.peft import TensLoraConfig
from tests.models import build, inputs
from tests.plain_transformer import PlainTransformer


def reads_weights_of_query(where: Sequence[int], blocks: int = 2) -> PlainTransformer:
    """A model that in some of its blocks applies query's weight itself."""
    model = PlainTransformer(layers=blocks)
    for block in where:
        model.get_submodule(f"blocks.{block}.attention").__class__ = _ReadsTheWeight
    return model


class _ReadsTheWeight(type(PlainTransformer().blocks[0].attention)):  # type: ignore[misc]
    def forward(self, x: Tensor) -> Tensor:
        query: Tensor = F.linear(x, self.query.weight, self.query.bias)
        attended: Tensor = self.attend(query, self.key(x), self.value(x))
        return attended


X = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(0))
NONE_OF_QUERY = (
    r"^PlainTransformer: its forward pass calls none of the layers that hold the query matrices "
    r"\(blocks\.0\.attention\.query, blocks\.1\.attention\.query\), so an adapter there has no effect; "
    r"choose other matrices with adapt, or attach\(model, detach\(model\)\) if layers were replaced since$"
)


def test_a_pass_that_calls_no_layer_of_a_kind_is_an_error() -> None:
    model = reads_weights_of_query([0, 1])
    attach(model, AdapterConfig("qkv_depth"))
    for _ in range(2):
        with pytest.raises(TensLoRAError, match=NONE_OF_QUERY):
            model(X)


def test_a_peft_model_is_checked_too() -> None:
    backbone = reads_weights_of_query([0, 1])
    expected = backbone(X)
    model = get_peft_model(backbone, TensLoraConfig())
    in_peft = r"choose other matrices with adapt or target_modules, or unload\(\) and get_peft_model if"
    with pytest.raises(TensLoRAError, match=in_peft):
        model(X)
    delete_adapter(backbone, "default", "tenslora_")  # the tuner does not hear of it
    assert torch.equal(model(X), expected)


def test_wavlm_which_reads_the_weights_of_its_projections_is_refused_when_it_runs() -> None:
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 32}
    convolutions = {"conv_dim": (8,), "conv_stride": (5,), "conv_kernel": (10,), "num_conv_pos_embeddings": 4}
    model = hf.WavLMModel(hf.WavLMConfig(**sizes, **convolutions, num_conv_pos_embedding_groups=2)).eval()
    attach(model, AdapterConfig("qkv_depth"))
    with pytest.raises(TensLoRAError, match=r"^WavLMModel: .*none of the layers that hold the query matrices"):
        model(torch.zeros(1, 400))


def test_a_pass_that_calls_some_layers_warns_once() -> None:
    model = reads_weights_of_query([1])
    attach(model, AdapterConfig("qkv_depth"))
    with pytest.warns(UserWarning, match=r"calls 5 of the 6 adapted layers, and not blocks\.1\.attention\.query;"):
        model(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(X)


def test_an_adapter_that_is_off_and_a_part_that_ran_before_are_no_cause_for_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = PlainTransformer()
        attach(model, AdapterConfig("qkv_depth"))
        twin = copy.deepcopy(model)
        with disabled(model):
            model(X)
        # As when text is generated: the encoder runs by itself, and then the model without it.
        seq2seq = build("t5").float()
        attach(seq2seq, AdapterConfig("qkv_depth"))
        batch = inputs("t5")
        encoded = seq2seq.get_submodule("encoder")(batch.pop("input_ids"))
        seq2seq(**batch, encoder_outputs=encoded)
    twin.get_submodule("blocks.1").forward = lambda x: x
    with pytest.warns(UserWarning, match="calls 3 of the 6 adapted layers"):  # a copy is checked by itself
        twin(X)


def test_a_part_that_outlives_its_model_is_copied_and_pickled() -> None:
    model = PlainTransformer()
    adapter = attach(model, AdapterConfig("qkv_depth"))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(1))
    blocks = nn.Sequential(*model.blocks)
    del model
    gc.collect()
    for copied in (copy.deepcopy(blocks), copy.deepcopy(copy.deepcopy(blocks)), pickle.loads(pickle.dumps(blocks))):
        assert torch.equal(copied(X), blocks(X))


def test_a_failed_pass_is_not_checked() -> None:
    model = PlainTransformer()
    attach(model, AdapterConfig("qkv_depth"))
    with pytest.raises(RuntimeError, match="shape"):
        model(torch.randn(2, 5, 7))
    model(X)


def test_a_pass_that_was_under_way_when_the_adapter_was_put_on_is_not_checked() -> None:
    # As by another thread of a server, which loads an adapter while this one computes.
    model = reads_weights_of_query([0, 1])
    model.register_forward_hook(lambda *_: None)  # without any hook, torch does not look for one at the end of a pass
    late = model.head.register_forward_pre_hook(lambda *_: attach(model, AdapterConfig("qkv_depth")) and None)
    model(X)
    late.remove()
    with pytest.raises(TensLoRAError, match=NONE_OF_QUERY):
        model(X)


@pytest.mark.parametrize("wrap", [lambda m, x: iter_of(m, x), lambda m, x: lambda: m.plain_forward(x)])
def test_a_pass_that_computes_later_is_not_checked(wrap: Callable[[Any, Tensor], Any]) -> None:
    model: Any = PlainTransformer()
    expected = model(X)
    model.plain_forward, model.forward = model.forward, lambda x: wrap(model, x)
    attach(model, AdapterConfig("qkv_depth"))
    later = model(X)
    assert torch.equal(next(later) if isinstance(later, Iterator) else later(), expected)


def iter_of(model: Any, x: Tensor) -> Iterator[Tensor]:
    yield model.plain_forward(x)


def test_an_adapter_that_an_edited_sequential_has_lost_is_told_of() -> None:
    for edit, place in ((_Blocks.lose, "is not there"), (_Blocks.replace, "is a Linear")):
        model = _Blocks(PlainTransformer())
        attach(model, AdapterConfig("qkv_depth"))
        edit(model)
        with pytest.raises(TensLoRAError, match=rf"^_Blocks: tenslora {place}, and must be the adapter that its"):
            model(X)


class _Blocks(nn.Sequential):
    def lose(self) -> None:
        self.pop(-1)

    def replace(self) -> None:
        self[-1] = nn.Linear(2, 2)


def test_a_compiled_model_is_checked() -> None:
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    model = PlainTransformer()
    attach(model, AdapterConfig("qkv_depth"))
    compiled = torch.compile(model, backend=backend)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns if what is traced looks at an output that has a gradient
        for _ in range(3):
            compiled(X)
    assert len(graphs) == 1
    model = reads_weights_of_query([0, 1])
    attach(model, AdapterConfig("qkv_depth"))
    with pytest.raises(TensLoRAError, match=NONE_OF_QUERY):
        torch.compile(model, backend=backend)(X)


@pytest.mark.parametrize(
    ("uncalled", "listed"),
    [
        (2, r"blocks\.1\.attention\.query, blocks\.2\.attention\.query;"),
        (3, r"blocks\.1\S+, blocks\.2\S+, blocks\.3\.attention\.query;"),
        (4, r"blocks\.1\S+, blocks\.2\S+, blocks\.3\.attention\.query and 1 more;"),
        (5, r"blocks\.1\S+, blocks\.2\S+, blocks\.3\.attention\.query and 2 more;"),
    ],
)
def test_a_warning_lists_three_layers_and_counts_the_rest(uncalled: int, listed: str) -> None:
    model = reads_weights_of_query(range(1, uncalled + 1), blocks=uncalled + 1)
    attach(model, AdapterConfig("qkv_depth"))
    with pytest.warns(UserWarning, match=rf"calls {2 * uncalled + 3} of the {3 * uncalled + 3} .* not {listed}"):
        model(X)
