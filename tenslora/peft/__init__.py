"""PEFT: the tuner, reading a LoRA that PEFT saved, and turning an adapter into a PEFT LoRA.

Importing this package makes PEFT know TensLoRA, so that `get_peft_model` takes a `TensLoraConfig` and
`PeftModel.from_pretrained` loads what it saved. Where PEFT is not installed, a saved LoRA can still be read.
"""

import re
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING

from tenslora.errors import TensLoRAError

if TYPE_CHECKING or find_spec("peft"):  # type checkers would take __getattr__ for every name, misspelt ones too
    try:
        from tenslora.peft.tuner import TensLoraConfig, TensLoraLinear, TensLoraModel, register
    except ImportError as error:
        # Asked only now, because a development version of 0.20 may have all that is needed.
        if [int(number) for number in re.findall(r"\d+", version("peft"))[:2]] >= [0, 21]:
            raise
        raise TensLoRAError(f"peft {version('peft')}: must be 0.21 or later for tenslora.peft ({error})") from error

    __all__ = ["TensLoraConfig", "TensLoraLinear", "TensLoraModel"]
    register()
else:

    def __getattr__(name: str) -> None:
        raise ImportError(f"tenslora.peft.{name}: needs PEFT (pip install 'peft>=0.21')")
