"""PEFT: the tuner, reading a LoRA that PEFT saved, and turning an adapter into a PEFT LoRA.

Importing this package makes PEFT know TensLoRA, so that `get_peft_model` takes a `TensLoraConfig` and
`PeftModel.from_pretrained` loads what it saved. Where PEFT is not installed, a saved LoRA can still be read.
"""

from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING or find_spec("peft"):  # type checkers would take __getattr__ for every name, misspelt ones too
    from tenslora.peft.tuner import TensLoraConfig, TensLoraLinear, TensLoraModel, register

    __all__ = ["TensLoraConfig", "TensLoraLinear", "TensLoraModel"]
    register()
else:

    def __getattr__(name: str) -> None:
        raise ImportError(f"tenslora.peft.{name}: needs PEFT (pip install 'peft>=0.21')")
