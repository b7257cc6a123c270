"""The tokens of byte strings, as the engine makes them and as calibration needs them. A row gets the same bits in any
batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fallow.bundle import BytesCodec


def bytes_tokens(codec: BytesCodec, contents: Sequence[bytes]) -> NDArray[np.int32]:
    """The head and tail tokens of each content, shape (len(contents), head_tokens + tail_tokens)."""
    head_tokens = codec.head_tokens
    width = head_tokens + codec.tail_tokens
    tokens = np.full((len(contents), width), codec.padding_token, dtype=np.int32)
    for row, content in zip(tokens, contents, strict=True):
        head = content[: codec.head_window_bytes]
        tail = content[-codec.tail_window_bytes :] if codec.tail_window_bytes else b""
        if codec.strip_whitespace:
            head = head.lstrip()
            tail = tail.rstrip()
        head = head[:head_tokens]
        row[: len(head)] = np.frombuffer(head, dtype=np.uint8)
        if codec.tail_tokens and tail:
            tail = tail[-codec.tail_tokens :]
            row[width - len(tail) :] = np.frombuffer(tail, dtype=np.uint8)
    return tokens
