"""Everything that can go wrong for a user: a reason for programs, a message for people."""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """One cause each; the coordinator's table maps every one of them to a gRPC status."""

    # What was asked for is malformed.
    MALFORMED_MESSAGE = "MALFORMED_MESSAGE"
    FIELD_MISSING = "FIELD_MISSING"
    FIELD_INVALID = "FIELD_INVALID"
    LIMIT_EXCEEDED = "LIMIT_EXCEEDED"
    DATA_CLASS_MISSING = "DATA_CLASS_MISSING"
    DATASET_EMPTY = "DATASET_EMPTY"
    SCHEMA_MISMATCH = "SCHEMA_MISMATCH"
    ROW_BLOCK_MALFORMED = "ROW_BLOCK_MALFORMED"
    ROW_TOO_LARGE = "ROW_TOO_LARGE"
    BLOCK_TOO_LARGE = "BLOCK_TOO_LARGE"
    BUNDLE_INVALID = "BUNDLE_INVALID"
    PROGRAM_REFUSED = "PROGRAM_REFUSED"
    PROGRAM_HELD = "PROGRAM_HELD"
    # What was named is not there, or not yours.
    ACCOUNT_UNKNOWN = "ACCOUNT_UNKNOWN"
    POOL_UNKNOWN = "POOL_UNKNOWN"
    BUNDLE_UNKNOWN = "BUNDLE_UNKNOWN"
    BUNDLE_UNINSPECTED = "BUNDLE_UNINSPECTED"
    BLOB_UNKNOWN = "BLOB_UNKNOWN"
    JOB_UNKNOWN = "JOB_UNKNOWN"
    JOB_DELETED = "JOB_DELETED"
    LEASE_UNKNOWN = "LEASE_UNKNOWN"
    WORKER_UNKNOWN = "WORKER_UNKNOWN"
    TOKEN_UNKNOWN = "TOKEN_UNKNOWN"
    # Who is asking.
    UNAUTHENTICATED = "UNAUTHENTICATED"
    CERTIFICATE_EXPIRED = "CERTIFICATE_EXPIRED"
    CERTIFICATE_FOREIGN = "CERTIFICATE_FOREIGN"
    SIGNATURE_INVALID = "SIGNATURE_INVALID"
    SEQUENCE_REPLAYED = "SEQUENCE_REPLAYED"
    PERMISSION_DENIED = "PERMISSION_DENIED"
    PARTY_REVOKED = "PARTY_REVOKED"
    PARTY_QUARANTINED = "PARTY_QUARANTINED"
    TOKEN_EXPIRED = "TOKEN_EXPIRED"
    TOKEN_USED_UP = "TOKEN_USED_UP"
    TOKEN_SECRET_WRONG = "TOKEN_SECRET_WRONG"
    KEY_IN_USE = "KEY_IN_USE"
    NAME_TAKEN = "NAME_TAKEN"
    GRANT_INVALID = "GRANT_INVALID"
    GRANT_EXPIRED = "GRANT_EXPIRED"
    # The state of things forbids it.
    FENCE_STALE = "FENCE_STALE"
    LEASE_ENDED = "LEASE_ENDED"
    SESSION_REPLACED = "SESSION_REPLACED"
    JOB_FINISHED = "JOB_FINISHED"
    JOB_UNFINISHED = "JOB_UNFINISHED"
    INSUFFICIENT_CREDITS = "INSUFFICIENT_CREDITS"
    IDEMPOTENCY_CONFLICT = "IDEMPOTENCY_CONFLICT"
    DIGEST_MISMATCH = "DIGEST_MISMATCH"
    ROOT_MISMATCH = "ROOT_MISMATCH"
    EVIDENCE_WRONG = "EVIDENCE_WRONG"
    OFFSET_MISMATCH = "OFFSET_MISMATCH"
    NONCE_INVALID = "NONCE_INVALID"
    PROTOCOL_TOO_OLD = "PROTOCOL_TOO_OLD"
    PROTOCOL_TOO_NEW = "PROTOCOL_TOO_NEW"
    # The machine or the service cannot.
    OVERLOADED = "OVERLOADED"
    STORAGE_FULL = "STORAGE_FULL"
    COORDINATOR_STOPPING = "COORDINATOR_STOPPING"
    COORDINATOR_UNREACHABLE = "COORDINATOR_UNREACHABLE"
    EXECUTOR_UNAVAILABLE = "EXECUTOR_UNAVAILABLE"
    SANDBOX_INSUFFICIENT = "SANDBOX_INSUFFICIENT"
    # A job or task ended badly.
    JOB_FAILED = "JOB_FAILED"
    JOB_CANCELLED = "JOB_CANCELLED"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    INTERNAL = "INTERNAL"


class FallowError(Exception):
    """A mistake or misfortune outside this program: what was wrong, where, what is allowed, what to do."""

    def __init__(
        self,
        reason: Reason,
        message: str,
        *,
        field: str = "",
        limit: str = "",
        hint: str = "",
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.field = field
        """The path of the offending field, `blocks[3].rows`, or empty."""
        self.limit = limit
        """What is allowed, in words with a unit, or empty."""
        self.hint = hint
        """What to do about it, or empty."""

    def __str__(self) -> str:
        parts = [self.message]
        if self.field:
            parts.append(f"(field: {self.field})")
        if self.limit:
            parts.append(f"(allowed: {self.limit})")
        if self.hint:
            parts.append(f"— {self.hint}")
        return " ".join(parts)
