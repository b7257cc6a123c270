"""Which HTTP proxy leads to an endpoint: `https_proxy` and `no_proxy`, read once for sockets and for gRPC alike."""

from __future__ import annotations

import base64
import ipaddress
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final
from urllib.parse import unquote, urlsplit

from fallow.errors import FallowError, Reason

PROXY_PORT_DEFAULT: Final = 3128
ANSWER_BYTES_MAX: Final = 16 * 1024
"""Longest answer of a proxy to CONNECT."""
_VARIABLES: Final = ("grpc_proxy", "https_proxy", "HTTPS_PROXY")
_EXCEPTIONS: Final = ("no_grpc_proxy", "no_proxy", "NO_PROXY")


@dataclass(frozen=True, slots=True)
class Proxy:
    """An HTTP proxy that is asked to CONNECT."""

    host: str
    port: int
    authorization: str
    """Base64 of `user:password`; empty: none."""
    url: str
    """As gRPC wants it."""

    @property
    def name(self) -> str:
        """For people: never with its password."""
        return f"{self.host}:{self.port}"


def proxy_for(endpoint: str, environment: Mapping[str, str] | None = None) -> Proxy | None:
    """The proxy through which `host:port` is reached; None: directly. Raises FIELD_INVALID for a malformed one."""
    variables = os.environ if environment is None else environment
    given = next((variables[name] for name in _VARIABLES if variables.get(name, "").strip()), "").strip()
    if not given:
        return None
    excepted = next((variables[name] for name in _EXCEPTIONS if name in variables), "")
    if _is_excepted(split_endpoint(endpoint)[0], excepted):
        return None
    try:
        parts = urlsplit(given if "://" in given else f"http://{given}")
        host, port = parts.hostname, parts.port or PROXY_PORT_DEFAULT
    except ValueError:
        host, port, parts = None, 0, urlsplit("")
    if not host or parts.scheme != "http":
        raise FallowError(
            Reason.FIELD_INVALID,
            "https_proxy is no address of an HTTP proxy",
            field="https_proxy",
            limit="http://host:port, the proxy itself without TLS",
        )
    user = f"{unquote(parts.username)}:{unquote(parts.password or '')}" if parts.username else ""
    login = f"{parts.username}:{parts.password or ''}@" if parts.username else ""
    shown_host = f"[{host}]" if ":" in host else host
    return Proxy(
        host, port, base64.b64encode(user.encode()).decode() if user else "", f"http://{login}{shown_host}:{port}"
    )


def open_socket(endpoint: str, *, timeout_s: float, environment: Mapping[str, str] | None = None) -> socket.socket:
    """A connection to `host:port`, through the proxy if there is one. Blocks. Raises COORDINATOR_UNREACHABLE."""
    proxy = proxy_for(endpoint, environment)
    host, port = split_endpoint(endpoint)
    if proxy is None:
        return _connected(host, port, endpoint, "the coordinator", timeout_s)
    connection = _connected(proxy.host, proxy.port, proxy.name, "the proxy of https_proxy", timeout_s)
    try:
        _ask_to_connect(connection, endpoint, proxy)
    except BaseException:
        connection.close()
        raise
    return connection


def split_endpoint(endpoint: str) -> tuple[str, int]:
    """Host and port. Raises FIELD_INVALID."""
    host, _, port = endpoint.rpartition(":")
    if not host or not port.isdecimal():
        raise FallowError(Reason.FIELD_INVALID, f"{endpoint!r} is no endpoint", field="endpoint", limit="host:port")
    return host.strip("[]"), int(port)


def _connected(host: str, port: int, where: str, who: str, timeout_s: float) -> socket.socket:
    try:
        return socket.create_connection((host, port), timeout=timeout_s)
    except socket.gaierror:
        words, hint = f"there is no host {host}", "is its name spelt right, and does this machine have a network?"
    except TimeoutError:
        words, hint = f"no answer within {timeout_s:g} s", "does a firewall stand between here and there?"
    except ConnectionRefusedError:
        words, hint = "nothing listens there", "is it running, and is the port right?"
    except OSError as error:
        words, hint = f"{error.strerror or error}", "is its address reachable from here?"
    raise FallowError(Reason.COORDINATOR_UNREACHABLE, f"{who} at {where} cannot be reached: {words}", hint=hint)


def _ask_to_connect(connection: socket.socket, endpoint: str, proxy: Proxy) -> None:
    login = f"Proxy-Authorization: Basic {proxy.authorization}\r\n" if proxy.authorization else ""
    answer = b""
    try:
        connection.sendall(f"CONNECT {endpoint} HTTP/1.1\r\nHost: {endpoint}\r\n{login}\r\n".encode())
        while b"\r\n\r\n" not in answer and len(answer) < ANSWER_BYTES_MAX:
            # Byte by byte: what follows the answer is TLS.
            piece = connection.recv(1)
            if not piece:
                break
            answer += piece
    except OSError as error:
        raise _refused(proxy, endpoint, f"the connection broke: {error}") from None
    status = answer.split(b"\r\n", 1)[0].decode("latin-1")
    words = status.split(" ", 2)
    if len(words) < 2 or not words[0].startswith("HTTP/1.") or words[1] != "200":
        raise _refused(proxy, endpoint, f"it answered {status[:80]!r}" if status else "it hung up")


def _refused(proxy: Proxy, endpoint: str, why: str) -> FallowError:
    return FallowError(
        Reason.COORDINATOR_UNREACHABLE,
        f"the proxy {proxy.name} does not connect to {endpoint}: {why}",
        hint="ask whoever runs the proxy to allow it, or name the host in no_proxy if it is reachable directly",
    )


def _is_excepted(host: str, exceptions: str) -> bool:
    for entry in (word.strip().lower() for word in exceptions.split(",")):
        if not entry:
            continue
        if entry == "*" or host.lower() == entry or host.lower().endswith(f".{entry.lstrip('.')}"):
            return True
        try:
            if ipaddress.ip_address(host) in ipaddress.ip_network(entry, strict=False):
                return True
        except ValueError:
            continue
    return False
