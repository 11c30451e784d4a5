"""Random streams that depend on a purpose and some numbers, and on nothing that was drawn before."""

from __future__ import annotations

import hashlib


def stream_seed(purpose: str, *numbers: int) -> int:
    """A 56-bit seed for the stream of `purpose` and `numbers`; different arguments give unrelated streams."""
    text = f"tenslora {purpose} {' '.join(map(str, numbers))}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
