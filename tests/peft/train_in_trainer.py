"""Six steps of transformers' Trainer on a TensLoRA adapter in PEFT, by as many processes as started this module.

python -m tests.peft.train_in_trainer FOLDER BATCH_SIZE
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from tenslora.peft import TensLoraConfig
from tests.models import build


class Sentences(Dataset[dict[str, torch.Tensor]]):
    """96 sentences of seven random words."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.words = torch.randint(5, 50, (96, 7), generator=generator)

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.words[index], "labels": self.words[index]}


def main(folder: Path, batch_size: int) -> None:
    """Train, and write the adapter."""
    backbone: Any = build("llama").float()  # which has no dropout; each process would draw masks of its own
    model = get_peft_model(backbone, TensLoraConfig(task_type="CAUSAL_LM"))
    arguments = TrainingArguments(
        str(folder / "trainer"), max_steps=6, learning_rate=1e-2, per_device_train_batch_size=batch_size,
        save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=Sentences())
    trainer.train()
    if trainer.is_world_process_zero():
        model.save_pretrained(str(folder))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
