"""An adapter under transformers' Trainer: a small BERT tells which of two words is more frequent in a sentence.

    python -m examples.trainer

The weights of the backbone are random, so nothing is downloaded. For a real one, use from_pretrained.
"""

if __name__ == "__main__":  # as a module, or as a file
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).parents[1]))

    import tenslora.harness.early  # noqa: F401  catches Ctrl-C from here on

import tempfile

import torch
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments, set_seed

from tenslora import AdapterConfig, attach, load, save_pretrained
from tenslora.harness.commands import command_parser, mistakes_in_one_line


class Majority(Dataset):
    """Sentences of twelve words with the numbers 5 to 8; the label says whether there are more 5s than 6s."""

    def __init__(self, size: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.words = torch.randint(5, 9, (size, 12), generator=generator)
        self.labels = ((self.words == 5).sum(1) > (self.words == 6).sum(1)).long()

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.words[index], "labels": self.labels[index]}


def backbone() -> BertForSequenceClassification:
    """A small BERT, the same at every call."""
    set_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    return BertForSequenceClassification(BertConfig(**sizes, vocab_size=30, hidden_dropout_prob=0.0))


def trainer_of(model: torch.nn.Module, folder: str, steps: int = 1) -> Trainer:
    """transformers' Trainer, which measures the accuracy."""

    def accuracy(prediction: object) -> dict[str, float]:
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    arguments = TrainingArguments(
        folder, max_steps=steps, learning_rate=1e-3, per_device_train_batch_size=32, per_device_eval_batch_size=256,
        logging_steps=100, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True,
        label_names=["labels"],
        average_tokens_across_devices=False,  # the Trainer would multiply BERT's mean loss by the processes
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=Majority(2000, 1), compute_metrics=accuracy)


def main(steps: int = 300) -> tuple[float, float]:
    """Train, save, load on a fresh model, and return the test accuracy of both."""
    model = backbone()
    attach(model, AdapterConfig("att_qkv_depth", adapt="all"), train=["classifier"])
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(model, folder, steps)
        trainer.train()
        trained = trainer.evaluate(Majority(500, 2))["eval_accuracy"]

        save_pretrained(model, f"{folder}/adapter")  # the adapter and the classifier
        again = backbone()
        load(again, f"{folder}/adapter")
        loaded = trainer_of(again, folder).evaluate(Majority(500, 2))["eval_accuracy"]
    print(f"accuracy {trained:.3f}, loaded on a fresh backbone {loaded:.3f}")
    return trained, loaded


if __name__ == "__main__":
    with mistakes_in_one_line():
        command_parser("examples.trainer", __doc__).parse_args()
        main()
