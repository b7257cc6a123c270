"""A connection to a coordinator and its blob service that outlives both: retries, fresh certificates, one place."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final, TypeVar

import grpc

from fallow.blob_client import BlobClient
from fallow.channel import blob_channel, control_channel
from fallow.client.retry import PATIENCE_S, TRANSIENT_REASONS, Backoff, is_transient
from fallow.credentials import Credentials
from fallow.diagnosis import explain_blobs, explain_control
from fallow.enrollment import renew
from fallow.errors import FallowError, Reason
from fallow.v1 import certificate_service_pb2_grpc, job_service_pb2_grpc, ledger_service_pb2_grpc
from fallow.wire.errors import error_from_rpc

if TYPE_CHECKING:
    from fallow.v1.certificate_service_pb2_grpc import CertificateServiceAsyncStub
    from fallow.v1.job_service_pb2_grpc import JobServiceAsyncStub
    from fallow.v1.ledger_service_pb2_grpc import LedgerServiceAsyncStub

_log = logging.getLogger(__name__)

CALL_TIMEOUT_S: Final = 30.0
CLOSE_GRACE_S: Final = 60.0
"""How long calls may go on upon channels that were replaced."""

Answer = TypeVar("Answer")


class Connection:
    """Channels under the caller's credentials, renewed at half the certificate's life."""

    def __init__(self, credentials: Credentials, *, patience_s: float = PATIENCE_S) -> None:
        """Prepares to connect; nothing is sent yet. To be made inside the event loop that uses it."""
        self.credentials = credentials
        self.patience_s = patience_s
        self._renewing = asyncio.Lock()
        self._retired: set[asyncio.Task[None]] = set()
        self._closed = False
        self._renew_at_ms: float = 0
        self.nonce_key = hashlib.sha256(b"fallow/client/nonce" + credentials.key.pem).digest()
        """A secret of this client, from its key, for nonces that only it can foretell."""
        self._open()

    def blob_client(self) -> BlobClient:
        """Transfers through the channel to the blob service that is open now."""
        return BlobClient(self._blobs, explain=explain_blobs(self.credentials))

    @property
    def jobs(self) -> JobServiceAsyncStub:
        """The stub of the job service."""
        return self._jobs

    @property
    def certificates(self) -> CertificateServiceAsyncStub:
        """The stub of the certificate service."""
        return self._certificates

    async def call(self, make: Callable[[JobServiceAsyncStub], Awaitable[Answer]]) -> Answer:
        """The answer to a unary call that is safe to repeat; it is repeated while the coordinator is away.

        Raises what the coordinator answers, and COORDINATOR_UNREACHABLE when patience is over.
        """
        return await self.repeated(lambda: make(self._jobs))

    async def call_ledger(self, make: Callable[[LedgerServiceAsyncStub], Awaitable[Answer]]) -> Answer:
        """As `call`, for the ledger service."""
        return await self.repeated(lambda: make(self._ledger))

    async def call_certificates(self, make: Callable[[CertificateServiceAsyncStub], Awaitable[Answer]]) -> Answer:
        """As `call`, for the certificate service."""
        return await self.repeated(lambda: make(self._certificates))

    async def repeated(self, make: Callable[[], Awaitable[Answer]]) -> Answer:
        """What `make` gives; it is made again while the coordinator is away. Raises what `call` raises."""
        backoff = self.backoff()
        while True:
            await self.keep_fresh()
            try:
                return await make()
            except grpc.aio.AioRpcError as failure:
                await self.recover(failure, backoff)

    def backoff(self) -> Backoff:
        """A fresh back-off with this connection's patience."""
        return Backoff(self.patience_s)

    async def keep_fresh(self) -> None:
        """Renews the certificate when half of its life is over; a failure counts only once it has ended.

        Called before every use of a channel. Raises FIELD_INVALID once the connection is closed.
        """
        if self._closed:
            raise FallowError(
                Reason.FIELD_INVALID,
                "this client is closed",
                field="client",
                hint="connect again; `client.job(id)` finds a job that was submitted",
            )
        now_ms = time.time() * 1000
        if now_ms < self._renew_at_ms:
            return
        try:
            await self._renew()
        except FallowError as error:
            if now_ms >= self.credentials.not_after_ms:
                raise
            self._renew_at_ms = now_ms + 60_000
            _log.warning("client.renewal_failed reason=%s", error.reason.value)

    async def recover(self, failure: grpc.aio.AioRpcError, backoff: Backoff) -> None:
        """Makes the failed call worth repeating, after a pause, or raises what the failure means."""
        error = error_from_rpc(failure)
        if is_transient(failure):
            if error.reason is Reason.COORDINATOR_UNREACHABLE:
                # Once for each absence: a proxy that opens TLS will do so for ever, and the words are better.
                error = backoff.words = backoff.words or await explain_control(self.credentials)(error)
                if error.reason not in TRANSIENT_REASONS:
                    raise error
            await backoff.pause(error)
            await self._follow()
        else:
            await self.recover_from(error, backoff)

    async def recover_from(self, error: FallowError, backoff: Backoff) -> None:
        """As `recover`, for a failure that is understood already."""
        if error.reason is Reason.CERTIFICATE_EXPIRED and not backoff.renewed:
            backoff.renewed = True
            self._renew_at_ms = 0
        elif error.reason in TRANSIENT_REASONS:
            await backoff.pause(error)
            await self._follow()
        else:
            raise error

    async def close(self) -> None:
        """Ends all calls."""
        self._closed = True
        for task in self._retired:
            task.cancel()
        await asyncio.gather(self._control.close(), self._blobs.close(), *self._retired, return_exceptions=True)

    async def _renew(self) -> None:
        async with self._renewing:
            if time.time() * 1000 < self._renew_at_ms:
                return
            self._replace(await renew(self.credentials))

    async def _follow(self) -> None:
        """Takes up credentials that changed on disk: a coordinator that came back may listen elsewhere."""
        try:
            stored = await asyncio.to_thread(Credentials.load, self.credentials.folder)
        except (FallowError, OSError):
            return
        if (stored.control_endpoint, stored.blob_endpoint, stored.certificate_pem) != (
            self.credentials.control_endpoint,
            self.credentials.blob_endpoint,
            self.credentials.certificate_pem,
        ):
            self._replace(stored)

    def _replace(self, credentials: Credentials) -> None:
        old = (self._control, self._blobs)
        self.credentials = credentials
        self._open()
        for channel in old:
            task = asyncio.ensure_future(channel.close(CLOSE_GRACE_S))
            self._retired.add(task)
            task.add_done_callback(self._retired.discard)

    def _open(self) -> None:
        self._control = control_channel(self.credentials)
        self._blobs = blob_channel(self.credentials)
        self._jobs = job_service_pb2_grpc.JobServiceStub(self._control)
        self._ledger: LedgerServiceAsyncStub = ledger_service_pb2_grpc.LedgerServiceStub(self._control)
        self._certificates: CertificateServiceAsyncStub = certificate_service_pb2_grpc.CertificateServiceStub(
            self._control
        )
        self._renew_at_ms = (self.credentials.not_before_ms + self.credentials.not_after_ms) / 2
