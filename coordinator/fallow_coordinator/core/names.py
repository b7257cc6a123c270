"""Fresh names from the entropy that the engine drew: equal entropy gives equal names."""

from __future__ import annotations

import hashlib

from fallow.ids import readable_id

SERIAL_BYTES = 16


class Names:
    """Identifiers of one decision, each from SHA-256(entropy ‖ counter)."""

    __slots__ = ("_count", "_entropy")

    def __init__(self, entropy: bytes) -> None:
        """`entropy` is 32 fresh bytes."""
        assert len(entropy) == 32, "a decision draws 32 bytes"
        self._entropy = entropy
        self._count = 0

    def draw(self) -> bytes:
        """32 bytes that no other draw of this decision gives."""
        self._count += 1
        return hashlib.sha256(self._entropy + self._count.to_bytes(8, "big")).digest()

    def new(self, prefix: str) -> str:
        """A readable identifier, `job-…`."""
        return readable_id(prefix, self.draw())

    def serial(self) -> bytes:
        """A positive certificate serial number, big-endian."""
        drawn = self.draw()[:SERIAL_BYTES]
        return bytes(((drawn[0] & 0x7F) | 0x40,)) + drawn[1:]


def entropy_of_step(entropy: bytes, step: int) -> bytes:
    """Entropy of a turn's step: draws hash it, so they are unrelated to those of the command and of other steps."""
    return entropy[:24] + step.to_bytes(8, "big")
