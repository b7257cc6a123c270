"""How messages of a worker's session are signed: one place for both sides.

The transcript (`fallow.envelope`) names the receiver as peer: the coordinator's signing key for what a worker says, the
worker's key for what the coordinator says. The session is the one that the Welcome names; a Hello, which comes before,
is signed for the empty session, and the Welcome for the session that it names itself.
"""

from __future__ import annotations

from functools import lru_cache

from fallow.envelope import SESSION_METHOD, Domain, check_signature, sign_payload
from fallow.identity import PrivateKey, fingerprint_of
from fallow.ids import KeyFingerprint, SessionId

_fingerprint_of = lru_cache(maxsize=64)(fingerprint_of)
"""Every message names the same coordinator."""
NO_SESSION = SessionId("")
"""The session for which a Hello is signed."""


def sign_worker_payload(
    worker_key: PrivateKey, payload: bytes, *, session: SessionId, sequence: int, coordinator_key: bytes
) -> bytes:
    """A worker's signature; `coordinator_key` is DER SubjectPublicKeyInfo."""
    return sign_payload(
        worker_key,
        Domain.SESSION_WORKER,
        payload,
        method=SESSION_METHOD,
        session=session,
        sequence=sequence,
        peer=_fingerprint_of(coordinator_key),
    )


def check_worker_signature(
    worker_key: bytes, signature: bytes, payload: bytes, *, session: SessionId, sequence: int, coordinator_key: bytes
) -> None:
    """Returns when a worker's signature holds; keys are DER SubjectPublicKeyInfo. Raises SIGNATURE_INVALID."""
    check_signature(
        worker_key,
        signature,
        Domain.SESSION_WORKER,
        payload,
        method=SESSION_METHOD,
        session=session,
        sequence=sequence,
        peer=_fingerprint_of(coordinator_key),
    )


def sign_coordinator_payload(
    coordinator_key: PrivateKey, payload: bytes, *, session: SessionId, sequence: int, worker: KeyFingerprint
) -> bytes:
    """The coordinator's signature for one worker."""
    return sign_payload(
        coordinator_key,
        Domain.SESSION_COORDINATOR,
        payload,
        method=SESSION_METHOD,
        session=session,
        sequence=sequence,
        peer=worker,
    )


def check_coordinator_signature(
    coordinator_key: bytes,
    signature: bytes,
    payload: bytes,
    *,
    session: SessionId,
    sequence: int,
    worker: KeyFingerprint,
) -> None:
    """Returns when the coordinator's signature holds; its key is DER SubjectPublicKeyInfo. Raises SIGNATURE_INVALID."""
    check_signature(
        coordinator_key,
        signature,
        Domain.SESSION_COORDINATOR,
        payload,
        method=SESSION_METHOD,
        session=session,
        sequence=sequence,
        peer=worker,
    )
