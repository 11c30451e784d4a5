"""The one error type that stands for "the user can put this right"."""

from __future__ import annotations


class TensLoRAError(ValueError):
    """Something the user asked for cannot be done; the message is one line.

    The message names the setting, its value and what would be valid. `train.py` prints it alone and exits
    with status 1; with ``HYDRA_FULL_ERROR=1`` the traceback comes too.
    """
