"""Very many calls over a few HTTP/2 connections whose frames are made by hand: a client that costs next to nothing.

gRPC's own client costs as much as its server; with this one, nearly all of the time goes to whoever is attacked.
Run as a program it reads a plan from its standard input and prints how often each status came.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import sys
import time
from collections import Counter
from collections.abc import Callable
from importlib import import_module
from random import Random
from typing import TypedDict

from adversarial.mutations import filled, mutated

IN_FLIGHT_MAX = 64
"""Calls of one connection at once, unless the server allows fewer: it refuses what is beyond."""
FRAME_BYTES_MAX = 16_384
CORPUS_MESSAGES = 500
"""Messages of a method that are made from its descriptor; mutations of them are cheap."""
ONLY_FILLED_SHARE = 0.25
"""Of all messages: well-formed ones with fields by chance, which come further than those that are no protobuf."""
RECONNECTS_MAX = 50
_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
_END_STREAM, _END_HEADERS, _ACK = 1, 4, 1
_STREAMS_MAX = 3
_STATUS = b"grpc-status"


class Way(TypedDict):
    """Files of one party; without a certificate it comes as a stranger."""

    authority: str
    certificate: str
    key: str


class Plan(TypedDict):
    """One method, and how it is to be flooded."""

    endpoint: str
    server_name: str
    path: str
    module: str
    """Of `fallow.v1`, which holds the message."""
    message: str
    timeout: str
    """Of each call, as gRPC writes it."""
    ways: list[Way]
    """One connection each."""
    count: int
    seconds: float
    seed: int


class Over(Exception):
    """The connection has ended."""


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """One HTTP/2 frame."""
    return len(payload).to_bytes(3) + bytes((kind, flags)) + stream.to_bytes(4) + payload


def headers_of(path: str, authority: str, timeout: str) -> bytes:
    """A header block without compression, the same for every call."""

    def text(value: str) -> bytes:
        raw = value.encode()
        assert len(raw) < 127, value
        return bytes((len(raw),)) + raw

    return (
        b"\x83\x87\x04" + text(path) + b"\x01" + text(authority) + b"\x0f\x10" + text("application/grpc")
        + b"\x00" + text("te") + text("trailers") + b"\x00" + text("grpc-timeout") + text(timeout)
    )  # fmt: skip


class Connection:
    """One connection with many calls in flight."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, headers: bytes) -> None:
        self._reader, self._writer, self._headers = reader, writer, headers
        self._window_bytes = 65_535
        self._in_flight_max = 1
        self._next = 1
        self._open: dict[int, str] = {}
        """Calls without an end, and what is known of their status."""
        self._changed = asyncio.Event()
        self._over = False
        self.answers: Counter[str] = Counter()
        # No dynamic table, so that a status can be read without a decoder, and no flow control towards us.
        settings = b"\x00\x01\x00\x00\x00\x00" + b"\x00\x04\x7f\xff\xff\xff"
        greeting = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(_SETTINGS, 0, 0, settings)
        writer.write(greeting + frame(_WINDOW_UPDATE, 0, 0, (2**31 - 1 - 65_535).to_bytes(4)))

    async def call(self, message: bytes) -> None:
        """Sends a call once there is room for it. Raises Over."""
        data = b"\x00" + len(message).to_bytes(4) + message
        while not self._over and (len(self._open) >= self._in_flight_max or len(data) > self._window_bytes):
            self._changed.clear()
            await self._changed.wait()
        if self._over or self._next > 2**31 - 3:
            raise Over
        stream, self._next = self._next, self._next + 2
        self._open[stream] = ""
        self._window_bytes -= len(data)
        self._writer.write(frame(_HEADERS, _END_HEADERS, stream, self._headers))
        for start in range(0, len(data), FRAME_BYTES_MAX):
            last = start + FRAME_BYTES_MAX >= len(data)
            piece = data[start : start + FRAME_BYTES_MAX]
            self._writer.write(frame(_DATA, _END_STREAM if last else 0, stream, piece))

    async def finish(self) -> None:
        """Waits until every call has ended, or the connection has."""
        while self._open and not self._over:
            self._changed.clear()
            await self._changed.wait()

    async def read(self) -> None:
        """Counts answers until the connection ends."""
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                head = await self._reader.readexactly(9)
                kind, flags, stream = head[3], head[4], int.from_bytes(head[5:]) & 0x7FFFFFFF
                self._heard(kind, flags, stream, await self._reader.readexactly(int.from_bytes(head[:3])))
        self._over = True
        self.answers["cut"] += len(self._open)
        self._changed.set()

    def _heard(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == _SETTINGS and not flags & _ACK:
            settings = {payload[at + 1]: int.from_bytes(payload[at + 2 : at + 6]) for at in range(0, len(payload), 6)}
            self._in_flight_max = min(IN_FLIGHT_MAX, settings.get(_STREAMS_MAX, IN_FLIGHT_MAX))
            self._changed.set()
            self._writer.write(frame(_SETTINGS, _ACK, 0, b""))
        elif kind == _PING and not flags & _ACK:
            self._writer.write(frame(_PING, _ACK, 0, payload))
        elif kind == _WINDOW_UPDATE and not stream:
            self._window_bytes += int.from_bytes(payload)
            self._changed.set()
        elif kind == _GOAWAY:
            self._over = True
            self._changed.set()
        elif kind == _HEADERS and stream in self._open:
            place = payload.find(_STATUS)
            if place >= 0:
                length = payload[place + len(_STATUS)]
                self._open[stream] = payload[place + len(_STATUS) + 1 :][:length].decode()
        if kind == _RST_STREAM or (kind in (_DATA, _HEADERS) and flags & _END_STREAM):
            status = self._open.pop(stream, None)
            if status is not None:
                self.answers[status or f"reset-{int.from_bytes(payload)}"] += 1
                self._changed.set()


def messages_of(module: str, message: str, seed: int) -> Callable[[], bytes]:
    """Gives one message after the other: mutated ones, and some that are well-formed and filled by chance."""
    chance = Random(seed)
    descriptor = import_module(f"fallow.v1.{module}").DESCRIPTOR.message_types_by_name[message]
    corpus = [filled(descriptor, chance).SerializeToString() for _ in range(CORPUS_MESSAGES)]

    def next_message() -> bytes:
        raw = chance.choice(corpus)
        return raw if chance.random() < ONLY_FILLED_SHARE else mutated(raw, chance)

    return next_message


async def flood(plan: Plan) -> Counter[str]:
    """Sends so many messages, or what time allows, over one connection for each way; counts the statuses."""
    left = iter(range(plan["count"]))
    deadline_s = time.monotonic() + plan["seconds"]
    answers: Counter[str] = Counter()
    next_message = messages_of(plan["module"], plan["message"], plan["seed"])

    async def one_way(way: Way) -> None:
        context = ssl.create_default_context(cafile=way["authority"])
        context.set_alpn_protocols(["h2"])
        if way["certificate"]:
            context.load_cert_chain(way["certificate"], way["key"])
        host, _, port = plan["endpoint"].rpartition(":")
        headers = headers_of(plan["path"], plan["server_name"], plan["timeout"])
        for _ in range(RECONNECTS_MAX):
            pair = await asyncio.open_connection(host, int(port), ssl=context, server_hostname=plan["server_name"])
            connection = Connection(*pair, headers)
            reading = asyncio.create_task(connection.read())
            try:
                for number in left:
                    if number % 64 == 0 and time.monotonic() > deadline_s:
                        break
                    await connection.call(next_message())
                await connection.finish()
                return
            except (Over, OSError):
                answers["reconnected"] += 1
            finally:
                # Without the farewell of TLS, which gRPC's servers take their time to answer.
                pair[1].transport.abort()
                await reading
                answers.update(connection.answers)
        raise AssertionError(f"cut off {RECONNECTS_MAX} times")

    await asyncio.gather(*(one_way(way) for way in plan["ways"]))
    return answers


def main() -> None:
    """Carries out one plan for each line of standard input, and answers with a line for each."""
    for line in sys.stdin:
        plan: Plan = json.loads(line)
        print(json.dumps(asyncio.run(flood(plan))), flush=True)


if __name__ == "__main__":
    main()
