"""Inline payloads that were written or read lately."""

from __future__ import annotations

from collections import OrderedDict

from fallow.ids import Digest


class PayloadCache:
    """The payloads used last, up to a number of bytes, in which the cache's own part is counted."""

    _ENTRY_BYTES = 250
    """What an entry costs beside its bytes: two objects and a place in an ordered dictionary."""

    def __init__(self, bytes_max: int) -> None:
        """Holds at most `bytes_max`."""
        self._bytes_max = bytes_max
        self._bytes = 0
        self._held: OrderedDict[Digest, bytes] = OrderedDict()

    def get(self, digest: Digest) -> bytes | None:
        """The payload, if it is held; it counts as used."""
        data = self._held.get(digest)
        if data is not None:
            self._held.move_to_end(digest)
        return data

    def put(self, digest: Digest, data: bytes) -> None:
        """Holds the payload, and lets go of those that were used longest ago."""
        if digest in self._held:
            self._held.move_to_end(digest)
            return
        self._held[digest] = data
        self._bytes += len(data) + self._ENTRY_BYTES
        while self._bytes > self._bytes_max:
            _, dropped = self._held.popitem(last=False)
            self._bytes -= len(dropped) + self._ENTRY_BYTES
