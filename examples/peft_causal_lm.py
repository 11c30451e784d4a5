"""A TensLoRA adapter in PEFT on a decoder: a small Llama learns the bytes of a text file under transformers' Trainer.

    python -m examples.peft_causal_lm README.md

The weights of the backbone are random, so nothing is downloaded, and its head is trained too. With a real backbone,
from AutoModelForCausalLM.from_pretrained, leave out modules_to_save.
"""

if __name__ == "__main__":  # as a module, or as a file
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).parents[1]))

    import tenslora.harness.early  # noqa: F401  catches Ctrl-C from here on

import tempfile
from pathlib import Path

import torch
from peft import get_peft_model
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from examples.causal_lm import bytes_of
from tenslora.harness.commands import command_parser, mistakes_in_one_line
from tenslora.peft import TensLoraConfig


class Windows(Dataset):
    """All windows of 64 bytes of a file, each beginning 16 bytes after the last."""

    def __init__(self, path: Path) -> None:
        self.windows = bytes_of(path).unfold(0, 64, 16)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.windows[index], "labels": self.windows[index]}


def main(path: Path, steps: int = 150) -> list[float]:
    """Train and return the loss, averaged over every ten steps."""
    set_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 160}
    backbone = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=256))
    config = TensLoraConfig(task_type="CAUSAL_LM", r=8, adapt="all", modules_to_save=["lm_head"])
    model = get_peft_model(backbone, config)
    model.print_trainable_parameters()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, learning_rate=3e-3, per_device_train_batch_size=16, logging_steps=10,
            save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=Windows(path))
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    with mistakes_in_one_line():
        parser = command_parser("examples.peft_causal_lm", __doc__)
        parser.add_argument("file", type=Path, help="a text file of more than 64 bytes, such as README.md")
        main(parser.parse_args().file)
