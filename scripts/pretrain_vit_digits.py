"""Makes vit_digits.safetensors: a small ViT pretrained on the digits 0 to 4 of scikit-learn's UCI digits.

    python -m scripts.pretrain_vit_digits [path]

trains every weight (80 seconds on one core) and writes the checkpoint (407,696 bytes). The digits 5 to 9
are never shown: they are what `dataset=digits` adapts the backbone to.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir

from tenslora.files import write_safetensors
from tenslora.harness.backbones import EMBEDDED, load_backbone
from tenslora.harness.config import register_resolvers, validate
from tenslora.harness.data.encoding import encode
from tenslora.harness.data.images import digits
from tenslora.harness.tracking import Tracker
from tenslora.harness.training.loop import fit
from tenslora.harness.training.processes import Processes

EPOCHS = 60


def pretrain(path: Path, epochs: int = EPOCHS) -> float:
    """Pretrain the backbone, write it to `path`, and return its accuracy on held-out digits 0 to 4."""
    conf = Path(__file__).parents[1] / "conf"
    register_resolvers()
    overrides = ["model.pretrained=false", "tensor_mode=full", f"trainer.epochs={epochs}"]
    overrides += ["optimizer.lr=1e-3", "optimizer.warmup_steps=60", "optimizer.weight_decay=0.05"]
    with initialize_config_dir(str(conf), version_base="1.3"):
        run = validate(compose("config", overrides))
    data = digits(range(5))
    backbone = load_backbone(run.model, len(data.classes), run.seed)
    checkpoint = path.with_suffix(".checkpoint")
    state = fit(
        backbone.model,
        encode(data.train, data.test, run.dataset, run.model, backbone.input_name, None),
        run,
        processes=Processes("cpu"),
        checkpoint=checkpoint,
        show_progress=True,
        on_epoch=Tracker().epoch,
    )
    checkpoint.unlink()
    weights = backbone.model.state_dict()
    write_safetensors(path, {k: v.half() for k, v in weights.items() if not k.startswith("head")}, {})
    accuracy: float = state.history[-1]["accuracy"]
    return accuracy


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else EMBEDDED
    torch.set_num_threads(1)  # the sums then come out alike on every machine
    print(f"{target}: accuracy {pretrain(target):.4f} on the held-out digits 0 to 4")
