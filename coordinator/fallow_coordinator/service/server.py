"""The two gRPC servers of the coordinator: enrolment (server TLS) and control (mutual TLS)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, cast

import grpc
from google.protobuf.internal import api_implementation
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from fallow.identity import PrivateKey
from fallow.limits import CONTROL_MESSAGE_BYTES_MAX, KIB
from fallow_coordinator.service.descriptors import connections_max
from fallow_coordinator.service.side_calls import SideCallLimit

ENROLLMENT_MESSAGE_BYTES_MAX: Final = 64 * KIB
METADATA_BYTES_MAX: Final = 16 * KIB
STREAMS_PER_CONNECTION_MAX: Final = 128
CALLS_MAX: Final = 12_000
"""Calls and streams at once, of all connections; the transport refuses more."""
CONTROL_CONNECTIONS_SHARE: Final = 0.9
ENROLLMENT_CONNECTIONS_SHARE: Final = 0.1
"""Of the process's descriptors: strangers at the open door never take those of parties."""
HANDSHAKE_TIMEOUT_MS: Final = 10_000
"""Who has not proved a key by then is cut off: connections of strangers cost a descriptor each."""
ENROLLMENT_AGE_MS_MAX: Final = 600_000
ENROLLMENT_IDLE_MS_MAX: Final = 30_000
CONTROL_IDLE_MS_MAX: Final = 300_000
KEEPALIVE_INTERVAL_MS: Final = 30_000
KEEPALIVE_TIMEOUT_MS: Final = 10_000
PING_INTERVAL_MS_MIN: Final = 10_000
STOP_GRACE_S: Final = 3.0


def assert_fast_protobuf() -> None:
    """Fails unless protobuf runs on upb: the pure Python parser recurses as deep as a stranger's message says."""
    backend = api_implementation.Type()
    if backend != "upb":
        raise RuntimeError(f"protobuf runs on {backend!r}, not on upb; unset PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION")


AGE_GRACE_MS: Final = 60_000
"""How long calls may go on upon a connection whose time is over."""


class RpcServer:
    """One listening server with health, and reflection where asked."""

    def __init__(
        self,
        *,
        handlers: Sequence[grpc.GenericRpcHandler],
        service_names: Sequence[str],
        message_bytes_max: int,
        idle_ms_max: int,
        connections_share: float,
        reflect: bool,
        age_ms_max: int = 0,
    ) -> None:
        """`service_names` are those of `handlers`, for health and reflection. Connections without calls end after
        `idle_ms_max`, all of them after `age_ms_max` (0: never); it holds at most `connections_share` of the process's
        descriptors."""
        self._names = service_names
        self.server = grpc.aio.server(
            interceptors=(SideCallLimit(),),
            options=_options(message_bytes_max, idle_ms_max, connections_max(connections_share), age_ms_max),
            maximum_concurrent_rpcs=CALLS_MAX,
        )
        self.server.add_generic_rpc_handlers(tuple(handlers))
        # The stubs do not know the asyncio half of the health package.
        self._health = cast("Any", health).aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.server)  # pyright: ignore[reportUnknownMemberType]
        if reflect:
            names = (*service_names, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, self.server)

    async def start(self, host: str, port: int, credentials: grpc.ServerCredentials) -> int:
        """Listens; gives the port. Raises OSError when it can't be had."""
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            bound = self.server.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise OSError(str(error)) from None
        await self.server.start()
        for name in ("", *self._names):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        return bound

    async def stop(self) -> None:
        """Refuses new calls, lets running ones end, then cuts them off."""
        await self._health.enter_graceful_shutdown()
        await self.server.stop(STOP_GRACE_S)


def server_tls(key: PrivateKey, certificate_pem: bytes) -> grpc.ServerCredentials:
    """TLS for strangers: they see our certificate and show none."""
    return grpc.ssl_server_credentials([(key.pem, certificate_pem)])


def mutual_tls(key: PrivateKey, certificate_pem: bytes, authority_pem: bytes) -> grpc.ServerCredentials:
    """TLS for parties: no certificate of our authority, no connection."""
    return grpc.ssl_server_credentials(
        [(key.pem, certificate_pem)], root_certificates=authority_pem, require_client_auth=True
    )


def _options(message_bytes_max: int, idle_ms_max: int, connections: int, age_ms_max: int) -> list[tuple[str, int]]:
    age = [("grpc.max_connection_age_ms", age_ms_max), ("grpc.max_connection_age_grace_ms", AGE_GRACE_MS)]
    return [
        *(age if age_ms_max else ()),
        ("grpc.max_allowed_incoming_connections", connections),
        ("grpc.server_handshake_timeout_ms", HANDSHAKE_TIMEOUT_MS),
        ("grpc.max_connection_idle_ms", idle_ms_max),
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", message_bytes_max),
        ("grpc.max_send_message_length", message_bytes_max),
        ("grpc.max_metadata_size", METADATA_BYTES_MAX),
        ("grpc.max_concurrent_streams", STREAMS_PER_CONNECTION_MAX),
        ("grpc.keepalive_time_ms", KEEPALIVE_INTERVAL_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", PING_INTERVAL_MS_MIN),
        ("grpc.http2.max_pings_without_data", 0),
    ]


__all__ = [
    "CONTROL_CONNECTIONS_SHARE",
    "CONTROL_IDLE_MS_MAX",
    "CONTROL_MESSAGE_BYTES_MAX",
    "ENROLLMENT_CONNECTIONS_SHARE",
    "ENROLLMENT_IDLE_MS_MAX",
    "ENROLLMENT_MESSAGE_BYTES_MAX",
    "RpcServer",
    "assert_fast_protobuf",
    "mutual_tls",
    "server_tls",
]
