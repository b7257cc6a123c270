"""A blob service as a real process over mTLS, with an authority, a coordinator's key and clients of many accounts."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, replace
from pathlib import Path

import grpc
from cryptography.hazmat.primitives.serialization import Encoding

from fallow.channel import blob_channel
from fallow.credentials import Credentials
from fallow.identity import BLOBS_NAME, CONTROL_NAME, PrivateKey, load_certificate, write_private
from fallow.ids import AccountId, PartyId, PoolId, digest_of
from fallow.roles import Role
from fallow.session import BlobReference, SignedBytes
from fallow.wire.blob import BlobKind
from fallow_coordinator.core.answers import CertificateGranted
from fallow_coordinator.packing import BlobPacker
from fallow_coordinator.service.authority import Authority
from fallow_coordinator.service.grants import Grants, Holder

READY_PATIENCE_S = 20.0


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def reference_of(data: bytes) -> BlobReference:
    return BlobReference(digest_of(data), len(data))


@dataclass(frozen=True, slots=True)
class Party:
    """Someone with a key and an account."""

    name: str
    account_id: AccountId
    key: PrivateKey
    credentials: Credentials

    @property
    def holder(self) -> Holder:
        return Holder(self.key.fingerprint, self.account_id)


class BlobRig:
    """The state folder and the process."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.authority = Authority.open(state / "authority", datetime.datetime.now(datetime.UTC))
        self.coordinator_key = PrivateKey.generate()
        self.service_key = PrivateKey.generate()
        self.grants = Grants(self.coordinator_key)
        self.process: subprocess.Popen[str] | None = None
        self.address = "127.0.0.1:0"
        self._serial = 0
        (state / "blobs").mkdir(mode=0o700)
        self.service_key.save(state / "blobs" / "key.pem")
        self.renew_certificate()
        write_private(state / "authority.pem", self.authority.certificate_pem)
        write_private(state / "coordinator-public.der", self.coordinator_key.public_der)

    def renew_certificate(self) -> None:
        certificate = self.authority.server_certificate(
            self.service_key.raw.public_key(), [BLOBS_NAME], datetime.datetime.now(datetime.UTC)
        )
        write_private(self.state / "blobs" / "certificate.pem", certificate)

    def start(self, *arguments: str, pass_fds: tuple[int, ...] = (), environment: dict[str, str] | None = None) -> None:
        """Starts the process, on the same port as before, and waits until it serves."""
        command = [sys.executable, "-m", "fallow_coordinator.blobs", "--state", str(self.state)]
        command += ["--listen", self.address, "--free-bytes-floor", "0", "--log-level", "WARNING", *arguments]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, pass_fds=pass_fds, env={**os.environ, **(environment or {})}
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("ready "), f"the blob service did not start: {line!r}"
        self.address = line.split()[1]

    def kill(self) -> None:
        """kill -9."""
        assert self.process is not None
        self.process.kill()
        self._reap()

    def stop(self) -> int:
        """SIGTERM; the exit status."""
        if self.process is None:
            return 0
        self.process.send_signal(signal.SIGTERM)
        return self._reap()

    def _reap(self) -> int:
        assert self.process is not None
        status = self.process.wait(READY_PATIENCE_S)
        if self.process.stdout is not None:
            self.process.stdout.close()
        self.process = None
        return status

    def party(self, name: str, account: str, *, key: PrivateKey | None = None) -> Party:
        """Someone with a certificate of this rig's authority."""
        key = key or PrivateKey.generate()
        self._serial += 1
        granted = CertificateGranted(
            party_id=PartyId(name),
            account_id=AccountId(account),
            role=Role.CLIENT,
            tier=None,
            pool_id=PoolId("default"),
            serial=self._serial.to_bytes(8, "big"),
            not_after_ms=now_ms() + 3_600_000,
        )
        der = self.authority.party_certificate(key.raw.public_key(), granted, datetime.datetime.now(datetime.UTC))
        return Party(name, AccountId(account), key, self._credentials(name, account, key, der))

    def put_grant(self, party: Party, data: bytes, *, kind: BlobKind = BlobKind.OPAQUE) -> SignedBytes:
        return self.grants.put(reference_of(data), party.holder, now_ms=now_ms(), kind=kind)

    def get_grant(self, party: Party, data: bytes) -> SignedBytes:
        return self.grants.get(reference_of(data), party.holder, now_ms=now_ms())

    @contextlib.asynccontextmanager
    async def channel(self, party: Party) -> AsyncGenerator[grpc.aio.Channel, None]:
        async with blob_channel(self._at_this_address(party.credentials)) as channel:
            yield channel

    @contextlib.asynccontextmanager
    async def packer(self, key: PrivateKey) -> AsyncGenerator[BlobPacker, None]:
        """A packer that shows `key`, in a certificate such as the coordinator's own."""
        certificate = self.authority.server_certificate(
            key.raw.public_key(), [CONTROL_NAME], datetime.datetime.now(datetime.UTC)
        )
        packer = BlobPacker(self.address, self.authority.certificate_pem, key, certificate)
        try:
            yield packer
        finally:
            await packer.close()

    def blob_files(self) -> list[Path]:
        return [path for path in (self.state / "blobs" / "blobs").rglob("*") if path.is_file()]

    def partial_files(self) -> list[Path]:
        return list((self.state / "blobs" / "uploads").iterdir())

    def _credentials(self, name: str, account: str, key: PrivateKey, der: bytes) -> Credentials:
        return Credentials(
            folder=self.state / "parties" / name,
            key=key,
            certificate_pem=load_certificate(der).public_bytes(Encoding.PEM),
            authority_pem=self.authority.certificate_pem,
            party_id=PartyId(name),
            account_id=AccountId(account),
            role=Role.CLIENT,
            tier=None,
            pool_id=PoolId("default"),
            enrollment_endpoint="",
            control_endpoint="",
            blob_endpoint=self.address,
            coordinator_public_key=self.coordinator_key.public_der,
        )

    def _at_this_address(self, credentials: Credentials) -> Credentials:
        return replace(credentials, blob_endpoint=self.address)


async def until(holds: Callable[[], bool], *, patience_s: float = 20.0) -> None:
    """Waits until `holds()` is true."""
    deadline = time.monotonic() + patience_s
    while not holds():
        assert time.monotonic() < deadline, "waited too long"
        await asyncio.sleep(0.01)
