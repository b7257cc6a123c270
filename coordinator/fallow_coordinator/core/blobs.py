"""Decisions about blobs: whose they are, how many bytes an account may have, and when nobody needs them any more."""

from __future__ import annotations

from fallow.errors import FallowError, Reason
from fallow.ids import Digest
from fallow.limits import BLOB_BYTES_MAX
from fallow_coordinator.core import commands as c
from fallow_coordinator.core import events as e
from fallow_coordinator.core.answers import Decision
from fallow_coordinator.core.bundles import account_of
from fallow_coordinator.core.limits import (
    BLOB_BYTES_PER_ACCOUNT_DEFAULT,
    BLOB_BYTES_PER_ACCOUNT_MAX,
    BLOBS_PER_ACCOUNT_MAX,
    BLOBS_PER_COMMAND_MAX,
    FORGOTTEN_PER_COMMAND_MAX,
)
from fallow_coordinator.core.references import referenced_blobs
from fallow_coordinator.core.state import Account, State


def record_blobs(state: State, command: c.RecordBlobs, now_ms: int) -> Decision:
    """The account has these blobs now; known ones are passed over, or claimed when their record is old.

    Raises ACCOUNT_UNKNOWN, LIMIT_EXCEEDED.
    """
    account = account_of(state, command.account_id)
    _check_count(len(command.blobs))
    fresh: dict[Digest, c.StoredBlob] = {}
    for index, stored in enumerate(command.blobs):
        if not 0 <= stored.blob.length_bytes <= BLOB_BYTES_MAX:
            raise FallowError(
                Reason.LIMIT_EXCEEDED,
                f"the blob has {stored.blob.length_bytes} bytes",
                field=f"blobs[{index}].length_bytes",
                limit=f"{BLOB_BYTES_MAX} bytes",
            )
        digest = stored.blob.digest
        # A row block stays one, though its bytes come again as bytes: what is known never shrinks, nor flips for ever.
        known = account.blobs.get(digest)
        if known is None or (stored.rows and not known.rows):
            fresh[digest] = stored
        elif _record_is_old(account, digest, now_ms, command.grace_ms):
            fresh[digest] = known
    new = [stored for digest, stored in fresh.items() if digest not in account.blobs]
    if len(account.blobs) + len(new) > BLOBS_PER_ACCOUNT_MAX:
        raise FallowError(
            Reason.LIMIT_EXCEEDED,
            "the account holds too many blobs",
            field="blobs",
            limit=f"{BLOBS_PER_ACCOUNT_MAX} blobs",
        )
    check_blob_quota(account, sum(stored.blob.length_bytes for stored in new))
    return Decision(tuple(_recorded(account, stored) for stored in fresh.values()))


def claim_blobs(state: State, command: c.ClaimBlobs, now_ms: int) -> Decision:
    """Old records of blobs that the account still has are made anew. Raises ACCOUNT_UNKNOWN, LIMIT_EXCEEDED."""
    account = account_of(state, command.account_id)
    _check_count(len(command.digests))
    claimed = dict.fromkeys(
        digest
        for digest in command.digests
        if digest in account.blobs and _record_is_old(account, digest, now_ms, command.grace_ms)
    )
    return Decision(tuple(_recorded(account, account.blobs[digest]) for digest in claimed))


def forget_blobs(state: State, command: c.ForgetBlobs, now_ms: int) -> Decision:
    """Those of the blobs to which the state does not refer either: the event names what the blob service may delete.

    Nothing, when a job left the state that the views may not have known: then their word is not enough.
    """
    assert len(command.digests) <= FORGOTTEN_PER_COMMAND_MAX, "the collector asks page by page"
    if state.archived_through > command.view_sequence:
        return Decision()
    kept = referenced_blobs(state, frozenset(command.digests), now_ms=now_ms, grace_ms=command.grace_ms)
    forgotten = tuple(dict.fromkeys(digest for digest in command.digests if digest not in kept))
    return Decision((e.BlobsForgotten(digests=forgotten),) if forgotten else ())


def set_blob_quota(state: State, command: c.SetBlobQuota) -> Decision:
    """How many bytes of uploads the account may have recorded. Raises ACCOUNT_UNKNOWN, LIMIT_EXCEEDED."""
    account = account_of(state, command.account_id)
    if not 0 <= command.bytes_max <= BLOB_BYTES_PER_ACCOUNT_MAX:
        raise FallowError(
            Reason.LIMIT_EXCEEDED,
            f"a quota of {command.bytes_max} bytes",
            field="bytes_max",
            limit=f"0 to {BLOB_BYTES_PER_ACCOUNT_MAX} bytes",
        )
    if account.blob_bytes_max == command.bytes_max:
        return Decision()
    return Decision((e.BlobQuotaSet(account_id=command.account_id, bytes_max=command.bytes_max),))


def blob_quota_of(account: Account) -> int:
    """Bytes of uploads that the account may have recorded."""
    return account.blob_bytes_max or BLOB_BYTES_PER_ACCOUNT_DEFAULT


def check_blob_quota(account: Account, more_bytes: int) -> None:
    """Returns when the account may record so many bytes more. Raises LIMIT_EXCEEDED naming what it has and may have."""
    allowed = blob_quota_of(account)
    if more_bytes and account.blob_bytes + more_bytes > allowed:
        raise FallowError(
            Reason.LIMIT_EXCEEDED,
            f"the account has {account.blob_bytes} of {allowed} bytes of uploads in use; {more_bytes} more are wanted",
            field="uploads",
            limit=f"{allowed} bytes recorded for the account",
            hint="delete jobs that are no longer needed (`fallow job delete`), or ask the operator for a larger quota",
        )


def record_is_old(account: Account, digest: Digest, *, now_ms: int, grace_ms: int) -> bool:
    """Whether the account's record of this blob has so little of its grace left that using it begins a new one."""
    return digest in account.blobs and _record_is_old(account, digest, now_ms, grace_ms)


def _record_is_old(account: Account, digest: Digest, now_ms: int, grace_ms: int) -> bool:
    return now_ms - account.blobs_recorded_at_ms[digest] >= grace_ms // 2


def _recorded(account: Account, stored: c.StoredBlob) -> e.BlobRecorded:
    return e.BlobRecorded(
        account_id=account.account_id,
        blob=stored.blob,
        rows=stored.rows,
        root=stored.root,
        schema_digest=stored.schema_digest,
        size_feature_sums=stored.size_feature_sums,
        rows_failed=stored.rows_failed,
    )


def _check_count(count: int) -> None:
    if count > BLOBS_PER_COMMAND_MAX:
        raise FallowError(
            Reason.LIMIT_EXCEEDED, f"{count} blobs at once", field="blobs", limit=f"{BLOBS_PER_COMMAND_MAX} blobs"
        )
