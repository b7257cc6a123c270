"""A pool's cache over mutual TLS in one process: who gets what, what is refused, and what a reader makes of a liar."""

from __future__ import annotations

import asyncio
import datetime
import socket
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from fallow.blob_client import BlobClient
from fallow.channel import pool_cache_channel
from fallow.credentials import Credentials, pem_of
from fallow.errors import FallowError, Reason
from fallow.identity import PrivateKey
from fallow.ids import AccountId, PartyId, PoolId, SessionId, digest_of
from fallow.limits import POOL_CACHES_TOLD_MAX
from fallow.roles import Role, Tier
from fallow.session import BlobReference, PoolCache, SignedBytes
from fallow_coordinator.core.answers import CertificateGranted
from fallow_coordinator.service.auth import Caller
from fallow_coordinator.service.authority import Authority
from fallow_coordinator.service.grants import Grants, Holder
from fallow_coordinator.service.pool_caches import PoolCaches, network_of
from fallow_worker.bundle_cache import BundleCache
from fallow_worker.nearby import NEARBY_BYTES_MIN, REST_POISONED_S, REST_S_MIN, Nearby
from fallow_worker.pool_cache import PoolCacheServer

POOL = PoolId("pool-lab")
SIZE = NEARBY_BYTES_MIN + 5
BLOB = bytes(range(256)) * (SIZE // 256) + b"end!!"
REFERENCE = BlobReference(digest_of(BLOB), len(BLOB))
LARGE = bytes(3 * 2**20)
SMALL = b"small"


class Lab:
    """An authority, its coordinator's grants, and parties of one pool."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = Authority.open(folder / "authority", datetime.datetime.now(datetime.UTC))
        self.coordinator = PrivateKey.generate()
        self.parties = 0
        self.readers: list[Reader] = []
        self.servers: list[PoolCacheServer] = []

    def reader(self, name: str) -> Reader:
        self.readers.append(Reader(self, name))
        return self.readers[-1]

    async def serves(self, cache: BundleCache) -> tuple[PoolCacheServer, PoolCache]:
        server = PoolCacheServer(self.party(), cache)
        self.servers.append(server)
        return server, await server.start("127.0.0.1:0")

    def party(self, authority: Authority | None = None) -> Credentials:
        self.parties += 1
        key = PrivateKey.generate()
        now = datetime.datetime.now(datetime.UTC)
        granted = CertificateGranted(
            party_id=PartyId(f"worker-{self.parties}"),
            account_id=AccountId("account-a"),
            role=Role.WORKER,
            tier=Tier.MANAGED,
            pool_id=POOL,
            serial=self.parties.to_bytes(8, "big"),
            not_after_ms=int(now.timestamp() * 1000) + 3_600_000,
        )
        certificate = (authority or self.authority).party_certificate(key.raw.public_key(), granted, now)
        return Credentials(
            folder=self.folder,
            key=key,
            certificate_pem=pem_of(certificate),
            authority_pem=self.authority.certificate_pem,
            party_id=granted.party_id,
            account_id=granted.account_id,
            role=granted.role,
            tier=granted.tier,
            pool_id=POOL,
            enrollment_endpoint="",
            control_endpoint="127.0.0.1:1",
            blob_endpoint="",
            coordinator_public_key=self.coordinator.public_der,
        )

    def grant(self, holder: Credentials, blob: BlobReference = REFERENCE, pool_id: PoolId | None = POOL) -> SignedBytes:
        held_by = Holder(holder.key.fingerprint, AccountId("account-a"), pool_id)
        return Grants(self.coordinator).get(blob, held_by, now_ms=time.time_ns() // 1_000_000)


@pytest.fixture
async def lab(tmp_path: Path) -> AsyncIterator[Lab]:
    lab = Lab(tmp_path)
    yield lab
    for reader in lab.readers:
        await reader.nearby.close()
    for server in lab.servers:
        await server.stop()


class Served:
    """A cache that serves."""

    def __init__(self, server: PoolCacheServer, cache: BundleCache, announced: PoolCache, folder: Path) -> None:
        self.server, self.cache, self.announced, self.folder = server, cache, announced, folder

    def file(self, reference: BlobReference = REFERENCE) -> Path:
        return self.folder / reference.digest.hex()[:2] / reference.digest.hex()


@pytest.fixture
async def served(lab: Lab) -> Served:
    folder = lab.folder / "served"
    cache = BundleCache(folder, bytes_max=4 * 2**20)
    server, announced = await lab.serves(cache)
    return Served(server, cache, announced, folder)


class Origin:
    """The blob service, which has everything."""

    def __init__(self) -> None:
        self.gets = 0

    async def get_to_file(self, grant: SignedBytes, reference: BlobReference, path: Path) -> None:
        self.gets += 1
        path.write_bytes(next(blob for blob in (BLOB, SMALL) if digest_of(blob) == reference.digest))


class Reader:
    """A worker that reads through `Nearby`, with a clock that stands."""

    def __init__(self, lab: Lab, name: str) -> None:
        self.credentials = lab.party()
        self.now = 1_000.0
        self.nearby = Nearby(self.credentials, clock=lambda: self.now)
        self.blobs = Origin()
        self.path = lab.folder / f"{name}-blob"

    async def get(self, grant: SignedBytes, *caches: PoolCache, blob: bytes = BLOB) -> None:
        self.path.unlink(missing_ok=True)
        reference = BlobReference(digest_of(blob), len(blob))
        await self.nearby.reader(caches, self.blobs).get_to_file(grant, reference, self.path)
        assert self.path.read_bytes() == blob
        assert [path.name for path in self.path.parent.glob(f"{self.path.name}*")] == [self.path.name]

    async def left(self, count: int) -> None:
        async with asyncio.timeout(10):
            while self.nearby.counts.pool_blobs_left < count:  # noqa: ASYNC110 - it runs in a task of its own
                await asyncio.sleep(0.01)


async def test_what_one_worker_leaves_the_next_one_finds(lab: Lab, served: Served) -> None:
    one, other = lab.reader("one"), lab.reader("other")
    await one.get(lab.grant(one.credentials), served.announced)
    await one.left(1)
    assert served.file().read_bytes() == BLOB and one.blobs.gets == 1
    await other.get(lab.grant(other.credentials), served.announced)
    assert (other.blobs.gets, other.nearby.counts.pool_blobs_fetched) == (0, 1)
    assert other.nearby.counts.pool_bytes_fetched == served.server.counts.bytes_served == len(BLOB)


async def test_a_poisoned_blob_is_refused_its_cache_rests_and_the_blob_service_gives_it(
    lab: Lab, served: Served
) -> None:
    reader = lab.reader("reader")
    grant = lab.grant(reader.credentials)
    await reader.get(grant, served.announced)
    await reader.left(1)
    # As many bytes, and more of them than one chunk would be read again from a `.part`.
    served.file().write_bytes(BLOB[:-1] + b"?")
    await reader.get(grant, served.announced)
    assert (reader.nearby.counts.pool_blobs_wrong, reader.blobs.gets) == (1, 2)
    assert reader.nearby.awake([served.announced], REFERENCE.digest) == []
    await reader.get(grant, served.announced)
    assert (reader.nearby.counts.pool_blobs_wrong, reader.blobs.gets) == (1, 3), "it is not asked while it rests"
    reader.now += REST_POISONED_S
    assert reader.nearby.awake([served.announced], REFERENCE.digest) == [served.announced]


async def test_a_cache_that_is_not_there_or_says_nothing_costs_seconds_and_rests(
    lab: Lab, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fallow_worker.nearby.SILENCE_S", 0.3)
    silent = socket.create_server(("127.0.0.1", 0))
    port = silent.getsockname()[1]
    reader = lab.reader("reader")
    grant = lab.grant(reader.credentials)
    for number, endpoint in enumerate((f"127.0.0.1:{port}", "127.0.0.1:1"), start=1):
        await reader.get(grant, replace(served.announced, endpoint=endpoint))
        assert (reader.nearby.counts.pool_caches_failed, reader.blobs.gets) == (number, number)
    away = replace(served.announced, endpoint="127.0.0.1:1")
    reader.now += REST_S_MIN
    await reader.get(grant, away)
    reader.now += REST_S_MIN
    assert reader.nearby.awake([away], REFERENCE.digest) == [], "the second rest is longer"
    silent.close()


async def test_another_certificate_than_the_announced_one_is_not_accepted(lab: Lab, served: Served) -> None:
    _, impostor = await lab.serves(BundleCache(lab.folder / "other"))
    reader = lab.reader("reader")
    await reader.get(lab.grant(reader.credentials), replace(impostor, certificate=served.announced.certificate))
    assert (reader.nearby.counts.pool_caches_failed, reader.nearby.counts.pool_blobs_left) == (1, 0)


async def test_small_blobs_and_those_that_no_cache_may_hold_are_not_asked_for(lab: Lab, served: Served) -> None:
    reader = lab.reader("reader")
    await reader.get(lab.grant(reader.credentials, pool_id=None), served.announced)
    small = BlobReference(digest_of(SMALL), len(SMALL))
    await reader.get(lab.grant(reader.credentials, small), served.announced, blob=SMALL)
    assert served.server.counts.blobs_lacking == 0


async def refused(credentials: Credentials, cache: PoolCache, grant: SignedBytes, blob: bytes | None = None) -> Reason:
    """Why a cache does not give, or take, a blob."""
    async with pool_cache_channel(credentials, cache) as channel:
        client = BlobClient(channel, attempts_max=1, direct=False)
        with pytest.raises(FallowError) as caught:
            await (client.put(grant, blob) if blob is not None else client.get(grant, REFERENCE))
    return caught.value.reason


async def test_grants_are_checked_as_the_blob_service_checks_them(lab: Lab, served: Served) -> None:
    mine, other = lab.party(), lab.party()
    good = lab.grant(mine)
    assert await refused(mine, served.announced, good) is Reason.BLOB_UNKNOWN
    assert await refused(mine, served.announced, lab.grant(other)) is Reason.GRANT_INVALID
    assert await refused(mine, served.announced, lab.grant(mine, pool_id=None)) is Reason.GRANT_INVALID
    assert await refused(mine, served.announced, lab.grant(mine, pool_id=PoolId("pool-b"))) is Reason.GRANT_INVALID
    assert await refused(mine, served.announced, SignedBytes(good.payload, b"forged")) is Reason.GRANT_INVALID
    held_by = Holder(mine.key.fingerprint, AccountId("account-a"), POOL)
    late = Grants(lab.coordinator).get(REFERENCE, held_by, now_ms=0)
    assert await refused(mine, served.announced, late) is Reason.GRANT_EXPIRED
    stranger = lab.party(Authority.open(lab.folder / "another", datetime.datetime.now(datetime.UTC)))
    assert await refused(stranger, served.announced, lab.grant(stranger)) is Reason.COORDINATOR_UNREACHABLE, "no TLS"


async def test_wrong_bytes_and_more_than_there_is_room_for_are_not_taken_in(lab: Lab, served: Served) -> None:
    mine = lab.party()
    # The client would notice by itself: what it sends is not what it was asked to send.
    grant = lab.grant(mine)
    wrong = BLOB[:-1] + b"?"
    assert await refused(mine, served.announced, grant, wrong) is Reason.DIGEST_MISMATCH
    huge = BlobReference(digest_of(b"huge"), 5 * 2**20)
    assert await refused(mine, served.announced, lab.grant(mine, huge), bytes(5 * 2**20)) is Reason.STORAGE_FULL
    assert not served.file().exists() and not any((served.folder / "incoming").glob("*"))
    assert served.cache.bytes_kept == 0


async def test_the_longest_unused_blob_makes_room_and_what_is_in_use_stays(lab: Lab, served: Served) -> None:
    mine = lab.party()
    references: list[BlobReference] = []
    async with pool_cache_channel(mine, served.announced) as channel:
        client = BlobClient(channel, direct=False)
        for number in range(3):
            blob = bytes([number]) * (1536 * 1024)
            reference = BlobReference(digest_of(blob), len(blob))
            references.append(reference)
            await client.put(lab.grant(mine, reference), blob)
            if number == 1:  # the first becomes the last one used
                assert await client.get(lab.grant(mine, references[0]), references[0]) == bytes(1536 * 1024)
        large = BlobReference(digest_of(LARGE), len(LARGE))
        assert [served.file(reference).exists() for reference in references] == [True, False, True]
        await client.put(lab.grant(mine, large), LARGE)
        assert (await client.get(lab.grant(mine, large), large)) == LARGE, "of several chunks"
        await client.put(lab.grant(mine, large), LARGE)
    assert served.cache.bytes_kept <= 4 * 2**20
    assert served.server.counts.blobs_kept == 4


def caller(number: int, tier: Tier = Tier.MANAGED, pool_id: PoolId = POOL) -> Caller:
    key = PrivateKey.generate()
    party_id, account_id = PartyId(f"worker-{number}"), AccountId("account-a")
    return Caller(
        party_id, account_id, Role.WORKER, tier, pool_id, key.fingerprint, key.public_der, 1, revoked=False,
        quarantined=False,
    )  # fmt: skip


def test_caches_are_told_of_in_their_own_network_and_pool_and_by_those_who_may_serve() -> None:
    caches = PoolCaches()
    reader = SessionId("reader")
    caches.opened(reader, caller(0), "10.0.0.7", None)
    assert caches.near(reader, POOL) == ()
    here = PoolCache("10.0.0.8:1", b"c")
    caches.opened(SessionId("here"), caller(1), "10.0.0.8", here)
    caches.opened(SessionId("volunteer"), caller(2, Tier.VOLUNTEER), "10.0.0.9", PoolCache("10.0.0.9:1", b"c"))
    caches.opened(SessionId("far"), caller(3), "10.0.1.9", PoolCache("10.0.1.9:1", b"c"))
    caches.opened(SessionId("other"), caller(4, pool_id=PoolId("p")), "10.0.0.10", PoolCache("10.0.0.10:1", b"c"))
    assert caches.near(reader, POOL) == (here,)
    assert caches.near(SessionId("here"), POOL) == (), "nobody asks itself"
    for number in range(2 * POOL_CACHES_TOLD_MAX):
        caches.opened(SessionId(f"s-{number}"), caller(number), "10.0.0.20", PoolCache(f"10.0.0.20:{number}", b"c"))
    told = caches.near(reader, POOL)
    assert len(told) == POOL_CACHES_TOLD_MAX
    for number in range(2 * POOL_CACHES_TOLD_MAX):
        caches.closed(SessionId(f"s-{number}"))
    caches.closed(SessionId("unknown"))
    assert caches.near(reader, POOL) == (here,)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("10.1.2.3", "10.1.2.250", True),
        ("10.1.2.3", "10.1.3.3", False),
        ("2001:db8::1", "2001:db8::ffff", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("unix:/run/a", "unix:/run/a", True),
    ],
)
def test_two_addresses_are_of_one_network(one: str, other: str, same: bool) -> None:
    assert (network_of(one) == network_of(other)) is same
