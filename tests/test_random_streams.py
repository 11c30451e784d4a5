"""The seeds of random streams, which must never change: a run of another version starts as it did."""

from __future__ import annotations

from tenslora.random_streams import stream_seed


def test_a_seed_is_the_first_56_bits_of_the_names_digest() -> None:
    # By hand: printf 'tenslora adapter 0 0' | sha256sum | cut -c1-14
    assert stream_seed("adapter", 0, 0) == 0xDC63B10F687FD9
    assert stream_seed("order", 3, 7) == 0xFCC8AE5BE77B55
