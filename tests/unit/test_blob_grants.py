"""What opens the blob service, and what does not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fallow.envelope import Domain, sign_payload
from fallow.errors import FallowError, Reason
from fallow.grant_check import checked_grant
from fallow.identity import PrivateKey
from fallow.ids import AccountId, digest_of
from fallow.session import BlobReference, SignedBytes
from fallow.wire.blob import BlobKind, BlobOperation, Grant, encode_grant

NOW_MS = 1_800_000_000_000
COORDINATOR = PrivateKey.generate()
HOLDER = PrivateKey.generate()
GRANT = Grant(
    operation=BlobOperation.PUT,
    blob=BlobReference(digest_of(b"x"), 1),
    kind=BlobKind.OPAQUE,
    account_id=AccountId("account-a"),
    holder_key_fingerprint=HOLDER.fingerprint,
    expires_at_ms=NOW_MS + 1,
)


def signed(grant: Grant, key: PrivateKey = COORDINATOR, domain: Domain = Domain.GRANT) -> SignedBytes:
    payload = encode_grant(grant)
    return SignedBytes(payload, sign_payload(key, domain, payload))


def check(grant: SignedBytes, operation: BlobOperation = BlobOperation.PUT, *, now_ms: int = NOW_MS) -> Grant:
    return checked_grant(
        grant,
        operation=operation,
        coordinator_public_key=COORDINATOR.public_der,
        peer=HOLDER.fingerprint,
        now_ms=now_ms,
    )


def refused(grant: SignedBytes, operation: BlobOperation = BlobOperation.PUT, *, now_ms: int = NOW_MS) -> FallowError:
    with pytest.raises(FallowError) as caught:
        check(grant, operation, now_ms=now_ms)
    return caught.value


def test_a_grant_holds_for_its_holder_and_operation() -> None:
    assert check(signed(GRANT)) == GRANT


def test_a_grant_signed_by_anyone_else_is_refused() -> None:
    error = refused(signed(GRANT, PrivateKey.generate()))
    assert (error.reason, error.field) == (Reason.GRANT_INVALID, "grant.signature")
    assert refused(SignedBytes(encode_grant(GRANT), b"")).reason is Reason.GRANT_INVALID


def test_a_signature_for_another_purpose_is_refused() -> None:
    assert refused(signed(GRANT, domain=Domain.RECEIPT)).field == "grant.signature"


def test_altered_bytes_are_refused() -> None:
    grant = signed(GRANT)
    longer = encode_grant(replace(GRANT, expires_at_ms=NOW_MS + 3_600_000))
    assert refused(SignedBytes(longer, grant.signature)).field == "grant.signature"


def test_a_grant_to_read_does_not_let_write() -> None:
    error = refused(signed(replace(GRANT, operation=BlobOperation.GET)))
    assert (error.reason, error.field) == (Reason.GRANT_INVALID, "grant.operation")
    assert refused(signed(GRANT), BlobOperation.GET).field == "grant.operation"


def test_a_grant_of_another_key_is_refused() -> None:
    stranger = replace(GRANT, holder_key_fingerprint=PrivateKey.generate().fingerprint)
    error = refused(signed(stranger))
    assert (error.reason, error.field) == (Reason.GRANT_INVALID, "grant.holder_key_fingerprint")


def test_a_grant_ends_at_its_moment() -> None:
    error = refused(signed(GRANT), now_ms=GRANT.expires_at_ms)
    assert error.reason is Reason.GRANT_EXPIRED
    assert "ask the coordinator for a new one" in str(error)


def test_signed_bytes_that_are_no_grant_are_refused() -> None:
    payload = b"\xff\xff"
    grant = SignedBytes(payload, sign_payload(COORDINATOR, Domain.GRANT, payload))
    assert refused(grant).reason is Reason.GRANT_INVALID
