"""An adapter on a decoder: a small Llama with grouped-query attention learns the bytes of a text file.

    python -m examples.causal_lm README.md

The weights of the backbone are random, so nothing is downloaded. For a real one, use
AutoModelForCausalLM.from_pretrained and its tokenizer.
"""

if __name__ == "__main__":  # as a module, or as a file
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).parents[1]))

    import tenslora.harness.early  # noqa: F401  catches Ctrl-C from here on

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tenslora import AdapterConfig, RankStrategy, attach
from tenslora.errors import TensLoRAError
from tenslora.files import require_file
from tenslora.harness.commands import command_parser, mistakes_in_one_line


def bytes_of(path: Path) -> torch.Tensor:
    """The bytes of a file that has more than the 64 of one example."""
    require_file(path)  # a pipe or a device may have no end
    text = path.read_bytes()
    if len(text) <= 64:
        raise TensLoRAError(f"{path}: must have more than 64 bytes, and has {len(text)}")
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).to(torch.int64)


def main(path: Path, steps: int = 150) -> list[float]:
    """Train and return the loss of each step."""
    torch.manual_seed(0)
    text = bytes_of(path)
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 160}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=256))
    config = AdapterConfig("qkv_depth", RankStrategy("isoparameters", rank=8), adapt="all")
    adapter = attach(model, config, train=["lm_head"])  # whose weights are random; a pretrained head can stay frozen
    print(adapter)

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for step in range(steps):
        starts = torch.randint(len(text) - 64, (16,))
        batch = torch.stack([text[start : start + 64] for start in starts])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 25 == 0 or step == steps - 1:
            print(f"step {step + 1}: loss {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    with mistakes_in_one_line():
        parser = command_parser("examples.causal_lm", __doc__)
        parser.add_argument("file", type=Path, help="a text file of more than 64 bytes, such as README.md")
        main(parser.parse_args().file)
