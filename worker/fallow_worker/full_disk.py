"""A disk that refuses, in words for the worker's owner."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Generator
from pathlib import Path
from typing import Final

from fallow.errors import FallowError, Reason

_REFUSALS: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES})


@contextlib.contextmanager
def told_when_full(path: Path) -> Generator[None]:
    """What the block can't write for lack of room or permission becomes STORAGE_FULL, with what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in _REFUSALS:
            raise
        raise FallowError(
            Reason.STORAGE_FULL,
            f"{path} cannot be written: {error.strerror}",
            field=str(path),
            hint="free some space, or start the worker with --state on another disk",
        ) from None
