"""How commands ask the coordinator of this user on this machine, and tell what it said."""

from __future__ import annotations

import asyncio
import datetime
import json
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TypeVar

import click
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from fallow.shown_text import shown
from fallow.v1 import admin_service_pb2_grpc, ledger_service_pb2_grpc
from fallow_coordinator.admin_client import admin_stub, ledger_stub

ResponseT = TypeVar("ResponseT", bound=Message)
StubT = TypeVar("StubT")


def ask(state: Path, call: Callable[[admin_service_pb2_grpc.AdminServiceAsyncStub], Awaitable[ResponseT]]) -> ResponseT:
    """What the admin service answers. Raises FallowError."""
    return _asked(admin_stub(state.expanduser().absolute()), call)


def ask_ledger(
    state: Path, call: Callable[[ledger_service_pb2_grpc.LedgerServiceAsyncStub], Awaitable[ResponseT]]
) -> ResponseT:
    """What the ledger service answers. Raises FallowError."""
    return _asked(ledger_stub(state.expanduser().absolute()), call)


def _asked(opened: AbstractAsyncContextManager[StubT], call: Callable[[StubT], Awaitable[ResponseT]]) -> ResponseT:
    async def asking() -> ResponseT:
        async with opened as stub:
            return await call(stub)

    return asyncio.run(asking())


def tell(message: Message, as_json: bool, words: str) -> None:
    """Prints the message as JSON, or the words."""
    if as_json:
        click.echo(
            json.dumps(
                MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
            )
        )
    else:
        click.echo(shown(words))


def table(heads: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Heads and rows in columns."""
    widths = [max(len(line[column]) for line in (heads, *rows)) for column in range(len(heads))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in (heads, *rows))
    return "\n".join(line.rstrip() for line in lines)


def moment(at_ms: int) -> str:
    """A moment in the time of this machine."""
    return datetime.datetime.fromtimestamp(at_ms / 1000).astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")
