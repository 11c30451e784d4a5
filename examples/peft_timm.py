"""A TensLoRA adapter in PEFT on a timm ViT: the queries and values of its fused qkv, and nothing of its keys.

    python -m examples.peft_timm

timm keeps query, key and value in one Linear. PEFT's LoRA adapts all of that Linear or nothing of it; here `adapt="qv"`
adapts two of its three matrices. Data and backbone are those of examples.plain_loop.
"""

import timm
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch.nn import functional as F

from examples.plain_loop import SIZES, WEIGHTS
from tenslora.peft import TensLoraConfig


def main(epochs: int = 10) -> tuple[float, float, float]:
    """Train, merge, and return the test accuracy before and after, and the largest change of a key's weight."""
    torch.manual_seed(0)
    x, y = (torch.tensor(array) for array in load_digits(return_X_y=True))
    x, y = x[y >= 5].float().view(-1, 1, 8, 8) / 8 - 1, y[y >= 5] - 5
    train, test = slice(0, 670), slice(670, None)

    backbone = timm.create_model("vit_tiny_patch16_224", **SIZES, num_classes=5)
    backbone.load_state_dict(load_file(WEIGHTS), strict=False)
    before = backbone.blocks[0].attn.qkv.weight.clone()
    model = get_peft_model(backbone, TensLoraConfig(adapt="qv", modules_to_save=["head"]))
    model.print_trainable_parameters()

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for epoch in range(epochs):
        for batch in torch.randperm(670).split(64):
            loss = F.cross_entropy(model(x[train][batch]), y[train][batch])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}")

    @torch.no_grad()
    def accuracy(model: torch.nn.Module) -> float:
        return (model.eval()(x[test]).argmax(1) == y[test]).float().mean().item()

    adapted = accuracy(model)
    plain = model.merge_and_unload()
    change = (plain.blocks[0].attn.qkv.weight - before).abs()
    keys = change[64:128].max().item()
    print(f"accuracy {adapted:.3f}, merged {accuracy(plain):.3f}; largest change of a key's weight: {keys}")
    return adapted, accuracy(plain), keys


if __name__ == "__main__":
    main()
