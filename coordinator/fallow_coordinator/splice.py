"""One port for all three endpoints: connections are told apart by the server name they ask for, and stay unopened.

A process of its own, so that blobs that pass through it take no time from the writer. TLS stays end to end: this
process holds no key and sees no byte in clear beyond the name.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import signal
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, cast

from fallow.errors import FallowError, Reason
from fallow.identity import BLOBS_NAME, CONTROL_NAME, ENROLLMENT_NAME
from fallow.shown_text import log_to_stderr
from fallow_coordinator.client_hello import NoClientHelloError, server_name
from fallow_coordinator.state_folder import port_taken

_log = logging.getLogger(__name__)

HELLO_WAIT_S: Final = 10.0
"""How long a connection may take to say whom it wants."""
CONNECTIONS_MAX: Final = 8_192
CONNECTIONS_PER_ADDRESS_MAX: Final = 1_024
"""A lab of 500 machines behind one address has two connections each."""
NEW_PER_SECOND_MAX: Final = 100.0
NEW_AT_ONCE_MAX: Final = 1_000.0
ADDRESSES_REMEMBERED_MAX: Final = 10_000
_PIECE_BYTES: Final = 64 * 1024


@dataclass(slots=True)
class _Address:
    open: int = 0
    tokens: float = NEW_AT_ONCE_MAX
    at_s: float = field(default_factory=time.monotonic)


class Door:
    """How many connections each address may have and make: behind the splice all peers look the same to gRPC."""

    def __init__(self) -> None:
        self._addresses: OrderedDict[str, _Address] = OrderedDict()
        self.open = 0
        """Connections now."""

    def enters(self, address: str, now_s: float) -> bool:
        """Whether one more connection is let in; `leaves` is called when it has ended."""
        known = self._addresses.setdefault(address, _Address(at_s=now_s))
        self._addresses.move_to_end(address)
        known.tokens = min(NEW_AT_ONCE_MAX, known.tokens + (now_s - known.at_s) * NEW_PER_SECOND_MAX)
        known.at_s = now_s
        if self.open >= CONNECTIONS_MAX or known.open >= CONNECTIONS_PER_ADDRESS_MAX or known.tokens < 1:
            return False
        known.tokens -= 1
        known.open += 1
        self.open += 1
        self._forget_idle()
        return True

    def leaves(self, address: str) -> None:
        """A connection that was let in has ended."""
        self.open -= 1
        self._addresses[address].open -= 1

    def _forget_idle(self) -> None:
        while len(self._addresses) > ADDRESSES_REMEMBERED_MAX:
            address, oldest = self._addresses.popitem(last=False)
            if oldest.open:
                self._addresses[address] = oldest
                return


class Splice:
    """Passes connections on by server name."""

    def __init__(self, routes: Mapping[str, int], host: str) -> None:
        """`routes` are the ports of the endpoints on `host`, by server name."""
        self._routes = routes
        self._host = host
        self._door = Door()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, from its first byte to its last."""
        # asyncio gives the pair, or the four, of the socket's family no type of its own.
        peer = cast("tuple[str, ...] | None", writer.get_extra_info("peername"))
        address = peer[0] if peer else ""
        if not self._door.enters(address, time.monotonic()):
            writer.transport.abort()
            return
        try:
            await self._pass_on(reader, writer)
        except (OSError, TimeoutError, NoClientHelloError) as error:
            _log.debug("splice.refused address=%s error=%s", address, error)
        finally:
            self._door.leaves(address)
            writer.transport.abort()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        hello = b""
        async with asyncio.timeout(HELLO_WAIT_S):
            while (name := server_name(hello)) is None:
                piece = await reader.read(_PIECE_BYTES)
                if not piece:
                    return
                hello += piece
        port = self._routes.get(name)
        if port is None:
            raise NoClientHelloError(f"nobody here is called {name[:80]!r}")
        inner_reader, inner_writer = await asyncio.open_connection(self._host, port)
        try:
            inner_writer.write(hello)
            async with asyncio.TaskGroup() as group:
                group.create_task(_pump(reader, inner_writer))
                group.create_task(_pump(inner_reader, writer))
        except* OSError:
            pass
        finally:
            inner_writer.transport.abort()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while piece := await reader.read(_PIECE_BYTES):
        writer.write(piece)
        await writer.drain()
    with contextlib.suppress(OSError, RuntimeError):
        writer.write_eof()


async def run(host: str, port: int, routes: Mapping[str, int], inner_host: str) -> None:
    """Serves until told to stop. Raises FIELD_INVALID when the port cannot be had."""
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    try:
        server = await asyncio.start_server(Splice(routes, inner_host).serve, host, port, backlog=512)
    except PermissionError:
        raise FallowError(
            Reason.FIELD_INVALID,
            f"port {port} is for privileged processes",
            field="--single-port",
            hint="setcap cap_net_bind_service=+ep on the Python binary, a systemd socket, or a port from 1024 on",
        ) from None
    except OSError as error:
        raise port_taken(host, port, "single", error) from None
    _log.info("splice.started host=%s port=%s", host, port)
    await stopped.wait()
    server.close()


def main() -> None:
    """`python -m fallow_coordinator.splice`, a child of the coordinator."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--listen", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--inner-host", required=True)
    for name in ("enrollment", "control", "blobs"):
        parser.add_argument(f"--{name}", type=int, required=True)
    options = parser.parse_args()
    log_to_stderr("INFO", "%(asctime)s %(levelname)s %(name)s %(message)s")
    routes = {ENROLLMENT_NAME: options.enrollment, CONTROL_NAME: options.control, BLOBS_NAME: options.blobs}
    try:
        asyncio.run(run(options.listen, options.port, routes, options.inner_host))
    except FallowError as error:
        raise SystemExit(f"fallow-coordinator: {error}") from None


if __name__ == "__main__":
    main()
