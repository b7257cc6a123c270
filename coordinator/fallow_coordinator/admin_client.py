"""The command line's way to a running coordinator: AdminService with the operator credentials of the state folder."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import grpc

from fallow.channel import control_channel
from fallow.credentials import Credentials
from fallow.errors import FallowError, Reason
from fallow.places import local_client_folder
from fallow.v1 import admin_service_pb2_grpc, ledger_service_pb2_grpc
from fallow.wire.errors import error_from_rpc

CALL_TIME_MAX_S: Final = 20.0


@asynccontextmanager
async def admin_stub(state: Path) -> AsyncGenerator[admin_service_pb2_grpc.AdminServiceAsyncStub, None]:
    """A stub for the coordinator on this state folder. Raises FallowError, of its own calls and of the block's."""
    async with _channel(state) as channel:
        yield admin_service_pb2_grpc.AdminServiceStub(channel)


@asynccontextmanager
async def ledger_stub(state: Path) -> AsyncGenerator[ledger_service_pb2_grpc.LedgerServiceAsyncStub, None]:
    """As `admin_stub`, for the ledger service."""
    async with _channel(state) as channel:
        yield ledger_service_pb2_grpc.LedgerServiceStub(channel)


@asynccontextmanager
async def _channel(state: Path) -> AsyncGenerator[grpc.aio.Channel, None]:
    try:
        credentials = Credentials.load(local_client_folder(state))
    except FallowError:
        raise FallowError(
            Reason.COORDINATOR_UNREACHABLE,
            f"no coordinator has been started on {state} by this user",
            field=str(state),
            hint="start one with `fallow-coordinator start`, or name its folder with --state",
        ) from None
    async with control_channel(credentials) as channel:
        try:
            yield channel
        except grpc.aio.AioRpcError as failure:
            raise error_from_rpc(failure) from None
