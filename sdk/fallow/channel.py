"""gRPC channels to the three endpoints. Server names are fixed, so that addresses are free to change."""

from __future__ import annotations

import grpc
from cryptography.hazmat.primitives.serialization import Encoding

from fallow.credentials import Credentials
from fallow.identity import BLOBS_NAME, CONTROL_NAME, ENROLLMENT_NAME, POOL_CACHE_NAME, load_certificate
from fallow.limits import BLOB_CHUNK_BYTES, CONTROL_MESSAGE_BYTES_MAX, KIB
from fallow.proxy import proxy_for
from fallow.session import PoolCache

KEEPALIVE_INTERVAL_MS = 30_000
KEEPALIVE_TIMEOUT_MS = 10_000
RECONNECT_BACKOFF_MS_MAX = 5_000
CONNECT_TIME_MS_MAX = 10_000
"""As long as the servers give a handshake."""


def control_channel(credentials: Credentials) -> grpc.aio.Channel:
    """A channel to the control endpoint, mTLS."""
    options = _options(CONTROL_NAME, CONTROL_MESSAGE_BYTES_MAX, credentials.control_endpoint)
    return grpc.aio.secure_channel(credentials.control_endpoint, _mutual(credentials), options)


def blob_channel(credentials: Credentials) -> grpc.aio.Channel:
    """A channel to the blob service, mTLS."""
    options = _options(BLOBS_NAME, BLOB_CHUNK_BYTES + 64 * KIB, credentials.blob_endpoint)
    return grpc.aio.secure_channel(credentials.blob_endpoint, _mutual(credentials), options)


def pool_cache_channel(credentials: Credentials, cache: PoolCache) -> grpc.aio.Channel:
    """A channel to a cache of the pool in the same network, mTLS: its own certificate and no other is accepted."""
    pinned = grpc.ssl_channel_credentials(
        load_certificate(cache.certificate).public_bytes(Encoding.PEM), credentials.key.pem, credentials.certificate_pem
    )
    options = _options(POOL_CACHE_NAME, BLOB_CHUNK_BYTES + 64 * KIB, cache.endpoint)
    # It is near: no proxy stands between.
    return grpc.aio.secure_channel(cache.endpoint, pinned, [("grpc.enable_http_proxy", 0), *options[1:]])


def enrollment_channel(endpoint: str, authority_pem: bytes) -> grpc.aio.Channel:
    """A channel to the enrolment endpoint: server TLS under the pinned authority."""
    options = _options(ENROLLMENT_NAME, 64 * KIB, endpoint)
    return grpc.aio.secure_channel(endpoint, grpc.ssl_channel_credentials(authority_pem), options)


def _mutual(credentials: Credentials) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(credentials.authority_pem, credentials.key.pem, credentials.certificate_pem)


def _options(server_name: str, message_bytes_max: int, endpoint: str) -> list[tuple[str, str | int]]:
    # Chosen here and not by gRPC, so that whoever looks why a connection fails goes the same way.
    proxy = proxy_for(endpoint)
    way: tuple[str, str | int] = ("grpc.enable_http_proxy", 0) if proxy is None else ("grpc.http_proxy", proxy.url)
    return [
        way,
        ("grpc.ssl_target_name_override", server_name),
        ("grpc.max_receive_message_length", message_bytes_max),
        ("grpc.max_send_message_length", message_bytes_max),
        ("grpc.keepalive_time_ms", KEEPALIVE_INTERVAL_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.initial_reconnect_backoff_ms", 200),
        # Despite its name, what one attempt to connect may take: three round trips with TLS, on a busy machine more.
        ("grpc.min_reconnect_backoff_ms", CONNECT_TIME_MS_MAX),
        ("grpc.max_reconnect_backoff_ms", RECONNECT_BACKOFF_MS_MAX),
        ("grpc.use_local_subchannel_pool", 1),
    ]
