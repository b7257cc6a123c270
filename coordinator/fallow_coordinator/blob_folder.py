"""The blobs of a state folder as plain files, for whoever only looks."""

from __future__ import annotations

import hashlib
from pathlib import Path

from fallow.ids import Digest
from fallow_coordinator.blobs.storage import blob_key


class BlobFiles:
    """Blobs where the blob service keeps them on a disk."""

    def __init__(self, folder: Path) -> None:
        """`folder` is the blob service's."""
        self._folder = folder

    def length_bytes(self, digest: Digest) -> int | None:
        """How long a blob is; None: it is not there."""
        try:
            return (self._folder / blob_key(digest)).stat().st_size
        except FileNotFoundError:
            return None

    def digest(self, digest: Digest) -> Digest:
        """The digest of what lies in a blob's place, read in bounded memory. Raises OSError when it can't be read."""
        with (self._folder / blob_key(digest)).open("rb") as file:
            return Digest(hashlib.file_digest(file, "sha256").digest())
