"""Everything that a lease needs brought here, and its output brought away, through one channel to the blob service."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final, Protocol

from fallow.blob_client import BlobClient
from fallow.channel import blob_channel
from fallow.credentials import Credentials
from fallow.diagnosis import explain_blobs
from fallow.errors import FallowError, Reason
from fallow.ids import LeaseId, digest_of
from fallow.session import BlobReference, BundleOffer, Candidate, Lease, SignedBytes
from fallow_worker.bundle_cache import BundleCache
from fallow_worker.core.happenings import FetchTrouble
from fallow_worker.nearby import Nearby
from fallow_worker.network import NetworkMeter
from fallow_worker.ports import LoadedBundle

_TROUBLES: Final[dict[Reason, FetchTrouble]] = {
    Reason.GRANT_EXPIRED: FetchTrouble.GRANT_EXPIRED,
    Reason.BLOB_UNKNOWN: FetchTrouble.GIVE_UP,
    Reason.GRANT_INVALID: FetchTrouble.GIVE_UP,
    Reason.PERMISSION_DENIED: FetchTrouble.GIVE_UP,
    Reason.BUNDLE_INVALID: FetchTrouble.GIVE_UP,
    Reason.FIELD_INVALID: FetchTrouble.GIVE_UP,
    Reason.LIMIT_EXCEEDED: FetchTrouble.GIVE_UP,
    Reason.STORAGE_FULL: FetchTrouble.GIVE_UP,
    Reason.ROOT_MISMATCH: FetchTrouble.GIVE_UP,
    Reason.CERTIFICATE_FOREIGN: FetchTrouble.GIVE_UP,
}


class Blobs(Protocol):
    """Reads and writes blobs under grants: `fallow.blob_client.BlobClient`, or a fake."""

    async def get(self, grant: SignedBytes, reference: BlobReference) -> bytes: ...

    async def get_to_file(self, grant: SignedBytes, reference: BlobReference, path: Path) -> None: ...

    async def put(self, grant: SignedBytes, source: bytes) -> SignedBytes: ...

    async def close(self) -> None: ...


class ChannelBlobs:
    """The real blob service, through a channel of its own that is made anew when the certificate is."""

    def __init__(self, credentials: Credentials) -> None:
        """Dials on first use."""
        self._channel = blob_channel(credentials)
        self._client = BlobClient(self._channel, explain=explain_blobs(credentials))

    async def get(self, grant: SignedBytes, reference: BlobReference) -> bytes:
        """As `BlobClient.get`."""
        return await self._client.get(grant, reference)

    async def get_to_file(self, grant: SignedBytes, reference: BlobReference, path: Path) -> None:
        """As `BlobClient.get_to_file`."""
        await self._client.get_to_file(grant, reference, path)

    async def put(self, grant: SignedBytes, source: bytes) -> SignedBytes:
        """As `BlobClient.put`."""
        return await self._client.put(grant, source)

    async def close(self) -> None:
        """Cuts what is under way."""
        await self._channel.close()


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a run needs."""

    bundle: LoadedBundle
    block: bytes
    """Empty for inspections, but those that claims of a crash brought about."""
    candidates: tuple[bytes, ...] = ()
    """Of a referee's lease: the blocks to compare with."""


@dataclass(slots=True)
class TransferCounts:
    """How much went over the wire, for status and benchmarks."""

    blob_bytes_fetched: int = 0
    inline_bytes_fetched: int = 0
    bytes_uploaded: int = 0


