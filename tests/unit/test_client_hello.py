"""The server name of real and of broken ClientHellos."""

from __future__ import annotations

import contextlib
import ssl
from functools import lru_cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fallow_coordinator.client_hello import HELLO_BYTES_MAX, NoClientHelloError, server_name
from fallow_coordinator.splice import CONNECTIONS_PER_ADDRESS_MAX, NEW_AT_ONCE_MAX, NEW_PER_SECOND_MAX, Door


@lru_cache
def hello_for(name: str | None) -> bytes:
    """What OpenSSL sends first."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    connection = context.wrap_bio(incoming, outgoing, server_hostname=name)
    with contextlib.suppress(ssl.SSLWantReadError):
        connection.do_handshake()
    return outgoing.read()


@pytest.mark.parametrize("name", ["control.fallow", "blobs.fallow", "x" * 60 + ".example", None])
def test_the_name_is_found_once_the_hello_is_complete(name: str | None) -> None:
    data = hello_for(name)
    assert all(server_name(data[:end]) is None for end in range(len(data)))
    assert server_name(data) == (name or "")
    assert server_name(data + b"early data") == (name or "")


def test_a_hello_in_many_records_is_put_together() -> None:
    data = hello_for("control.fallow")
    body = data[5:]
    pieces = [body[start : start + 7] for start in range(0, len(body), 7)]
    assert (
        server_name(b"".join(data[:3] + len(piece).to_bytes(2, "big") + piece for piece in pieces)) == "control.fallow"
    )


@pytest.mark.parametrize(
    "data", [b"GET / HTTP/1.1\r\n", b"\x00", b"\x16\x03\x01\x00\x04\x02\x00\x00\x00", b"PRI * HTTP/2"]
)
def test_what_is_no_hello_is_refused_at_once(data: bytes) -> None:
    with pytest.raises(NoClientHelloError):
        server_name(data)


def test_a_hello_without_end_is_not_waited_for() -> None:
    with pytest.raises(NoClientHelloError):
        server_name(b"\x16\x03\x01\xff\xff" + b"\x01\xff\xff\xff" + bytes(HELLO_BYTES_MAX))


@settings(deadline=None)
@given(st.integers(0, 600), st.integers(0, 255), st.binary(max_size=40))
def test_a_changed_hello_never_breaks_the_reader(place: int, value: int, tail: bytes) -> None:
    data = bytearray(hello_for("control.fallow"))
    data[place % len(data)] = value
    with contextlib.suppress(NoClientHelloError):
        assert isinstance(server_name(bytes(data) + tail), str | None)


def test_an_address_has_so_many_connections_and_makes_so_many_at_once() -> None:
    door = Door()
    for _ in range(int(NEW_AT_ONCE_MAX)):
        assert door.enters("10.0.0.1", 100.0)
        door.leaves("10.0.0.1")
    assert not door.enters("10.0.0.1", 100.0)
    assert door.enters("10.0.0.2", 100.0)
    assert door.enters("10.0.0.1", 100.0 + 1.5 / NEW_PER_SECOND_MAX)
    held = Door()
    let_in = [held.enters("10.0.0.1", float(second)) for second in range(CONNECTIONS_PER_ADDRESS_MAX + 5)]
    assert sum(let_in) == CONNECTIONS_PER_ADDRESS_MAX == held.open
