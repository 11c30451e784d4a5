"""An adapter in a plain training loop: a small ViT that knows the digits 0 to 4 learns 5 to 9.

    python -m examples.plain_loop

The backbone is the small ViT that comes with this repository. For a real one, use
timm.create_model(..., pretrained=True).
"""

if __name__ == "__main__":  # as a module, or as a file
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).parents[1]))

    import tenslora.harness.early  # catches Ctrl-C from here on

from pathlib import Path

import timm
import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch.nn import functional as F

import tenslora
from tenslora import AdapterConfig, attach, detach, merge
from tenslora.harness.commands import command_parser, mistakes_in_one_line

# The embedded checkpoint; its architecture is that of conf/model/vit_digits.yaml.
WEIGHTS = Path(tenslora.__file__).parent / "harness" / "backbones" / "vit_digits.safetensors"
SIZES = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 64, "depth": 4, "num_heads": 4}


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """The images and labels of the digits 5 to 9. The first 670 are for training."""
    x, y = (torch.tensor(array) for array in load_digits(return_X_y=True))
    return x[y >= 5].float().view(-1, 1, 8, 8) / 8 - 1, y[y >= 5] - 5


def backbone() -> torch.nn.Module:
    """The small ViT, with a new head for five classes."""
    model = timm.create_model("vit_tiny_patch16_224", **SIZES, num_classes=5)
    model.load_state_dict(load_file(WEIGHTS), strict=False)
    return model


def train(model: torch.nn.Module, epochs: int) -> None:
    """A plain loop over what requires gradients."""
    x, y = digits()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for epoch in range(epochs):
        for batch in torch.randperm(670).split(64):
            loss = F.cross_entropy(model(x[batch]), y[batch])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}")


@torch.no_grad()
def accuracy(model: torch.nn.Module) -> float:
    """The accuracy on the images after the first 670."""
    x, y = digits()
    return (model.eval()(x[670:]).argmax(1) == y[670:]).float().mean().item()


def main(epochs: int = 10) -> tuple[float, float]:
    """Train, merge, and return the test accuracy before and after merging."""
    torch.manual_seed(0)
    model = backbone()
    print(attach(model, AdapterConfig("qkv_depth"), train=["head"]))  # freezes everything else
    train(model, epochs)
    adapted = accuracy(model)
    merge(model)  # adds the update to the weights
    detach(model)  # leaves a plain timm model
    merged = accuracy(model)
    print(f"accuracy {adapted:.3f}, merged {merged:.3f}")
    return adapted, merged


if __name__ == "__main__":
    with mistakes_in_one_line():
        command_parser("examples.plain_loop", __doc__).parse_args()
        main()
