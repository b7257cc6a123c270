"""The stages that are ours: codecs before a program, heads after it. A row gets the same bits in any batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fallow.bundle import BytesCodec, TopKHead
from fallow.byte_tokens import bytes_tokens
from fallow.errors import FallowError, Reason

__all__ = ["TopK", "bytes_tokens", "content_bytes_max", "head_columns", "labels_of", "softmax", "top_k"]

Array = NDArray[Any]

CODEC_VERSION = 1
"""Part of the execution class: grows when a stage of this file, or `bytes_tokens`, changes the bits that it gives."""


def content_bytes_max(codec: BytesCodec) -> int:
    """The longest content that a row of this codec may hold: longer ones travel as their two windows."""
    return codec.head_window_bytes + codec.tail_window_bytes


def softmax(values: Array) -> NDArray[np.float32]:
    """Softmax over the last axis in float32, the maximum subtracted."""
    exponents = np.ascontiguousarray(values, dtype=np.float32)
    exponents = np.exp(exponents - exponents.max(axis=-1, keepdims=True))
    return np.asarray(exponents / exponents.sum(axis=-1, keepdims=True), dtype=np.float32)


@dataclass(frozen=True, slots=True)
class TopK:
    """The k best labels of each row and their scores."""

    indexes: NDArray[np.int64]
    """(rows, k), best first."""
    scores: NDArray[np.float32]
    """(rows, k)"""


def top_k(values: Array, k: int) -> TopK:
    """The k largest entries of each row of `values` (rows, labels), ties to the lower index, NaN below everything."""
    ranked = np.asarray(values)
    if ranked.dtype.kind == "f" and np.isnan(ranked).any():
        ranked = np.where(np.isnan(ranked), -np.inf, ranked)
    if k == 1:
        indexes = ranked.argmax(axis=1).reshape(-1, 1)
    else:
        # The first of equals in a stable sort of the reversed row, read backwards, is the one with the lower index.
        reversed_order = np.argsort(ranked[:, ::-1], axis=1, kind="stable")[:, ::-1]
        indexes = (ranked.shape[1] - 1 - reversed_order)[:, :k]
    scores = np.take_along_axis(np.asarray(values), indexes, axis=1).astype(np.float32)
    return TopK(np.asarray(indexes, dtype=np.int64), scores)


def head_columns(head: TopKHead) -> tuple[tuple[str, str], ...]:
    """(label column, score column) for each rank of a head."""
    names = [head.output] if head.k == 1 else [f"{head.output}_{rank}" for rank in range(head.k)]
    return tuple((name, f"{name}_score") for name in names)


def labels_of(file: bytes, *, name: str) -> list[str]:
    """The labels of a labels file, one a line. Raises BUNDLE_INVALID when it is no UTF-8 text or holds none."""
    try:
        text = file.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FallowError(
            Reason.BUNDLE_INVALID, f"labels file {name!r} is no UTF-8 text: {error}", field=name
        ) from None
    lines = text.replace("\r\n", "\n").removesuffix("\n").split("\n")
    if lines == [""]:
        raise FallowError(Reason.BUNDLE_INVALID, f"labels file {name!r} is empty", field=name, limit="one label a line")
    return lines
