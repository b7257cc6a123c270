"""Whether the head of an owner's Ray cluster answers, and lets us in: asked before Ray is, which would not say why.

Ray itself tells a wrong token and a head that is away by the same words, after half a minute. Its head serves
gRPC, so one call with the cluster's token tells them apart at once.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Final, cast

import grpc

from fallow.errors import FallowError, Reason

ASK_SECONDS_MAX: Final = 5.0
"""A head that says nothing for so long does not answer."""
TOKEN_BYTES_MAX: Final = 4096
_METHOD: Final = "/ray.rpc.NodeInfoGcsService/CheckAlive"
_OPTIONS: Final = (("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1))
_REFUSALS: Final = frozenset({grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED})
_SILENCES: Final = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED})


class HeadAnswer(StrEnum):
    """What came of asking."""

    WELL = "well"
    """It answers; also when it answers with an error of another kind, about which Ray will say more."""
    REFUSED = "refused"
    """It does not take our token."""
    SILENT = "silent"
    """Nothing listens there, or it is no Ray."""


def ask_head(address: str, token_path: str) -> HeadAnswer:
    """Asks the head at `host:port` once, within `ASK_SECONDS_MAX`. Blocks."""
    token = _token(token_path)
    metadata = (("authorization", f"Bearer {token}"),) if token else ()
    with grpc.insecure_channel(address, options=_OPTIONS) as channel:
        # Raw bytes both ways: gRPC's types cannot say so.
        call = cast("Callable[..., bytes]", channel.unary_unary(_METHOD))
        try:
            call(b"", timeout=ASK_SECONDS_MAX, metadata=metadata)
        except grpc.RpcError as error:
            code: grpc.StatusCode = error.code()
            if code in _REFUSALS:
                return HeadAnswer.REFUSED
            return HeadAnswer.SILENT if code in _SILENCES else HeadAnswer.WELL
    return HeadAnswer.WELL


async def check_head(address: str, token_path: str) -> None:
    """Returns when the head answers and lets us in. Raises EXECUTOR_UNAVAILABLE, saying what to do."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise FallowError(
            Reason.EXECUTOR_UNAVAILABLE,
            f"{address!r} is no address of a Ray cluster",
            field="ray_address",
            limit="host:port, or nothing for a Ray of this machine alone",
        )
    match await asyncio.to_thread(ask_head, address, token_path):
        case HeadAnswer.WELL:
            return
        case HeadAnswer.REFUSED:
            raise refused(address, token_path)
        case HeadAnswer.SILENT:
            raise silent(address)


def silent(address: str, seconds: float = 0.0) -> FallowError:
    """What to tell the owner of a head that does not answer, or has not for so long."""
    since = f" since {seconds:.0f} s" if seconds else ""
    return FallowError(
        Reason.EXECUTOR_UNAVAILABLE,
        f"no Ray cluster answers at {address}{since}",
        field="ray_address",
        hint="check that `ray start --head` runs there and that the port (6379 by default) can be reached; "
        "the worker goes on by itself when it does",
    )


def refused(address: str, token_path: str) -> FallowError:
    """What to tell the owner whose token the head does not take."""
    ours = f"the token in {token_path} is not the one that" if token_path else "this worker has no token, and"
    return FallowError(
        Reason.EXECUTOR_UNAVAILABLE,
        f"{ours} the Ray cluster at {address} wants",
        field="ray_address",
        hint="put the cluster's token (~/.ray/auth_token on its head) into ~/.ray/auth_token of this worker's user",
    )


def _token(path: str) -> str:
    if not path:
        return ""
    with contextlib.suppress(OSError, UnicodeDecodeError), Path(path).open("rb") as file:
        return file.read(TOKEN_BYTES_MAX).decode("ascii").strip()
    return ""
