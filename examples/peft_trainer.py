"""A TensLoRA adapter in PEFT, under transformers' Trainer: the words and the small BERT of examples.trainer.

python -m examples.peft_trainer
"""

import tempfile

from peft import PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments

from examples.trainer import Majority, backbone
from tenslora.peft import TensLoraConfig


def main(steps: int = 300) -> tuple[float, float]:
    """Train, save, load on a fresh model, and return the test accuracy of both."""
    config = TensLoraConfig(task_type="SEQ_CLS", tensor_mode="att_qkv_depth", adapt="all")  # trains the classifier too
    model = get_peft_model(backbone(), config)
    model.print_trainable_parameters()

    def accuracy(prediction: object) -> dict[str, float]:
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, learning_rate=3e-3, per_device_train_batch_size=32, per_device_eval_batch_size=256,
            logging_steps=100, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True,
            label_names=["labels"],
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=Majority(2000, 1), compute_metrics=accuracy)
        trainer.train()
        trained = trainer.evaluate(Majority(500, 2))["eval_accuracy"]

        model.save_pretrained(f"{folder}/adapter")
        again = PeftModel.from_pretrained(backbone(), f"{folder}/adapter")
        loaded = Trainer(again, arguments, compute_metrics=accuracy).evaluate(Majority(500, 2))["eval_accuracy"]
    print(f"accuracy {trained:.3f}, loaded on a fresh backbone {loaded:.3f}")
    return trained, loaded


if __name__ == "__main__":
    main()
