"""The one table from reasons to gRPC statuses, and the way every failed call takes to its caller."""

from __future__ import annotations

import logging
from typing import Any, Final, NoReturn

import grpc

from fallow.errors import FallowError, Reason
from fallow.wire.errors import ERROR_METADATA_KEY, encode_error

_log = logging.getLogger(__name__)

_S = grpc.StatusCode

STATUS_OF: Final[dict[Reason, grpc.StatusCode]] = {
    Reason.MALFORMED_MESSAGE: _S.INVALID_ARGUMENT,
    Reason.FIELD_MISSING: _S.INVALID_ARGUMENT,
    Reason.FIELD_INVALID: _S.INVALID_ARGUMENT,
    Reason.LIMIT_EXCEEDED: _S.INVALID_ARGUMENT,
    Reason.DATA_CLASS_MISSING: _S.INVALID_ARGUMENT,
    Reason.DATASET_EMPTY: _S.INVALID_ARGUMENT,
    Reason.SCHEMA_MISMATCH: _S.INVALID_ARGUMENT,
    Reason.ROW_BLOCK_MALFORMED: _S.INVALID_ARGUMENT,
    Reason.ROW_TOO_LARGE: _S.INVALID_ARGUMENT,
    Reason.BLOCK_TOO_LARGE: _S.INVALID_ARGUMENT,
    Reason.BUNDLE_INVALID: _S.INVALID_ARGUMENT,
    Reason.PROGRAM_REFUSED: _S.FAILED_PRECONDITION,
    Reason.PROGRAM_HELD: _S.FAILED_PRECONDITION,
    Reason.ACCOUNT_UNKNOWN: _S.NOT_FOUND,
    Reason.POOL_UNKNOWN: _S.NOT_FOUND,
    Reason.BUNDLE_UNKNOWN: _S.NOT_FOUND,
    Reason.BUNDLE_UNINSPECTED: _S.FAILED_PRECONDITION,
    Reason.BLOB_UNKNOWN: _S.NOT_FOUND,
    Reason.JOB_UNKNOWN: _S.NOT_FOUND,
    Reason.JOB_DELETED: _S.NOT_FOUND,
    Reason.LEASE_UNKNOWN: _S.NOT_FOUND,
    Reason.WORKER_UNKNOWN: _S.NOT_FOUND,
    Reason.TOKEN_UNKNOWN: _S.NOT_FOUND,
    Reason.UNAUTHENTICATED: _S.UNAUTHENTICATED,
    Reason.CERTIFICATE_EXPIRED: _S.UNAUTHENTICATED,
    Reason.CERTIFICATE_FOREIGN: _S.UNAUTHENTICATED,
    Reason.SIGNATURE_INVALID: _S.INVALID_ARGUMENT,
    Reason.SEQUENCE_REPLAYED: _S.INVALID_ARGUMENT,
    Reason.PERMISSION_DENIED: _S.PERMISSION_DENIED,
    Reason.PARTY_REVOKED: _S.UNAUTHENTICATED,
    Reason.PARTY_QUARANTINED: _S.PERMISSION_DENIED,
    Reason.TOKEN_EXPIRED: _S.PERMISSION_DENIED,
    Reason.TOKEN_USED_UP: _S.PERMISSION_DENIED,
    Reason.TOKEN_SECRET_WRONG: _S.PERMISSION_DENIED,
    Reason.KEY_IN_USE: _S.ALREADY_EXISTS,
    Reason.NAME_TAKEN: _S.ALREADY_EXISTS,
    Reason.GRANT_INVALID: _S.PERMISSION_DENIED,
    Reason.GRANT_EXPIRED: _S.PERMISSION_DENIED,
    Reason.FENCE_STALE: _S.FAILED_PRECONDITION,
    Reason.LEASE_ENDED: _S.FAILED_PRECONDITION,
    Reason.SESSION_REPLACED: _S.ABORTED,
    Reason.JOB_FINISHED: _S.FAILED_PRECONDITION,
    Reason.JOB_UNFINISHED: _S.FAILED_PRECONDITION,
    Reason.INSUFFICIENT_CREDITS: _S.FAILED_PRECONDITION,
    Reason.IDEMPOTENCY_CONFLICT: _S.ALREADY_EXISTS,
    Reason.DIGEST_MISMATCH: _S.INVALID_ARGUMENT,
    Reason.ROOT_MISMATCH: _S.INVALID_ARGUMENT,
    Reason.EVIDENCE_WRONG: _S.INVALID_ARGUMENT,
    Reason.OFFSET_MISMATCH: _S.OUT_OF_RANGE,
    Reason.NONCE_INVALID: _S.FAILED_PRECONDITION,
    Reason.PROTOCOL_TOO_OLD: _S.FAILED_PRECONDITION,
    Reason.PROTOCOL_TOO_NEW: _S.FAILED_PRECONDITION,
    Reason.OVERLOADED: _S.RESOURCE_EXHAUSTED,
    Reason.STORAGE_FULL: _S.RESOURCE_EXHAUSTED,
    Reason.COORDINATOR_STOPPING: _S.UNAVAILABLE,
    Reason.COORDINATOR_UNREACHABLE: _S.UNAVAILABLE,
    Reason.EXECUTOR_UNAVAILABLE: _S.UNAVAILABLE,
    Reason.SANDBOX_INSUFFICIENT: _S.FAILED_PRECONDITION,
    Reason.JOB_FAILED: _S.FAILED_PRECONDITION,
    Reason.JOB_CANCELLED: _S.CANCELLED,
    Reason.DEADLINE_EXCEEDED: _S.DEADLINE_EXCEEDED,
    Reason.INTERNAL: _S.INTERNAL,
}
"""Complete: a reason without a row fails the tests."""

_DETAIL_CHARS_MAX: Final = 1024
"""Of each text of an error: trailing metadata must stay under the peer's header limit."""

_INTERNAL_MESSAGE: Final = "the coordinator made a mistake; it is in its log"


def status_of(error: FallowError) -> grpc.StatusCode:
    """The status that a call failing with `error` ends with."""
    return STATUS_OF[error.reason]


def told(error: BaseException) -> FallowError:
    """What the caller is told: a `FallowError` as it is (shortened), anything else as INTERNAL without its detail."""
    if not isinstance(error, FallowError):
        return FallowError(Reason.INTERNAL, _INTERNAL_MESSAGE)
    return FallowError(
        error.reason,
        error.message[:_DETAIL_CHARS_MAX],
        field=error.field[:_DETAIL_CHARS_MAX],
        limit=error.limit[:_DETAIL_CHARS_MAX],
        hint=error.hint[:_DETAIL_CHARS_MAX],
    )


# A servicer context is generic over message types that an error does not care about.
async def abort(context: grpc.aio.ServicerContext[Any, Any], error: BaseException, method: str) -> NoReturn:
    """Ends the call with the status of `error` and its detail in `fallow-error-bin`; logs what is not told."""
    detail = told(error)
    if not isinstance(error, FallowError):
        _log.error("call.failed method=%s", method, exc_info=error)
    else:
        _log.debug("call.refused method=%s reason=%s message=%s", method, error.reason.value, error.message)
    # Its frames hold the request, and gRPC's own exception, raised next, holds this one for long.
    error.__traceback__ = error.__context__ = None
    await context.abort(
        status_of(detail), detail.message, trailing_metadata=((ERROR_METADATA_KEY, encode_error(detail)),)
    )
    raise AssertionError("abort returns never")