class Transfers:
    """Fetches and uploads for leases."""

    def __init__(self, cache: BundleCache, blobs: Blobs, nearby: Nearby | None = None) -> None:
        """`blobs` may be replaced by `use`; `nearby` knows caches of the pool."""
        self._cache = cache
        self._blobs = blobs
        self._nearby = nearby
        self._busy: dict[Blobs, int] = {}
        """Transfers under way through each."""
        self.counts = TransferCounts()
        self.network = NetworkMeter()

    async def use(self, blobs: Blobs) -> None:
        """From now on goes through `blobs`; the old ones close once nothing is under way through them."""
        old, self._blobs = self._blobs, blobs
        if old not in self._busy:
            await old.close()

    async def fetch(self, lease: Lease, offer: BundleOffer) -> Inputs:
        """Bundle and input of a lease, all digests checked. Raises FallowError; `trouble_of` says what to do then."""
        async with self._in_use() as blobs:
            if lease.challenge is not None:
                bundle = LoadedBundle(
                    offer.bundle_digest, offer.manifest, {}, 0, slot_dependent=False, memory_bytes_peak=0
                )
            else:
                reader = self._nearby.reader(offer.pool_caches, blobs) if self._nearby else blobs
                bundle = await self._cache.bundle(offer, reader, lease.lease_id)
            block = await self._input(lease, blobs)
            return Inputs(bundle, block, tuple([await self._candidate(one, blobs) for one in lease.candidates]))

    async def upload(self, grant: SignedBytes, output: bytes) -> SignedBytes:
        """The receipt of a stored output. Raises FallowError."""
        async with self._in_use() as blobs:
            began = time.monotonic()
            receipt = await blobs.put(grant, output)
        self.network.sent(len(output), time.monotonic() - began)
        self.counts.bytes_uploaded += len(output)
        return receipt

    @contextlib.asynccontextmanager
    async def _in_use(self) -> AsyncGenerator[Blobs]:
        blobs = self._blobs
        self._busy[blobs] = self._busy.get(blobs, 0) + 1
        try:
            yield blobs
        finally:
            self._busy[blobs] -= 1
            if not self._busy[blobs]:
                del self._busy[blobs]
                if blobs is not self._blobs:
                    await blobs.close()

    def told(self) -> dict[str, int]:
        """What went over the wire, by name."""
        near = asdict(self._nearby.counts) if self._nearby is not None else {}
        return {**asdict(self.counts), **near}

    def forget(self, lease_id: LeaseId) -> None:
        """The lease needs its bundle no more."""
        self._cache.release(lease_id)

    async def close(self) -> None:
        """Cuts what is under way."""
        if self._nearby is not None:
            await self._nearby.close()
        await self._blobs.close()

    async def _input(self, lease: Lease, blobs: Blobs) -> bytes:
        if lease.input is None:
            return b""
        return await self._block(lease.input, lease.inline_input, lease.input_grant, blobs)

    async def _candidate(self, candidate: Candidate, blobs: Blobs) -> bytes:
        return await self._block(candidate.block, candidate.inline_block, candidate.grant, blobs)

    async def _block(self, named: BlobReference, inline: bytes, grant: SignedBytes | None, blobs: Blobs) -> bytes:
        if inline:
            if digest_of(inline) != named.digest:
                raise FallowError(Reason.DIGEST_MISMATCH, "an inline block is not the one that the lease names")
            self.counts.inline_bytes_fetched += len(inline)
            return inline
        if grant is None:
            raise FallowError(Reason.GRANT_EXPIRED, "the lease came without a grant for one of its blocks")
        began = time.monotonic()
        block = await blobs.get(grant, named)
        self.network.received(len(block), time.monotonic() - began)
        self.counts.blob_bytes_fetched += len(block)
        return block


def trouble_of(error: FallowError | OSError, *, uploading: bool = False) -> FetchTrouble:
    """What to do about a failed transfer.

    No room here ends the lease: others may have some. No room over there is worth waiting for: the work is done.
    """
    if isinstance(error, OSError) or (uploading and error.reason is Reason.STORAGE_FULL):
        return FetchTrouble.TRY_AGAIN
    return _TROUBLES.get(error.reason, FetchTrouble.TRY_AGAIN)


def with_blob_endpoint(credentials: Credentials, endpoint: str) -> Credentials:
    """The credentials with the endpoint that a Welcome names; an empty one changes nothing."""
    return replace(credentials, blob_endpoint=endpoint) if endpoint else credentials
