"""Identifiers and digests: one type for each noun, so that two of them are never mixed up."""

from __future__ import annotations

import hashlib
from typing import NewType

AccountId = NewType("AccountId", str)
PoolId = NewType("PoolId", str)
TokenId = NewType("TokenId", str)
PartyId = NewType("PartyId", str)
"""Anyone with a certificate: a worker, a client, an operator, a service."""
SessionId = NewType("SessionId", str)
JobId = NewType("JobId", str)
TaskId = NewType("TaskId", str)
LeaseId = NewType("LeaseId", str)
DeviceId = NewType("DeviceId", str)
Digest = NewType("Digest", bytes)
"""SHA-256, 32 bytes."""
KeyFingerprint = NewType("KeyFingerprint", bytes)
"""SHA-256 of a public key's DER SubjectPublicKeyInfo, 32 bytes."""

DIGEST_BYTES = 32
ID_ENTROPY_BYTES = 10


def digest_of(data: bytes | bytearray | memoryview) -> Digest:
    """The SHA-256 digest of `data`."""
    return Digest(hashlib.sha256(data).digest())


def readable_id(prefix: str, entropy: bytes) -> str:
    """An identifier such as `job-3kq7…`: a prefix and 80 bits of `entropy` in lower-case base32.

    `entropy` must hold at least `ID_ENTROPY_BYTES` bytes; only the first ones count.
    """
    assert len(entropy) >= ID_ENTROPY_BYTES, "identifiers need 80 bits"
    return f"{prefix}-{_eight_letters(entropy[:5])}{_eight_letters(entropy[5:ID_ENTROPY_BYTES])}"


def _eight_letters(data: bytes) -> str:
    """Five bytes in base32 (RFC 4648), two letters at a time: several a task are made, and `base64` takes its time."""
    number, pairs = int.from_bytes(data, "big"), _BASE32_PAIRS
    return pairs[number >> 30] + pairs[number >> 20 & 0x3FF] + pairs[number >> 10 & 0x3FF] + pairs[number & 0x3FF]


_BASE32 = "abcdefghijklmnopqrstuvwxyz234567"
_BASE32_PAIRS = [high + low for high in _BASE32 for low in _BASE32]
