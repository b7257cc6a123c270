"""The blob service as a process: `python -m fallow_coordinator.blobs --state DIR --listen HOST:PORT`.

It reads what the coordinator has put into the state folder:

- `STATE/blobs/key.pem` and `STATE/blobs/certificate.pem`: its own key (0600) and certificate for `blobs.fallow`. The
  key also signs receipts. A renewed certificate of the same key is taken up at the next handshake.
- `STATE/authority.pem`: the certificate authority under which peers must show a certificate.
- `STATE/coordinator-public.der`: the key that signs grants (DER SubjectPublicKeyInfo); the peer that shows it in TLS is
  the coordinator, which alone may pack.

Blobs lie under `STATE/blobs/` too, in `blobs/`, `notes/` and `uploads/`, unless `--folder` says otherwise, or in the
bucket that `--s3-bucket` names; then only `uploads/` is used here.

When it serves it prints one line, `ready HOST:PORT`. It ends cleanly on SIGTERM, on SIGINT, and when the other end of
`--life-pipe FD` is closed, which the kernel does when its parent dies.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import logging
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, cast

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from obstore.exceptions import BaseError

from fallow.errors import FallowError
from fallow.identity import PrivateKey
from fallow.limits import MIB
from fallow.shown_text import log_to_stderr
from fallow.wire.chunks import BLOB_SERVICE, CHUNK_MESSAGE_BYTES_MAX
from fallow_coordinator.blobs.bucket import BucketPlace
from fallow_coordinator.blobs.config import BlobLimits
from fallow_coordinator.blobs.direct import DirectTransfers
from fallow_coordinator.blobs.service import BlobService
from fallow_coordinator.blobs.storage import BlobStorage, FolderStorage, S3Storage
from fallow_coordinator.service.descriptors import connections_max
from fallow_coordinator.service.server import HANDSHAKE_TIMEOUT_MS, assert_fast_protobuf
from fallow_coordinator.service.side_calls import SideCallLimit

_log = logging.getLogger(__name__)

_STOP_GRACE_S: Final = 3.0
_STREAMS_PER_CONNECTION_MAX: Final = 64
_CONNECTIONS_SHARE: Final = 0.5
"""Of the process's descriptors; the other half is for files."""
_METADATA_BYTES_MAX: Final = 16 * 1024
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3


def main(arguments: list[str] | None = None) -> int:
    """Serves until told to stop; the exit status."""
    options = _options().parse_args(arguments)
    log_to_stderr(options.log_level, "%(asctime)s %(levelname)s %(name)s %(message)s")
    _keep_chunk_memory()
    try:
        asyncio.run(_serve(options))
    except (FallowError, OSError) as error:
        sys.stderr.write(f"fallow blob service: {error}\n")
        return 1
    return 0


def _options() -> argparse.ArgumentParser:
    defaults = BlobLimits()
    parser = argparse.ArgumentParser(prog="fallow_coordinator.blobs", description="the blob service of a coordinator")
    parser.add_argument("--state", type=Path, required=True, help="the coordinator's state folder")
    parser.add_argument("--listen", required=True, metavar="HOST:PORT", help="port 0 takes a free one")
    parser.add_argument("--folder", type=Path, help="where blobs lie (default: STATE/blobs)")
    parser.add_argument("--free-bytes-floor", type=int, default=defaults.free_bytes_floor, help="kept free on the disk")
    parser.add_argument("--uploads-max", type=int, default=defaults.uploads_max, help="uploads at once")
    parser.add_argument(
        "--grace-ms", type=int, default=defaults.grace_ms, help="younger blobs, and receipts, are not deleted"
    )
    parser.add_argument("--s3-bucket", default="", help="keep blobs in this bucket; keys come from AWS_* variables")
    parser.add_argument("--s3-prefix", default="", help="part of the bucket, `some/folder`")
    parser.add_argument("--s3-endpoint", default="", help="of a store that is not Amazon's")
    parser.add_argument("--s3-region", default="us-east-1")
    parser.add_argument("--life-pipe", type=int, metavar="FD", help="ends when this pipe's other end is closed")
    parser.add_argument("--log-level", default="INFO")
    return parser


