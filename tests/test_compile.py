"""torch.compile traces an adapted model as one graph."""

from __future__ import annotations

import pytest
import torch

from tenslora import AdapterConfig, attach
from tests.models import build, inputs, logits, randomised

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "mode", "factorization", "adapt"),
    [
        # Each branch of the code that computes thin products once, in models that are quick to trace,
        ("separate", "lora", "tucker", "qkv"),
        ("fused", "depth", "tucker", "qkv"),
        ("fused", "att_site", "tucker", "qv"),
        ("fused", "att_qkv_depth", "cp", "qkv"),
        ("separate", "att_site", "tensor_train", "qkv"),
        # and the models of both libraries.
        ("hf_roberta", "qkv_depth", "tucker", "qkv"),
        ("timm_vit", "qkv_depth", "tucker", "all"),
        ("timm_pvt_v2", "qkv_depth", "tucker", "qkv"),
    ],
)
def test_a_compiled_model_is_one_graph_for_all_shapes(name: str, mode: str, factorization: str, adapt: str) -> None:
    model, batch = build(name), inputs(name)
    randomised(attach(model, AdapterConfig(mode, factorization=factorization, adapt=adapt)))
    expected = logits(model, batch)
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    output = compiled(**batch)
    torch.testing.assert_close(getattr(output, "logits", output), expected, rtol=0, atol=1e-12)
    larger = {key: torch.cat([value, value])[:3] for key, value in batch.items()}
    compiled(**{key: value[:, :5].contiguous() if key == "input_ids" else value for key, value in larger.items()})
    assert len(graphs) == 1


def test_a_model_that_is_compiled_for_inference_is_one_graph() -> None:
    model, batch = build("fused"), inputs("fused")
    randomised(attach(model, AdapterConfig("att_site", adapt="qv")))
    torch._dynamo.reset()
    with torch.no_grad():
        expected = logits(model, batch)
        output = torch.compile(model, backend="eager", fullgraph=True)(**batch)
    torch.testing.assert_close(getattr(output, "logits", output), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "mode", "factorization", "adapt"),
    [
        ("separate", "lora", "tucker", "qkv"),
        ("fused", "qkv_depth", "tucker", "qv"),
        ("separate", "qkv", "cp", "qkv"),
        ("timm_vit", "att_site", "tensor_train", "all"),
    ],
)
def test_an_exported_model_takes_any_batch_and_outlives_a_pass_over_its_graph(
    name: str, mode: str, factorization: str, adapt: str
) -> None:
    model, batch = build(name), inputs(name)
    randomised(attach(model, AdapterConfig(mode, factorization=factorization, adapt=adapt)))
    larger = {key: torch.cat([value, value])[1:] for key, value in batch.items()}
    any_batch = {key: {0: torch.export.Dim("batch")} for key in batch}
    exported = torch.export.export(model, (), batch, dynamic_shapes=any_batch).module()
    for part in exported.modules():
        if isinstance(part, torch.fx.GraphModule):
            part.graph.eliminate_dead_code()
            part.recompile()
    torch.testing.assert_close(logits(exported, larger), logits(model, larger), rtol=0, atol=1e-12)
