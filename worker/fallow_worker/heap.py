"""The daemon's own memory: an owner wants it back when the work is done, and glibc keeps what it once had."""

from __future__ import annotations

import ctypes
import gc
from functools import cache
from typing import Final

_M_ARENA_MAX: Final = -8
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
ARENAS: Final = 2
"""glibc makes up to eight arenas for each core, and hardly ever gives one back."""
MAPPED_FROM_BYTES: Final = 128 * 1024
"""Larger blocks are mapped one by one and go back when freed; left alone, glibc raises this with each of them."""


def keep_small() -> None:
    """Tells the allocator to spend little; call it before threads start. Does nothing where there is no glibc."""
    mallopt = getattr(_library(), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, ARENAS)
        mallopt(_M_MMAP_THRESHOLD, MAPPED_FROM_BYTES)
        mallopt(_M_TRIM_THRESHOLD, MAPPED_FROM_BYTES)


def give_back() -> None:
    """Returns free memory to the system."""
    gc.collect()
    trim = getattr(_library(), "malloc_trim", None)
    if trim is not None:
        trim(0)


@cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(None)
