"""Failed calls: `FallowError` to the trailing metadata of an RPC and back."""

from __future__ import annotations

import grpc
from google.protobuf.message import DecodeError

from fallow.errors import FallowError, Reason
from fallow.v1 import identity_pb2

ERROR_METADATA_KEY = "fallow-error-bin"

_REASON_OF_STATUS: dict[grpc.StatusCode, Reason] = {
    grpc.StatusCode.UNAVAILABLE: Reason.COORDINATOR_UNREACHABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED: Reason.DEADLINE_EXCEEDED,
    grpc.StatusCode.UNAUTHENTICATED: Reason.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED: Reason.PERMISSION_DENIED,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Reason.LIMIT_EXCEEDED,
    grpc.StatusCode.INVALID_ARGUMENT: Reason.MALFORMED_MESSAGE,
    grpc.StatusCode.UNIMPLEMENTED: Reason.PROTOCOL_TOO_OLD,
}


def error_to_message(error: FallowError) -> identity_pb2.ErrorDetail:
    """The wire form of an error: what may be told to the caller, and nothing else."""
    return identity_pb2.ErrorDetail(
        reason=error.reason.value, message=error.message, field=error.field, limit=error.limit, hint=error.hint
    )


def error_from_message(message: identity_pb2.ErrorDetail) -> FallowError:
    """The error a peer told; a reason this version does not know becomes INTERNAL with its name in the message."""
    try:
        reason, text = Reason(message.reason), message.message
    except ValueError:
        reason, text = Reason.INTERNAL, f"{message.reason}: {message.message}"
    return FallowError(reason, text, field=message.field, limit=message.limit, hint=message.hint)


def encode_error(error: FallowError) -> bytes:
    """The value of the metadata entry `fallow-error-bin`."""
    return error_to_message(error).SerializeToString(deterministic=True)


def error_from_rpc(failure: grpc.aio.AioRpcError) -> FallowError:
    """What a failed call means: the detail its server sent, or the nearest reason for a bare status."""
    for key, value in failure.trailing_metadata() or ():
        if key == ERROR_METADATA_KEY and isinstance(value, bytes):
            try:
                return error_from_message(identity_pb2.ErrorDetail.FromString(value))
            except DecodeError:
                break
    reason = _REASON_OF_STATUS.get(failure.code(), Reason.INTERNAL)
    return FallowError(reason, failure.details() or failure.code().name)
