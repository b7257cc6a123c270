"""What the service says about a stored upload, and its memory of which account has shown the bytes of which blob.

A blob may be here because another account uploaded it. That alone must help nobody: whoever only knows a digest would
otherwise get a receipt, and with it the content. So an account gets a receipt once it has uploaded the bytes itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from operator import eq

from fallow.envelope import Domain, sign_payload
from fallow.errors import FallowError
from fallow.identity import PrivateKey
from fallow.row_block import RowBlock
from fallow.session import SignedBytes
from fallow.wire.blob import BlobKind, Grant, Receipt, decode_receipt, encode_receipt
from fallow_coordinator.blobs.storage import BlobStorage, Buffer
from fallow_coordinator.blobs.uploads import account_name


def receipt_of(grant: Grant, data: Callable[[], Buffer], *, now_ms: int = 0) -> Receipt:
    """What is to be said about an upload of these bytes; `data` is asked for row blocks only. Blocks: call in a thread.

    Raises ROW_BLOCK_MALFORMED, ROW_TOO_LARGE or BLOCK_TOO_LARGE.
    """
    if grant.kind is BlobKind.OPAQUE:
        return Receipt(blob=grant.blob, kind=grant.kind, account_id=grant.account_id, issued_at_ms=now_ms)
    block = RowBlock.parse(data())
    return Receipt(
        blob=grant.blob,
        kind=grant.kind,
        account_id=grant.account_id,
        rows=len(block),
        root=block.root(),
        schema_digest=block.schema_digest,
        size_feature_sums=block.size_feature_sums,
        rows_failed=_empty_rows(block),
        issued_at_ms=now_ms,
    )


class Receipts:
    """Receipts by blob and account, kept as notes beside the blobs; signed anew whenever they are given out."""

    def __init__(self, storage: BlobStorage, key: PrivateKey) -> None:
        """`key` signs."""
        self._storage = storage
        self._key = key

    async def keep(self, receipt: Receipt) -> SignedBytes:
        """Remembers that the account has shown these bytes; the receipt to give out once the blob is stored."""
        payload = encode_receipt(receipt)
        await self._storage.put_note(receipt.blob.digest, account_name(receipt.account_id), payload)
        return self._signed(payload)

    async def find(self, grant: Grant, *, now_ms: int) -> SignedBytes | None:
        """A fresh receipt for an earlier upload of this blob by this account; None when an upload is needed."""
        note = await self._storage.note(grant.blob.digest, account_name(grant.account_id))
        if note is None or await self._storage.size(grant.blob.digest) != grant.blob.length_bytes:
            return None
        try:
            held = decode_receipt(note)
        except FallowError:
            # Torn by a power loss: the account uploads once more.
            return None
        if (held.blob, held.kind, held.account_id) != (grant.blob, grant.kind, grant.account_id):
            return None
        return self._signed(encode_receipt(replace(held, issued_at_ms=now_ms)))

    def _signed(self, payload: bytes) -> SignedBytes:
        return SignedBytes(payload, sign_payload(self._key, Domain.RECEIPT, payload))


def _empty_rows(block: RowBlock) -> int:
    offsets = block.offsets
    return sum(map(eq, offsets[:-1], offsets[1:]))
