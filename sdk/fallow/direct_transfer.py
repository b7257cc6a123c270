"""Bytes sent to, or read from, the blob service's storage itself: one HTTP request that a grant was answered with.

Everything here blocks: call it in a thread. The digest is checked by whoever reads; of an upload the service reads back
what arrived. So nothing is believed that comes this way, and whoever is refused goes through the service.
"""

from __future__ import annotations

import http.client
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Protocol
from urllib.parse import urlsplit

from fallow.limits import BLOB_CHUNK_BYTES
from fallow.v1 import blob_service_pb2

DIRECT_BYTES_MIN: Final = 2 * 1024 * 1024
"""Smaller blobs always go through the service."""
STAND_STILL_S_MAX: Final = 60.0
"""How long a request may stand still."""
_LOOPBACK: Final = frozenset({"127.0.0.1", "localhost", "::1"})
_METHODS: Final = frozenset({"GET", "PUT"})

Buffer = bytes | bytearray | memoryview


class DirectFailed(Exception):
    """The storage could not be reached, or refused."""


@dataclass(frozen=True, slots=True)
class DirectRequest:
    """One request, to be made word for word."""

    method: str
    url: str
    headers: Mapping[str, str]


class Source(Protocol):
    """What is sent."""

    length_bytes: int

    def read(self, offset_bytes: int, length_bytes: int) -> Buffer:
        """A piece, exactly so long."""
        ...


def direct_from_message(message: blob_service_pb2.DirectRequest) -> DirectRequest | None:
    """The request, or None when it is none that may be made: unencrypted to another machine, or of another method."""
    parts = urlsplit(message.url)
    safe = parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in _LOOPBACK)
    if message.method not in _METHODS or not safe:
        return None
    return DirectRequest(message.method, message.url, dict(message.headers))


def send(request: DirectRequest, source: Source) -> None:
    """Sends all of `source`. Raises DirectFailed, and what `source` raises."""
    body = _pieces(source)
    with _answered(request, dict(request.headers), body) as response:
        response.read(BLOB_CHUNK_BYTES)


def receive(request: DirectRequest, offset_bytes: int) -> Iterator[bytes]:
    """The bytes from an offset on, piece by piece. Raises DirectFailed."""
    headers = dict(request.headers)
    if offset_bytes:
        headers["Range"] = f"bytes={offset_bytes}-"
    with _answered(request, headers, None) as response:
        if offset_bytes and response.status != http.HTTPStatus.PARTIAL_CONTENT:
            raise DirectFailed("the storage does not go on in the middle")
        try:
            while piece := response.read(BLOB_CHUNK_BYTES):
                yield piece
        except (OSError, http.client.HTTPException) as error:
            raise DirectFailed(str(error)) from error


def _pieces(source: Source) -> Iterator[bytes]:
    offset = 0
    while offset < source.length_bytes:
        piece = source.read(offset, min(BLOB_CHUNK_BYTES, source.length_bytes - offset))
        yield bytes(piece)
        offset += len(piece)


def _answered(
    request: DirectRequest, headers: dict[str, str], body: Iterator[bytes] | None
) -> http.client.HTTPResponse:
    asked = urllib.request.Request(request.url, data=body, headers=headers, method=request.method)  # noqa: S310 - checked
    if body is not None:
        asked.add_unredirected_header("Content-Type", "application/octet-stream")
    try:
        response: http.client.HTTPResponse = urllib.request.urlopen(asked, timeout=STAND_STILL_S_MAX)  # noqa: S310
    except urllib.error.HTTPError as error:
        with error:
            raise DirectFailed(f"the storage answered {error.code} {error.reason}") from None
    except (OSError, http.client.HTTPException) as error:
        raise DirectFailed(str(error)) from error
    return response
