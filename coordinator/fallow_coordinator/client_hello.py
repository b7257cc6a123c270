"""The server name in a TLS ClientHello (RFC 8446 §4.1.2, RFC 6066 §3), read without ending TLS."""

from __future__ import annotations

from typing import Final

HELLO_BYTES_MAX: Final = 32 * 1024
"""Longest ClientHello that is waited for; those of today have one or two thousand bytes."""
_RECORD_HEADER = 5
_HANDSHAKE, _CLIENT_HELLO, _SERVER_NAME, _HOST_NAME = 22, 1, 0, 0


class NoClientHelloError(ValueError):
    """These bytes do not begin a TLS connection."""


def server_name(data: bytes) -> str | None:
    """The name that a client asks for, empty when it names none; None while more bytes are wanted.

    Raises NoClientHelloError.
    """
    if len(data) > HELLO_BYTES_MAX:
        raise NoClientHelloError("the ClientHello is too long")
    hello = _handshake(data)
    return None if hello is None else _name_in(_Reader(hello))


def _handshake(data: bytes) -> bytes | None:
    """The body of the ClientHello, which may span several records; None while it is not complete."""
    body = b""
    at = 0
    while at + _RECORD_HEADER <= len(data):
        if data[at] != _HANDSHAKE or data[at + 1] != 3:
            raise NoClientHelloError("no TLS handshake")
        length = int.from_bytes(data[at + 3 : at + 5], "big")
        body += data[at + _RECORD_HEADER : at + _RECORD_HEADER + length]
        at += _RECORD_HEADER + length
        if len(body) >= 4:
            if body[0] != _CLIENT_HELLO:
                raise NoClientHelloError("no ClientHello")
            wanted = 4 + int.from_bytes(body[1:4], "big")
            if wanted > HELLO_BYTES_MAX:
                raise NoClientHelloError("the ClientHello is too long")
            if len(body) >= wanted:
                return body[4:wanted]
    if data and data[0] != _HANDSHAKE:
        raise NoClientHelloError("no TLS handshake")
    return None


class _Reader:
    """Takes bytes off the front, never beyond the end."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, count: int) -> bytes:
        """The next bytes."""
        if count > len(self._data) - self._at:
            raise NoClientHelloError("the ClientHello is cut off")
        self._at += count
        return self._data[self._at - count : self._at]

    def vector(self, length_bytes: int) -> bytes:
        """The next length-prefixed field."""
        return self.take(int.from_bytes(self.take(length_bytes), "big"))

    @property
    def at_end(self) -> bool:
        """Nothing is left."""
        return self._at == len(self._data)


def _name_in(hello: _Reader) -> str:
    hello.take(2 + 32)  # version, random
    hello.vector(1)  # session
    hello.vector(2)  # cipher suites
    hello.vector(1)  # compression
    if hello.at_end:
        return ""
    extensions = _Reader(hello.vector(2))
    while not extensions.at_end:
        kind = int.from_bytes(extensions.take(2), "big")
        body = extensions.vector(2)
        if kind == _SERVER_NAME:
            names = _Reader(_Reader(body).vector(2))
            while not names.at_end:
                name_kind = names.take(1)[0]
                name = names.vector(2)
                if name_kind == _HOST_NAME:
                    return name.decode("ascii", "replace").lower()
    return ""
