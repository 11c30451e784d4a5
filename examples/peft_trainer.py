"""A TensLoRA adapter in PEFT, under transformers' Trainer: the words and the small BERT of examples.trainer.

python -m examples.peft_trainer
"""

if __name__ == "__main__":  # as a module, or as a file
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).parents[1]))

    import tenslora.harness.early  # noqa: F401  catches Ctrl-C from here on

import tempfile

from peft import PeftModel, get_peft_model

from examples.trainer import Majority, backbone, trainer_of
from tenslora.harness.commands import command_parser, mistakes_in_one_line
from tenslora.peft import TensLoraConfig


def main(steps: int = 300) -> tuple[float, float]:
    """Train, save, load on a fresh model, and return the test accuracy of both."""
    config = TensLoraConfig(task_type="SEQ_CLS", tensor_mode="att_qkv_depth", adapt="all")  # trains the classifier too
    model = get_peft_model(backbone(), config)
    model.print_trainable_parameters()
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(model, folder, steps)
        trainer.train()
        trained = trainer.evaluate(Majority(500, 2))["eval_accuracy"]

        model.save_pretrained(f"{folder}/adapter")
        again = PeftModel.from_pretrained(backbone(), f"{folder}/adapter")
        loaded = trainer_of(again, folder).evaluate(Majority(500, 2))["eval_accuracy"]
    print(f"accuracy {trained:.3f}, loaded on a fresh backbone {loaded:.3f}")
    return trained, loaded


if __name__ == "__main__":
    with mistakes_in_one_line():
        command_parser("examples.peft_trainer", __doc__).parse_args()
        main()
