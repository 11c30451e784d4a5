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
    ("mode", "factorization"),
    [("lora", "tucker"), ("qkv_depth", "tucker"), ("qkv", "cp"), ("att_site", "tensor_train")],
)
def test_an_exported_model_outlives_a_pass_over_its_graph(mode: str, factorization: str) -> None:
    model, batch = build("separate"), inputs("separate")
    randomised(attach(model, AdapterConfig(mode, factorization=factorization)))
    expected = logits(model, batch)
    exported = torch.export.export(model, (), batch).module()
    for part in exported.modules():
        if isinstance(part, torch.fx.GraphModule):
            part.graph.eliminate_dead_code()
            part.recompile()
    torch.testing.assert_close(logits(exported, batch), expected, rtol=0, atol=1e-12)
