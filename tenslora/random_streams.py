"""Seeds of random streams: a stream depends on its purpose alone, and not on what was drawn before it."""

from __future__ import annotations

import hashlib


def stream_seed(purpose: str, *numbers: int) -> int:
    """The seed of a random stream.

    Args:
        purpose: what is drawn from the stream.
        numbers: what tells apart several streams with the same purpose, such as a run's seed and an index.

    Returns:
        A number of 56 bits. Different arguments give unrelated numbers.
    """
    text = f"tenslora {purpose} {' '.join(map(str, numbers))}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
