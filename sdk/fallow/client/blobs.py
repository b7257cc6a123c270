"""Uploads and downloads of the caller's own blobs: what the account lacks, under grants that are renewed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from fallow.blob_client import BlobClient
from fallow.bundle_file import FileSource
from fallow.client.connection import CALL_TIMEOUT_S, Connection
from fallow.errors import FallowError, Reason
from fallow.limits import GRANTS_PER_REQUEST_MAX
from fallow.session import BlobReference, SignedBytes
from fallow.v1 import job_service_pb2
from fallow.wire.blob import BLOB_KINDS, BlobKind, grant_from_message, receipt_to_message, reference_to_message

Result = TypeVar("Result")

UPLOADS_AT_ONCE: Final = 4
RECORD_WITHIN_S: Final = 60.0
"""Receipts of one batch are recorded together, unless the first of them has waited so long when another comes."""
GRANTS_RENEWED_MAX: Final = 5
"""How often one transfer may ask for a new grant."""


@dataclass(frozen=True, slots=True)
class Upload:
    """A blob to bring to the blob service."""

    blob: BlobReference
    kind: BlobKind
    source: FileSource


class BlobTransfers:
    """Moves blobs over a connection."""

    def __init__(self, connection: Connection) -> None:
        """Transfers over `connection`."""
        self._connection = connection
        self._slots = asyncio.Semaphore(UPLOADS_AT_ONCE)

    async def upload(self, uploads: Sequence[Upload]) -> None:
        """Brings what the account lacks, and records it; returns when all is durable.

        Raises STORAGE_FULL, DIGEST_MISMATCH when a file changes under our hands, and COORDINATOR_UNREACHABLE.
        """
        for first in range(0, len(uploads), GRANTS_PER_REQUEST_MAX):
            part = uploads[first : first + GRANTS_PER_REQUEST_MAX]
            grants = await self._upload_grants(part)
            wanted = [(upload, grant) for upload, grant in zip(part, grants, strict=True) if grant is not None]
            recorder = _Recorder(self._connection)
            await _all(self._put(upload, grant, recorder) for upload, grant in wanted)
            await recorder.flush()

    async def download(self, blob: BlobReference) -> bytes:
        """The content of a blob, checked against its digest. Raises BLOB_UNKNOWN, DIGEST_MISMATCH."""
        return await self._persist(
            lambda client, grant: client.get(grant, blob), lambda: self._download_grant(blob), None
        )

    async def download_to(self, blob: BlobReference, path: Path) -> None:
        """As `download`, into a file that appears whole or not at all."""
        await self._persist(
            lambda client, grant: client.get_to_file(grant, blob, path), lambda: self._download_grant(blob), None
        )

    async def _put(self, upload: Upload, grant: SignedBytes, recorder: _Recorder) -> None:
        """Finishes an upload, unless somebody of the account was faster."""

        async def renewed() -> SignedBytes:
            (fresh,) = await self._upload_grants([upload])
            if fresh is None:
                raise _AlreadyThereError
            return fresh

        async with self._slots:
            try:
                receipt = await self._persist(lambda client, held: client.put(held, upload.source), renewed, grant)
            except _AlreadyThereError:
                return
        await recorder.add(receipt)

    async def _persist(
        self,
        attempt: Callable[[BlobClient, SignedBytes], Awaitable[Result]],
        ask: Callable[[], Awaitable[SignedBytes]],
        grant: SignedBytes | None,
    ) -> Result:
        """The result of a transfer, repeated while the service is away, with new grants as they expire."""
        backoff = self._connection.backoff()
        renewals = 0
        while True:
            await self._connection.keep_fresh()
            if grant is None:
                grant = await ask()
            try:
                return await attempt(self._connection.blob_client(), grant)
            except FallowError as error:
                if error.reason is Reason.GRANT_EXPIRED and renewals < GRANTS_RENEWED_MAX:
                    renewals += 1
                    grant = None
                else:
                    await self._connection.recover_from(error, backoff)

    async def _download_grant(self, blob: BlobReference) -> SignedBytes:
        request = job_service_pb2.GrantDownloadsRequest(digests=[blob.digest])
        answer = await self._connection.call(lambda jobs: jobs.GrantDownloads(request, timeout=CALL_TIMEOUT_S))
        return grant_from_message(answer.grants[0])

    async def _upload_grants(self, uploads: Sequence[Upload]) -> list[SignedBytes | None]:
        """One grant for each blob, None for those that the account has."""
        request = job_service_pb2.GrantUploadsRequest(
            uploads=[
                job_service_pb2.UploadWanted(blob=reference_to_message(u.blob), kind=BLOB_KINDS.number(u.kind))
                for u in uploads
            ]
        )
        answer = await self._connection.call(lambda jobs: jobs.GrantUploads(request, timeout=CALL_TIMEOUT_S))
        return [None if granted.have else grant_from_message(granted.grant) for granted in answer.uploads]


class _Recorder:
    """Has receipts recorded, several at once, and none later than a while after it came: receipts grow old."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._receipts: list[SignedBytes] = []
        self._oldest_at_s = 0.0

    async def add(self, receipt: SignedBytes) -> None:
        """Takes a receipt, and sends all when the first of them waits for long."""
        now_s = asyncio.get_running_loop().time()
        if not self._receipts:
            self._oldest_at_s = now_s
        self._receipts.append(receipt)
        if now_s - self._oldest_at_s > RECORD_WITHIN_S:
            await self.flush()

    async def flush(self) -> None:
        """Sends all; on return they are durable."""
        receipts, self._receipts = self._receipts, []
        if receipts:
            request = job_service_pb2.RecordUploadsRequest(
                receipts=[receipt_to_message(receipt) for receipt in receipts]
            )
            await self._connection.call(lambda jobs: jobs.RecordUploads(request, timeout=CALL_TIMEOUT_S))


class _AlreadyThereError(Exception):
    """Somebody of the account has uploaded the blob meanwhile."""


async def _all(work: Iterable[Coroutine[object, object, Result]]) -> list[Result]:
    """All results in order; the first failure cancels the rest."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in work]
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]