async def _serve(options: argparse.Namespace) -> None:
    assert_fast_protobuf()
    state: Path = options.state
    limits = replace(
        BlobLimits(),
        free_bytes_floor=options.free_bytes_floor,
        uploads_max=options.uploads_max,
        grace_ms=options.grace_ms,
    )
    storage, uploads, direct = _storage(options)
    service = BlobService(
        storage=storage,
        uploads_folder=uploads,
        key=PrivateKey.load(state / "blobs" / "key.pem"),
        coordinator_public_key=(state / "coordinator-public.der").read_bytes(),
        limits=limits,
        direct=direct,
    )
    server = grpc.aio.server(
        interceptors=(SideCallLimit(),), options=_server_options(), maximum_concurrent_rpcs=limits.calls_max
    )
    server.add_generic_rpc_handlers((service.handlers(),))
    # The stubs do not know the asyncio half of the health package.
    healthy = cast("Any", health).aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(healthy, server)  # pyright: ignore[reportUnknownMemberType]
    reflection.enable_server_reflection((BLOB_SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    host = options.listen.rpartition(":")[0]
    port = server.add_secure_port(options.listen, _Certificates(state).server_credentials())
    stopped = _stop_signals()
    if options.life_pipe is not None:
        asyncio.get_running_loop().add_reader(options.life_pipe, _watch_life_pipe, options.life_pipe, stopped)
    await server.start()
    await healthy.set("", health_pb2.HealthCheckResponse.SERVING)
    await healthy.set(BLOB_SERVICE, health_pb2.HealthCheckResponse.SERVING)
    sweeper = asyncio.create_task(_sweep(service, limits.sweep_interval_ms / 1000))
    sys.stdout.write(f"ready {host}:{port}\n")
    sys.stdout.flush()
    _log.info("blobs.serving address=%s:%d uploads=%s bucket=%s", host, port, uploads, options.s3_bucket or "-")
    await stopped.wait()
    _log.info("blobs.stopping")
    sweeper.cancel()
    await healthy.enter_graceful_shutdown()
    await server.stop(_STOP_GRACE_S)
    await asyncio.to_thread(service.close)


def _storage(options: argparse.Namespace) -> tuple[BlobStorage, Path, DirectTransfers | None]:
    """Where blobs lie, the folder in which uploads grow, and who gives out URLs."""
    local = FolderStorage(options.folder or options.state / "blobs")
    if not options.s3_bucket:
        return local, local.uploads, None
    place = BucketPlace(options.s3_bucket, options.s3_prefix.strip("/"), options.s3_endpoint, options.s3_region)
    storage = S3Storage(place.store(), uploads=local.uploads)
    bucket = place.signing(os.environ)
    if bucket is None:
        _log.warning("blobs.no_urls endpoint=%s reason=no lasting key in AWS_* or no https", place.url())
        return storage, local.uploads, None
    return storage, local.uploads, DirectTransfers(storage, bucket)


def _server_options() -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", CHUNK_MESSAGE_BYTES_MAX),
        ("grpc.max_send_message_length", CHUNK_MESSAGE_BYTES_MAX),
        ("grpc.max_metadata_size", _METADATA_BYTES_MAX),
        ("grpc.max_concurrent_streams", _STREAMS_PER_CONNECTION_MAX),
        ("grpc.so_reuseport", 0),
        ("grpc.max_allowed_incoming_connections", connections_max(_CONNECTIONS_SHARE)),
        ("grpc.server_handshake_timeout_ms", HANDSHAKE_TIMEOUT_MS),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.http2.max_ping_strikes", 3),
        ("grpc.max_connection_age_ms", 3_600_000),
        ("grpc.max_connection_age_grace_ms", 3_600_000),
    ]


class _Certificates:
    """The service's certificate as it lies on disk: a renewed one is used from the next handshake on."""

    def __init__(self, state: Path) -> None:
        self._key = state / "blobs" / "key.pem"
        self._certificate = state / "blobs" / "certificate.pem"
        self._authority = state / "authority.pem"
        self._seen = self._stamp()

    def server_credentials(self) -> grpc.ServerCredentials:
        """Server credentials that demand a certificate of every peer."""
        # None stands for "as before", which the stubs do not say.
        renewed = cast("Callable[[], grpc.ServerCertificateConfiguration]", self._renewed)
        return grpc.dynamic_ssl_server_credentials(self._configuration(), renewed, require_client_authentication=True)

    def _configuration(self) -> grpc.ServerCertificateConfiguration:
        pair = (self._key.read_bytes(), self._certificate.read_bytes())
        return grpc.ssl_server_certificate_configuration([pair], self._authority.read_bytes())

    def _renewed(self) -> grpc.ServerCertificateConfiguration | None:
        try:
            stamp = self._stamp()
            if stamp == self._seen:
                return None
            configuration = self._configuration()
        except OSError:
            # Being replaced right now; the next handshake looks again.
            return None
        self._seen = stamp
        return configuration

    def _stamp(self) -> tuple[int, int]:
        return self._certificate.stat().st_mtime_ns, self._authority.stat().st_mtime_ns


def _stop_signals() -> asyncio.Event:
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    return stopped


def _watch_life_pipe(descriptor: int, stopped: asyncio.Event) -> None:
    if not os.read(descriptor, 4096):
        asyncio.get_running_loop().remove_reader(descriptor)
        stopped.set()


async def _sweep(service: BlobService, interval_s: float) -> None:
    while True:
        try:
            await asyncio.to_thread(service.sweep)
            await service.sweep_direct()
        except (OSError, BaseError):
            _log.exception("uploads.sweep_failed")
        await asyncio.sleep(interval_s)


def _keep_chunk_memory() -> None:
    """Lets glibc keep a few chunks' worth of memory instead of giving every mebibyte back: twice the speed."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 32 * MIB)
        libc.mallopt(_M_TRIM_THRESHOLD, 64 * MIB)


if __name__ == "__main__":
    sys.exit(main())
