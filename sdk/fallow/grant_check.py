"""Whether a grant lets this peer do this: the only thing that opens the blob service to anyone but the coordinator."""

from __future__ import annotations

from fallow.envelope import Domain, check_signature
from fallow.errors import FallowError, Reason
from fallow.ids import KeyFingerprint
from fallow.session import SignedBytes
from fallow.wire.blob import BlobOperation, Grant, decode_grant


def checked_grant(
    signed: SignedBytes,
    *,
    operation: BlobOperation,
    coordinator_public_key: bytes,
    peer: KeyFingerprint,
    now_ms: int,
) -> Grant:
    """The grant, once everything about it holds. Raises GRANT_INVALID or GRANT_EXPIRED."""
    try:
        check_signature(coordinator_public_key, signed.signature, Domain.GRANT, signed.payload)
    except FallowError:
        raise _invalid("the grant is not signed by this service's coordinator", "grant.signature") from None
    grant = decode_grant(signed.payload)
    if grant.operation is not operation:
        raise _invalid(
            f"the grant is to {grant.operation.value}, not to {operation.value}", "grant.operation", operation.value
        )
    if grant.holder_key_fingerprint != peer:
        raise _invalid(
            "the grant was given to another key", "grant.holder_key_fingerprint", "the key of this connection"
        )
    if now_ms >= grant.expires_at_ms:
        raise FallowError(
            Reason.GRANT_EXPIRED,
            f"the grant expired {(now_ms - grant.expires_at_ms) / 1000:.0f} s ago",
            field="grant.expires_at",
            hint="ask the coordinator for a new one",
        )
    return grant


def _invalid(message: str, field: str, limit: str = "") -> FallowError:
    return FallowError(Reason.GRANT_INVALID, message, field=field, limit=limit, hint="ask the coordinator for a grant")
