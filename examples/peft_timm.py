"""A TensLoRA adapter in PEFT on a timm ViT: the queries and values of its fused qkv, and nothing of its keys.

    python -m examples.peft_timm

timm keeps query, key and value in one Linear. PEFT's LoRA adapts all of that Linear or nothing of it; here `adapt="qv"`
adapts two of its three matrices. Data, backbone and loop are those of examples.plain_loop.
"""

if __name__ == "__main__":  # as a module, or as a file
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).parents[1]))

    import tenslora.harness.early  # noqa: F401  catches Ctrl-C from here on

import torch
from peft import get_peft_model

from examples.plain_loop import accuracy, backbone, train
from tenslora.harness.commands import command_parser, mistakes_in_one_line
from tenslora.peft import TensLoraConfig


def main(epochs: int = 10) -> tuple[float, float, float]:
    """Train, merge, and return the test accuracy before and after, and the largest change of a key's weight."""
    torch.manual_seed(0)
    vit = backbone()
    before = vit.blocks[0].attn.qkv.weight.clone()
    model = get_peft_model(vit, TensLoraConfig(adapt="qv", modules_to_save=["head"]))
    model.print_trainable_parameters()
    train(model, epochs)
    adapted = accuracy(model)
    plain = model.merge_and_unload()
    merged = accuracy(plain)
    keys = (plain.blocks[0].attn.qkv.weight - before)[64:128].abs().max().item()  # the second third of the outputs
    print(f"accuracy {adapted:.3f}, merged {merged:.3f}; largest change of a key's weight: {keys}")
    return adapted, merged, keys


if __name__ == "__main__":
    with mistakes_in_one_line():
        command_parser("examples.peft_timm", __doc__).parse_args()
        main()
