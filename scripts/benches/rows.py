"""Real rows: what Magika reads of the files of a folder."""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from fallow.bundle import BytesCodec
from fallow.sources.port import windowed

LEAST_BYTES = 64
"""Shorter files need no model; both sides shall run it on every row."""


def contents_of(folder: Path, codec: BytesCodec) -> list[bytes]:
    """Head and tail windows of every file below `folder`, in the order of their paths."""
    windows = (codec.head_window_bytes, codec.tail_window_bytes)
    contents: list[bytes] = []
    for path in sorted(folder.rglob("*")):
        if "site-packages" in path.parts or "__pycache__" in path.parts or path.is_symlink() or not path.is_file():
            continue
        content = windowed(path.read_bytes(), windows)
        if len(content.strip()) >= LEAST_BYTES:
            contents.append(content)
    return contents


def standard_library() -> Path:
    """Python's own files: some thousands of real ones on every machine that runs this."""
    return Path(sysconfig.get_paths()["stdlib"])


def fresh(contents: Sequence[bytes], rows: int, seed: int) -> list[bytes]:
    """Another subset in another order for each seed; whole rounds through all contents when there are too few."""
    chance = random.Random(seed)
    chosen: list[bytes] = []
    while len(chosen) < rows:
        round_of_all = list(contents)
        chance.shuffle(round_of_all)
        chosen += round_of_all[: rows - len(chosen)]
    return chosen
