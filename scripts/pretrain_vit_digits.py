"""Pretrains `vit_digits`, a small ViT, on the digits 0 to 4 of scikit-learn's UCI digits.

    python -m scripts.pretrain_vit_digits

The script trains all weights, which takes 80 seconds on one core, and writes a file of 407,696 bytes. The model never
sees the digits 5 to 9, to which `dataset=digits` adapts it.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

if __name__ == "__main__":
    import tenslora.harness.early  # noqa: F401  catches Ctrl-C from here on

from collections.abc import Sequence
from tempfile import TemporaryDirectory

import torch
from hydra import compose, initialize_config_dir

from tenslora.files import write_safetensors
from tenslora.harness.backbones import EMBEDDED, load_backbone
from tenslora.harness.commands import command_parser, file_to_write, mistakes_in_one_line
from tenslora.harness.config import register_resolvers, validate
from tenslora.harness.data.digits import load_digits
from tenslora.harness.data.encoding import encode
from tenslora.harness.training.loop import fit
from tenslora.harness.training.processes import Processes

SETTINGS = [
    "model.pretrained=false",
    "tensor_mode=full",
    "trainer.epochs=60",
    "optimizer.lr=1e-3",
    "optimizer.warmup_steps=60",
    "optimizer.weight_decay=0.05",
]


def pretrain(path: Path) -> float:
    """Pretrain the backbone and write it in half precision, without its head.

    Args:
        path: the path of the file to write.

    Returns:
        The accuracy on the held-out images of the digits 0 to 4.
    """
    register_resolvers()
    with initialize_config_dir(str(Path(__file__).parents[1] / "conf"), version_base="1.3"):
        run = validate(compose("config", SETTINGS))
    dataset = load_digits(range(5))
    backbone = load_backbone(run.model, len(dataset.classes), run.seed)
    with TemporaryDirectory() as folder:
        state = fit(
            backbone.model,
            encode(dataset, run.dataset, backbone, None),
            run,
            processes=Processes("cpu"),
            checkpoint=Path(folder) / "checkpoint.pt",
            show_progress=True,
            on_epoch=lambda _: None,
        )
    weights = {name: tensor.half() for name, tensor in backbone.model.state_dict().items()}
    for name in backbone.head_parameters():
        del weights[name]
    write_safetensors(path, weights, {})
    return float(state.history[-1]["accuracy"])


def main(given: Sequence[str] | None = None) -> None:
    parser = command_parser("scripts.pretrain_vit_digits", __doc__)
    parser.add_argument(
        "path", type=file_to_write, nargs="?", default=str(EMBEDDED), help="the file to write; default: the package's"
    )
    target = parser.parse_args(given).path
    torch.set_num_threads(1)  # sums are then rounded alike on all machines of a kind
    print(f"{target}: accuracy {pretrain(target):.4f} on the held-out digits 0 to 4")


if __name__ == "__main__":
    with mistakes_in_one_line():
        main()
