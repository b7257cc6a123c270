"""The table from reasons to statuses, and what callers are told."""

from __future__ import annotations

import grpc
import pytest

from fallow.errors import FallowError, Reason
from fallow_coordinator.service.errors import STATUS_OF, status_of, told


def test_every_reason_has_a_status() -> None:
    assert set(STATUS_OF) == set(Reason)


def test_no_reason_looks_like_success_or_like_nothing() -> None:
    assert not set(STATUS_OF.values()) & {grpc.StatusCode.OK, grpc.StatusCode.UNKNOWN}


@pytest.mark.parametrize(
    ("reason", "status"),
    [
        (Reason.BLOB_UNKNOWN, grpc.StatusCode.NOT_FOUND),
        (Reason.TOKEN_USED_UP, grpc.StatusCode.PERMISSION_DENIED),
        (Reason.CERTIFICATE_EXPIRED, grpc.StatusCode.UNAUTHENTICATED),
        (Reason.KEY_IN_USE, grpc.StatusCode.ALREADY_EXISTS),
        (Reason.SESSION_REPLACED, grpc.StatusCode.ABORTED),
        (Reason.PROTOCOL_TOO_OLD, grpc.StatusCode.FAILED_PRECONDITION),
        (Reason.OVERLOADED, grpc.StatusCode.RESOURCE_EXHAUSTED),
        (Reason.COORDINATOR_STOPPING, grpc.StatusCode.UNAVAILABLE),
        (Reason.OFFSET_MISMATCH, grpc.StatusCode.OUT_OF_RANGE),
    ],
)
def test_statuses_are_those_of_the_contract(reason: Reason, status: grpc.StatusCode) -> None:
    assert status_of(FallowError(reason, "x")) is status


def test_what_was_not_meant_for_callers_is_not_told() -> None:
    detail = told(KeyError("secret-path"))
    assert detail.reason is Reason.INTERNAL
    assert "secret-path" not in str(detail)


def test_long_details_are_shortened_so_that_headers_fit() -> None:
    detail = told(
        FallowError(Reason.FIELD_INVALID, "m" * 9_000, field="f" * 9_000, limit="l" * 9_000, hint="h" * 9_000)
    )
    assert len(str(detail)) < 5_000
    assert detail.reason is Reason.FIELD_INVALID
