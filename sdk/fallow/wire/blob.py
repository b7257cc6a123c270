"""Blob references, grants and receipts to protobuf and back."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from google.protobuf.message import DecodeError

from fallow.errors import FallowError, Reason
from fallow.ids import DIGEST_BYTES, AccountId, Digest, KeyFingerprint, PoolId
from fallow.limits import BLOB_BYTES_MAX
from fallow.session import BlobReference, SignedBytes
from fallow.v1 import blob_pb2
from fallow.wire.enums import EnumTable
from fallow.wire.moments import moment_from_message, moment_to_message


class BlobOperation(StrEnum):
    """What a grant lets its holder do."""

    GET = "get"
    PUT = "put"


class BlobKind(StrEnum):
    """How the blob service looks at an upload."""

    OPAQUE = "opaque"
    ROW_BLOCK = "row-block"


BLOB_OPERATIONS = EnumTable(BlobOperation, blob_pb2.BlobOperation, "BLOB_OPERATION")
BLOB_KINDS = EnumTable(BlobKind, blob_pb2.BlobKind, "BLOB_KIND")


@dataclass(frozen=True, slots=True)
class Grant:
    """Permission to read or write one blob, for one key, until it expires."""

    operation: BlobOperation
    blob: BlobReference
    kind: BlobKind
    account_id: AccountId
    holder_key_fingerprint: KeyFingerprint
    expires_at_ms: int
    cache_pool_id: PoolId | None = None
    """Caches of this pool may hold the blob and give it to the holder; None: none may."""


@dataclass(frozen=True, slots=True)
class Receipt:
    """What the blob service found in a stored upload; from `rows` on for row blocks only."""

    blob: BlobReference
    kind: BlobKind
    account_id: AccountId
    rows: int = 0
    root: Digest | None = None
    schema_digest: Digest | None = None
    size_feature_sums: tuple[int, ...] = ()
    rows_failed: int = 0
    issued_at_ms: int = 0
    """When the blob service gave it out."""


def digest_from(data: bytes, field: str) -> Digest:
    """A digest that came over the wire. Raises FIELD_INVALID unless it has 32 bytes."""
    if len(data) != DIGEST_BYTES:
        raise FallowError(
            Reason.FIELD_INVALID, f"a digest of {len(data)} bytes", field=field, limit=f"{DIGEST_BYTES} bytes"
        )
    return Digest(data)


def reference_to_message(blob: BlobReference) -> blob_pb2.BlobReference:
    """The protobuf form of a reference."""
    return blob_pb2.BlobReference(digest=blob.digest, length_bytes=blob.length_bytes)


def reference_from_message(message: blob_pb2.BlobReference, field: str) -> BlobReference:
    """The reference a message describes. Raises FIELD_INVALID or LIMIT_EXCEEDED."""
    if not 1 <= message.length_bytes <= BLOB_BYTES_MAX:
        raise FallowError(
            Reason.LIMIT_EXCEEDED,
            f"a blob of {message.length_bytes} bytes",
            field=f"{field}.length_bytes",
            limit=f"1 to {BLOB_BYTES_MAX} bytes",
        )
    return BlobReference(digest_from(message.digest, f"{field}.digest"), message.length_bytes)


def encode_grant(grant: Grant) -> bytes:
    """The exact bytes that the coordinator signs."""
    return blob_pb2.BlobGrant(
        operation=BLOB_OPERATIONS.number(grant.operation),
        blob=reference_to_message(grant.blob),
        kind=BLOB_KINDS.number(grant.kind),
        account_id=grant.account_id,
        holder_key_fingerprint=grant.holder_key_fingerprint,
        expires_at=moment_to_message(grant.expires_at_ms),
        cache_pool_id=grant.cache_pool_id or "",
    ).SerializeToString(deterministic=True)


def decode_grant(data: bytes) -> Grant:
    """The grant of signed bytes; check the signature first. Raises GRANT_INVALID."""
    try:
        message = blob_pb2.BlobGrant.FromString(data)
        return Grant(
            operation=BLOB_OPERATIONS.member(message.operation, "grant.operation"),
            blob=reference_from_message(message.blob, "grant.blob"),
            kind=BLOB_KINDS.member(message.kind, "grant.kind"),
            account_id=AccountId(message.account_id),
            holder_key_fingerprint=KeyFingerprint(digest_from(message.holder_key_fingerprint, "grant.holder")),
            expires_at_ms=moment_from_message(message.expires_at),
            cache_pool_id=PoolId(message.cache_pool_id) if message.cache_pool_id else None,
        )
    except (DecodeError, FallowError) as error:
        raise FallowError(Reason.GRANT_INVALID, f"this is no grant: {error}", field="grant") from None


def encode_receipt(receipt: Receipt) -> bytes:
    """The exact bytes that the blob service signs."""
    return blob_pb2.BlobReceipt(
        blob=reference_to_message(receipt.blob),
        kind=BLOB_KINDS.number(receipt.kind),
        account_id=receipt.account_id,
        rows=receipt.rows,
        root=receipt.root or b"",
        schema_digest=receipt.schema_digest or b"",
        size_feature_sums=receipt.size_feature_sums,
        rows_failed=receipt.rows_failed,
        issued_at=moment_to_message(receipt.issued_at_ms) if receipt.issued_at_ms else None,
    ).SerializeToString(deterministic=True)


def decode_receipt(data: bytes) -> Receipt:
    """The receipt of signed bytes; check the signature first. Raises MALFORMED_MESSAGE."""
    try:
        message = blob_pb2.BlobReceipt.FromString(data)
        return Receipt(
            blob=reference_from_message(message.blob, "receipt.blob"),
            kind=BLOB_KINDS.member(message.kind, "receipt.kind"),
            account_id=AccountId(message.account_id),
            rows=message.rows,
            root=digest_from(message.root, "receipt.root") if message.root else None,
            schema_digest=digest_from(message.schema_digest, "receipt.schema_digest")
            if message.schema_digest
            else None,
            size_feature_sums=tuple(message.size_feature_sums),
            rows_failed=message.rows_failed,
            issued_at_ms=moment_from_message(message.issued_at),
        )
    except (DecodeError, FallowError) as error:
        raise FallowError(Reason.MALFORMED_MESSAGE, f"this is no receipt: {error}", field="receipt") from None


def grant_to_message(grant: SignedBytes) -> blob_pb2.SignedBlobGrant:
    """A signed grant for the wire."""
    return blob_pb2.SignedBlobGrant(grant=grant.payload, signature=grant.signature)


def grant_from_message(message: blob_pb2.SignedBlobGrant) -> SignedBytes:
    """A signed grant from the wire, not yet checked."""
    return SignedBytes(message.grant, message.signature)


def receipt_to_message(receipt: SignedBytes) -> blob_pb2.SignedBlobReceipt:
    """A signed receipt for the wire."""
    return blob_pb2.SignedBlobReceipt(receipt=receipt.payload, signature=receipt.signature)


def receipt_from_message(message: blob_pb2.SignedBlobReceipt) -> SignedBytes:
    """A signed receipt from the wire, not yet checked."""
    return SignedBytes(message.receipt, message.signature)
