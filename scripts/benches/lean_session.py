"""A worker's stream with as little work as the protocol allows: HTTP/2 and gRPC framing by hand over blocking-free TLS.

What goes over the wire is what a worker daemon sends (mutual TLS, HTTP/2, one signed protobuf message a task); only the
client library is missing, which would cost more than the coordinator it is to load.
"""

from __future__ import annotations

import ssl
import struct
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Final

from fallow.credentials import Credentials
from fallow.identity import CONTROL_NAME
from fallow.v1 import worker_service_pb2 as pb

_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
_END_STREAM, _ACK, _END_HEADERS, _PADDED = 0x1, 0x1, 0x4, 0x8
_INITIAL_WINDOW_SIZE: Final = 4
_WINDOW_BYTES_MAX: Final = 2**31 - 1
_WINDOW_BYTES_DEFAULT: Final = 65_535
_STREAM: Final = 1
_FRAME: Final = struct.Struct(">HBBBI")
_PREFIX: Final = struct.Struct(">BI")
_READ_BYTES: Final = 65_536


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """One HTTP/2 frame (RFC 9113 §4.1)."""
    length = len(payload)
    return _FRAME.pack(length >> 8, length & 0xFF, kind, flags, stream) + payload


def _literal(name: str, value: str) -> bytes:
    """A header field without indexing and without Huffman coding (RFC 7541 §6.2.2); both shorter than 127 bytes."""
    return b"".join((b"\x00", bytes((len(name),)), name.encode(), bytes((len(value),)), value.encode()))


_REQUEST_HEADERS: Final = b"".join(
    _literal(name, value)
    for name, value in (
        (":method", "POST"),
        (":scheme", "https"),
        (":path", "/fallow.v1.WorkerService/Session"),
        (":authority", CONTROL_NAME),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
        ("user-agent", "fallow-bench"),
    )
)


def tls_context(credentials: Credentials, folder: Path) -> ssl.SSLContext:
    """Mutual TLS as this party; its key must lie in `folder`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=credentials.authority_pem.decode())
    context.load_cert_chain(folder / "certificate.pem", folder / "key.pem")
    context.set_alpn_protocols(["h2"])
    return context


class StreamEnded(Exception):
    """The coordinator, or the connection, ended the stream."""


class LeanStream:
    """One bidirectional gRPC stream on its own connection. Nothing here waits: whoever owns it polls the socket."""

    __slots__ = (
        "_buffer",
        "_connection_window",
        "_initial_window",
        "_message",
        "_pending",
        "_stream_window",
        "_wanted",
        "on_message",
        "tls",
    )

    def __init__(self, tls: ssl.SSLSocket, on_message: Callable[[bytes], None]) -> None:
        """`tls` is connected, shaken hands with, and does not block; `on_message` hears each message's bytes."""
        self.tls = tls
        self.on_message = on_message
        self._buffer = bytearray()
        self._message = bytearray()
        self._connection_window = _WINDOW_BYTES_DEFAULT
        self._stream_window = self._initial_window = _WINDOW_BYTES_DEFAULT
        self._wanted: deque[bytes] = deque()
        """Messages that wait for the coordinator's flow control."""
        self._pending = bytearray()
        """Bytes that the socket did not take yet."""
        settings = struct.pack(">HI", _INITIAL_WINDOW_SIZE, _WINDOW_BYTES_MAX)
        self._write(
            b"".join(
                (
                    _PREFACE,
                    frame(_SETTINGS, 0, 0, settings),
                    frame(_WINDOW_UPDATE, 0, 0, struct.pack(">I", _WINDOW_BYTES_MAX - _WINDOW_BYTES_DEFAULT)),
                    frame(_HEADERS, _END_HEADERS, _STREAM, _REQUEST_HEADERS),
                )
            )
        )

    def send(self, request: pb.SessionRequest) -> None:
        """Sends one message, or keeps it until flow control lets it go."""
        payload = request.SerializeToString()
        self._wanted.append(_PREFIX.pack(0, len(payload)) + payload)
        self._send_wanted()

    def flush(self) -> None:
        """Gives the socket what it did not take before."""
        if self._pending:
            pending, self._pending = bytes(self._pending), bytearray()
            self._write(pending)

    def receive(self) -> None:
        """Reads all that is there. Raises StreamEnded."""
        while True:
            try:
                data = self.tls.recv(_READ_BYTES)
            except ssl.SSLWantReadError:
                return
            except OSError as error:
                raise StreamEnded(f"the connection broke: {error}") from None
            if not data:
                raise StreamEnded("the connection ended")
            self._take(data)
            if not self.tls.pending():
                return

    def close(self) -> None:
        """Drops the connection without a word."""
        self.tls.close()

    def _take(self, data: bytes) -> None:
        buffer = self._buffer
        buffer += data
        start, end = 0, len(buffer)
        while end - start >= 9:
            high, low, kind, flags, stream = _FRAME.unpack_from(buffer, start)
            after = start + 9 + (high << 8 | low)
            if after > end:
                break
            if kind == _DATA:
                self._data(bytes(buffer[start + 9 : after]), flags)
            else:
                self._control(kind, flags, stream, bytes(buffer[start + 9 : after]))
            start = after
        del buffer[:start]

    def _data(self, payload: bytes, flags: int) -> None:
        if flags & _PADDED:
            payload = payload[1 : len(payload) - payload[0]]
        message = self._message
        message += payload
        while len(message) >= 5:
            length = int.from_bytes(message[1:5], "big")
            if len(message) < 5 + length:
                return
            whole = bytes(message[5 : 5 + length])
            del message[: 5 + length]
            self.on_message(whole)

    def _control(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == _WINDOW_UPDATE:
            increment = int.from_bytes(payload, "big")
            if stream:
                self._stream_window += increment
            else:
                self._connection_window += increment
            self._send_wanted()
        elif kind == _SETTINGS and not flags & _ACK:
            for start in range(0, len(payload), 6):
                name, value = struct.unpack_from(">HI", payload, start)
                if name == _INITIAL_WINDOW_SIZE:
                    self._stream_window += value - self._initial_window
                    self._initial_window = value
            self._write(frame(_SETTINGS, _ACK, 0, b""))
        elif kind == _PING and not flags & _ACK:
            self._write(frame(_PING, _ACK, 0, payload))
        elif kind in (_RST_STREAM, _GOAWAY) or (kind == _HEADERS and flags & _END_STREAM):
            raise StreamEnded("the coordinator ended the stream")

    def _send_wanted(self) -> None:
        while self._wanted and len(self._wanted[0]) <= min(self._connection_window, self._stream_window):
            message = self._wanted.popleft()
            self._connection_window -= len(message)
            self._stream_window -= len(message)
            self._write(frame(_DATA, 0, _STREAM, message))

    def _write(self, data: bytes) -> None:
        if not self._pending:
            try:
                sent = self.tls.send(data)
            except (ssl.SSLWantWriteError, ssl.SSLWantReadError):
                sent = 0
            except OSError as error:
                raise StreamEnded(f"the connection broke: {error}") from None
            data = data[sent:]
        self._pending += data
