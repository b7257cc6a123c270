"""Identifiers and digests: one type for each noun, so that two of them are never mixed up."""

from __future__ import annotations

import base64
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
    return f"{prefix}-{base64.b32encode(entropy[:ID_ENTROPY_BYTES]).decode('ascii').lower()}"
