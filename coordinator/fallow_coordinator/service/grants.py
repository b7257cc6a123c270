"""Permissions to read and write blobs, signed for one key; and receipts of the blob service, checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from fallow.envelope import Domain, check_signature, sign_payload
from fallow.errors import FallowError, Reason
from fallow.identity import PrivateKey
from fallow.ids import AccountId, KeyFingerprint, PoolId
from fallow.session import BlobReference, SignedBytes
from fallow.wire.blob import BlobKind, BlobOperation, Grant, Receipt, decode_receipt, encode_grant
from fallow_coordinator.core.commands import StoredBlob

GRANT_VALID_FOR_MS: Final = 3_600_000
"""Long enough for 4 GiB at 10 Mbit/s; a holder asks again when it runs out."""
RECEIPT_BYTES_MAX: Final = 4096


@dataclass(frozen=True, slots=True)
class Holder:
    """Who may use a grant, and for which account."""

    key_fingerprint: KeyFingerprint
    account_id: AccountId
    cache_pool_id: PoolId | None = None
    """Pool whose caches may give it what it reads; None: none may."""


class Grants:
    """Signs grants with the coordinator's key."""

    def __init__(self, key: PrivateKey) -> None:
        """`key` is the coordinator's, whose public half every party and the blob service know."""
        self._key = key

    def get(self, blob: BlobReference, holder: Holder, *, now_ms: int, kind: BlobKind = BlobKind.OPAQUE) -> SignedBytes:
        """Permission to read one blob."""
        return self._signed(BlobOperation.GET, blob, kind, holder, now_ms)

    def put(self, blob: BlobReference, holder: Holder, *, now_ms: int, kind: BlobKind) -> SignedBytes:
        """Permission to store one blob, which the blob service looks at as `kind` says."""
        return self._signed(BlobOperation.PUT, blob, kind, holder, now_ms)

    def _signed(
        self, operation: BlobOperation, blob: BlobReference, kind: BlobKind, holder: Holder, now_ms: int
    ) -> SignedBytes:
        payload = encode_grant(
            Grant(
                operation=operation,
                blob=blob,
                kind=kind,
                account_id=holder.account_id,
                holder_key_fingerprint=holder.key_fingerprint,
                expires_at_ms=now_ms + GRANT_VALID_FOR_MS,
                cache_pool_id=holder.cache_pool_id if operation is BlobOperation.GET else None,
            )
        )
        return SignedBytes(payload, sign_payload(self._key, Domain.GRANT, payload))


def stored_blob(
    receipt: SignedBytes, blob_service_key: bytes, account_id: AccountId, field: str, *, issued_after_ms: int = 0
) -> StoredBlob:
    """What a receipt says is stored for an account.

    Receipts given out before `issued_after_ms` say too little of today: what they tell of may be deleted. Outputs that
    a live lease is bound to are never deleted, so their receipts do not age.

    Raises GRANT_INVALID for anything that the blob service did not sign, PERMISSION_DENIED for another account's
    receipt, GRANT_EXPIRED, LIMIT_EXCEEDED or MALFORMED_MESSAGE.
    """
    if len(receipt.payload) > RECEIPT_BYTES_MAX:
        raise FallowError(
            Reason.LIMIT_EXCEEDED,
            f"a receipt of {len(receipt.payload)} bytes",
            field=field,
            limit=f"{RECEIPT_BYTES_MAX} bytes",
        )
    try:
        check_signature(blob_service_key, receipt.signature, Domain.RECEIPT, receipt.payload)
    except FallowError as error:
        # Whoever shows a receipt that was not made here claims what is not so: the contract says PERMISSION_DENIED.
        raise FallowError(
            Reason.GRANT_INVALID, f"this receipt is not the blob service's: {error.message}", field=field
        ) from None
    found = decode_receipt(receipt.payload)
    if found.account_id != account_id:
        raise FallowError(Reason.PERMISSION_DENIED, "this receipt is another account's", field=field)
    if found.issued_at_ms < issued_after_ms:
        raise FallowError(
            Reason.GRANT_EXPIRED,
            f"the receipt was given out {(issued_after_ms - found.issued_at_ms) / 1000:.0f} s too long ago",
            field=field,
            hint="ask the blob service for a fresh one (GetUpload); nothing that is there is uploaded again",
        )
    return _stored(found)


def _stored(found: Receipt) -> StoredBlob:
    return StoredBlob(
        blob=found.blob,
        rows=found.rows,
        root=found.root,
        schema_digest=found.schema_digest,
        size_feature_sums=found.size_feature_sums,
        rows_failed=found.rows_failed,
    )
