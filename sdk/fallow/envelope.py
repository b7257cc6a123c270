"""The signing rule: P-256 over domain ‖ method ‖ session ‖ sequence ‖ peer key ‖ exact bytes.

Each field but the sequence is preceded by its length as a big-endian uint32; the sequence is a big-endian uint64. A
signature so made cannot be moved to another purpose, session, place in the stream, or receiver.
"""

from __future__ import annotations

import struct
from enum import StrEnum
from functools import lru_cache
from typing import Final

from fallow.errors import FallowError, Reason
from fallow.identity import PrivateKey, verify
from fallow.ids import KeyFingerprint


class Domain(StrEnum):
    """What a signature is for."""

    SESSION_WORKER = "fallow.v1/session/worker"
    SESSION_COORDINATOR = "fallow.v1/session/coordinator"
    GRANT = "fallow.v1/blob/grant"
    RECEIPT = "fallow.v1/blob/receipt"
    RENEWAL = "fallow.v1/enrollment/renewal"
    ENROLLMENT = "fallow.v1/enrollment/token"
    EVIDENCE = "fallow.v1/job/evidence"


SESSION_METHOD = "/fallow.v1.WorkerService/Session"
HEADS_REMEMBERED_MAX: Final = 8_192
_LENGTH: Final = struct.Struct(">I")
_NUMBER: Final = struct.Struct(">Q")
NO_PEER = KeyFingerprint(bytes(32))
"""For signatures that many may check, such as grants and receipts."""


def transcript(
    domain: Domain,
    payload: bytes,
    *,
    method: str = "",
    session: str = "",
    sequence: int = 0,
    peer: KeyFingerprint = NO_PEER,
) -> bytes:
    """The bytes that are signed."""
    head = _head(domain, method, session)
    return b"".join((head, _NUMBER.pack(sequence), _LENGTH.pack(len(peer)), peer, _LENGTH.pack(len(payload)), payload))


@lru_cache(maxsize=HEADS_REMEMBERED_MAX)
def _head(domain: Domain, method: str, session: str) -> bytes:
    """What all transcripts of a session begin with."""
    fields = (domain.value.encode(), method.encode(), session.encode())
    return b"".join([_LENGTH.pack(len(field)) + field for field in fields])


def sign_payload(
    key: PrivateKey,
    domain: Domain,
    payload: bytes,
    *,
    method: str = "",
    session: str = "",
    sequence: int = 0,
    peer: KeyFingerprint = NO_PEER,
) -> bytes:
    """A DER ECDSA signature over the transcript."""
    return key.sign(transcript(domain, payload, method=method, session=session, sequence=sequence, peer=peer))


def check_signature(
    public_key: bytes,
    signature: bytes,
    domain: Domain,
    payload: bytes,
    *,
    method: str = "",
    session: str = "",
    sequence: int = 0,
    peer: KeyFingerprint = NO_PEER,
) -> None:
    """Returns when the signature holds. Raises SIGNATURE_INVALID."""
    signed = transcript(domain, payload, method=method, session=session, sequence=sequence, peer=peer)
    if not signature or not verify(public_key, signature, signed):
        raise FallowError(
            Reason.SIGNATURE_INVALID,
            "the signature is missing" if not signature else "the signature does not match the message",
            field="signature",
            limit=f"ECDSA P-256 with SHA-256 over the {domain.value} transcript",
        )
