"""One coordinator: journal, engine, services and child processes, put together, started and stopped in order."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import gc
import logging
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import grpc
import psutil
from cryptography.hazmat.primitives.serialization import Encoding

from fallow.credentials import Credentials, key_of_folder, pem_of
from fallow.errors import FallowError, Reason
from fallow.identity import BLOBS_NAME, CONTROL_NAME, ENROLLMENT_NAME, PrivateKey, load_certificate, write_private
from fallow.ids import AccountId
from fallow.limits import CONTROL_MESSAGE_BYTES_MAX
from fallow.roles import Role, Tier
from fallow_coordinator.blob_keeping import RemoteBlobs
from fallow_coordinator.blobs.bucket import BucketPlace
from fallow_coordinator.carbon.keeper import CarbonKeeper
from fallow_coordinator.children import ChildCommand, Children
from fallow_coordinator.collector import BlobCollector, EffectSinks
from fallow_coordinator.config import CollectionSettings, EngineSettings
from fallow_coordinator.core.answers import CertificateGranted
from fallow_coordinator.core.commands import EnrollLocal, MeasuringRules, RenewCertificate, StartJournal
from fallow_coordinator.engine import Engine, wall_clock_ms
from fallow_coordinator.packing import BlobPacker
from fallow_coordinator.service.admin import AdminService
from fallow_coordinator.service.auth import Doorkeeper, caller_by_key
from fallow_coordinator.service.authority import Authority
from fallow_coordinator.service.certificates import CertificateService
from fallow_coordinator.service.descriptors import raise_limit
from fallow_coordinator.service.enrollment import CERTIFICATE_VALID_FOR_MS, Endpoints, EnrollmentService
from fallow_coordinator.service.grants import Grants
from fallow_coordinator.service.job_reads import JobReads
from fallow_coordinator.service.jobs import JobService
from fallow_coordinator.service.lease_messages import LeaseMessages
from fallow_coordinator.service.ledger import LedgerService
from fallow_coordinator.service.live_streams import LiveStreams
from fallow_coordinator.service.outbox import Outbox
from fallow_coordinator.service.pool_caches import PoolCaches
from fallow_coordinator.service.rate_limit import RateLimit
from fallow_coordinator.service.server import (
    CONTROL_CONNECTIONS_SHARE,
    CONTROL_IDLE_MS_MAX,
    ENROLLMENT_AGE_MS_MAX,
    ENROLLMENT_CONNECTIONS_SHARE,
    ENROLLMENT_IDLE_MS_MAX,
    ENROLLMENT_MESSAGE_BYTES_MAX,
    RpcServer,
    assert_fast_protobuf,
    mutual_tls,
    server_tls,
)
from fallow_coordinator.service.workers import WorkerService
from fallow_coordinator.state_folder import Ports, StateFolder, port_taken
from fallow_coordinator.store.journal_prover import JournalProver
from fallow_coordinator.store.ledger_views import SqliteLedgerViews
from fallow_coordinator.store.snapshots import JournalSnapshots
from fallow_coordinator.store.sqlite import SqliteStore
from fallow_coordinator.store.views import SqliteViews

_log = logging.getLogger(__name__)

OPERATOR_ACCOUNT_NAME: Final = "operator"
DEFAULT_POOL_NAME: Final = "default"
START_TOKEN_VALID_FOR_MS: Final = 24 * 3_600_000
START_WORKER_TOKEN_USES: Final = 100
START_CLIENT_TOKEN_USES: Final = 10
BLOBS_PATIENCE_S: Final = 30.0
LOCAL_RENEWAL_CHECK_S: Final = 600.0
LOOPBACK: Final = "127.0.0.1"
LOOPBACK_OF: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - compared with, not listened on
"""How this machine reaches a coordinator that listens on all its addresses."""

ENROLLMENT_CALLS_PER_S: Final = 20.0
ENROLLMENT_CALLS_BURST: Final = 1_000
"""A whole lab behind one address may join at once."""
CALLS_PER_S: Final = 500.0
CALLS_BURST: Final = 4_000
RATE_PEERS_MAX: Final = 20_000


@dataclass(frozen=True, slots=True)
class StartOptions:
    """What `fallow-coordinator start` was told."""

    state: Path
    listen: str
    advertise: str
    """Host that parties are told; empty: the one listened on."""
    first_port: int | None
    """None: as at the last start; 0: free ones."""
    operator_worker: bool
    heartbeat_interval_ms: int = 10_000
    collection: CollectionSettings = CollectionSettings()  # noqa: RUF009 - frozen
    bucket: BucketPlace | None = None
    """Where blobs lie; None: where they lay at the last start, or in the state folder."""
    measuring: MeasuringRules | None = MeasuringRules()  # noqa: RUF009 - frozen
    """None: no device is challenged."""
    single_port: int | None = None
    """Parties reach all three endpoints here, which then listen on the loopback address alone; None: three ports."""
    carbon: Path | None = None
    """The carbon table; None: `carbon.csv` in the state folder, or the synthetic default."""


@dataclass(frozen=True, slots=True)
class Started:
    """What a script or person needs to know once the coordinator runs."""

    endpoints: Endpoints
    worker_join_line: str
    client_join_line: str
    authority_fingerprint: str


class Coordinator:
    """Everything that one coordinator process runs. Use `running`."""

    def __init__(self, options: StartOptions, folder: StateFolder) -> None:
        """Opens keys, authority and journal, and puts the services together; nothing runs yet."""
        assert_fast_protobuf()
        self._options = options
        self._folder = folder
        self._listen = options.listen if options.single_port is None else LOOPBACK
        self._ports = Ports.chosen(folder, self._listen, options.first_port)
        host = options.advertise or options.listen
        local_host = LOOPBACK_OF.get(self._listen, self._listen)
        single = options.single_port
        self.endpoints = _endpoints(host, self._ports if single is None else Ports(single, single, single))
        self._local_endpoints = _endpoints(local_host, self._ports)
        self._authority = Authority.open(folder.authority, _now())
        self._key = _key(folder.coordinator_key)
        self._blob_key = _key(folder.blobs / "key.pem")
        self._certificate = self._authority.server_certificate(
            self._key.raw.public_key(), (CONTROL_NAME, ENROLLMENT_NAME), _now()
        )
        self._write_public_files()
        self._store = SqliteStore(folder.journal)
        self._views = SqliteViews(folder.journal)
        self._ledger_views = SqliteLedgerViews(folder.journal)
        self._prover = JournalProver(folder.journal, self._views)
        self._packer = BlobPacker(
            self._local_endpoints.blobs, self._authority.certificate_pem, self._key, self._certificate
        )
        self._streams = LiveStreams()
        self._outbox = Outbox(self._streams)
        self._collector = BlobCollector(
            RemoteBlobs(self._packer.channel), self._views, options.collection, clock=wall_clock_ms
        )
        self._engine = Engine(
            store=self._store,
            sink=EffectSinks(self._outbox, self._collector),
            packer=self._packer,
            single_rows=self._packer,
            views=self._views,
            snapshots=JournalSnapshots(folder.journal),
            settings=EngineSettings(measuring=options.measuring),
        )
        self._doorkeeper = Doorkeeper(self._engine, wall_clock_ms)
        self._carbon = CarbonKeeper(options.carbon or folder.carbon_table, required=options.carbon is not None)
        self._children = Children()
        self._tasks: list[asyncio.Task[None]] = []
        self._build_services()

    def _build_services(self) -> None:
        process, loop_clock = psutil.Process(), asyncio.get_running_loop().time
        grants = Grants(self._key)
        self.admin = AdminService(
            engine=self._engine,
            views=self._views,
            doorkeeper=self._doorkeeper,
            enrollment_endpoint=self.endpoints.enrollment,
            authority_fingerprint=self._authority.fingerprint,
            started_at_ms=wall_clock_ms(),
            resident_bytes=lambda: process.memory_info().rss,
            now_ms=wall_clock_ms,
        )
        caches = PoolCaches()
        self._workers = WorkerService(
            engine=self._engine,
            doorkeeper=self._doorkeeper,
            streams=self._streams,
            outbox=self._outbox,
            leases=LeaseMessages(self._engine, grants, caches, wall_clock_ms),
            caches=caches,
            key=self._key,
            blob_service_key=self._blob_key.public_der,
            blob_endpoint=self.endpoints.blobs,
            heartbeat_interval_ms=self._options.heartbeat_interval_ms,
            now_ms=wall_clock_ms,
        )
        jobs = JobService(
            engine=self._engine,
            reads=JobReads(self._engine, self._views),
            doorkeeper=self._doorkeeper,
            streams=self._streams,
            outbox=self._outbox,
            grants=grants,
            blob_service_key=self._blob_key.public_der,
            blob_endpoint=self.endpoints.blobs,
            now_ms=wall_clock_ms,
            collection=self._options.collection,
        )
        ledger = LedgerService(
            engine=self._engine,
            reads=JobReads(self._engine, self._views),
            views=self._ledger_views,
            doorkeeper=self._doorkeeper,
            now_ms=wall_clock_ms,
        )
        certificates = CertificateService(
            engine=self._engine,
            reads=JobReads(self._engine, self._views),
            prover=self._prover,
            doorkeeper=self._doorkeeper,
            key=self._key,
            coordinator_certificate=load_certificate(self._certificate).public_bytes(Encoding.DER),
            authority_certificate=self._authority.certificate_der,
            now_ms=wall_clock_ms,
        )
        enrollment = EnrollmentService(
            engine=self._engine,
            authority=self._authority,
            key=self._key,
            endpoints=self.endpoints,
            now_ms=wall_clock_ms,
        )
        calls = RateLimit(per_s=CALLS_PER_S, burst=CALLS_BURST, peers_max=RATE_PEERS_MAX, clock=loop_clock)
        joins = RateLimit(
            per_s=ENROLLMENT_CALLS_PER_S, burst=ENROLLMENT_CALLS_BURST, peers_max=RATE_PEERS_MAX, clock=loop_clock
        )
        self._control_server = RpcServer(
            handlers=(
                self._workers.handlers(calls),
                jobs.handlers(calls),
                ledger.handlers(calls),
                certificates.handlers(calls),
                self.admin.handlers(calls),
            ),
            service_names=(
                "fallow.v1.WorkerService",
                "fallow.v1.JobService",
                "fallow.v1.LedgerService",
                "fallow.v1.CertificateService",
                "fallow.v1.AdminService",
            ),
            message_bytes_max=CONTROL_MESSAGE_BYTES_MAX,
            idle_ms_max=CONTROL_IDLE_MS_MAX,
            connections_share=CONTROL_CONNECTIONS_SHARE,
            reflect=True,
        )
        self._enrollment_server = RpcServer(
            handlers=(enrollment.handlers(joins),),
            service_names=("fallow.v1.EnrollmentService",),
            message_bytes_max=ENROLLMENT_MESSAGE_BYTES_MAX,
            idle_ms_max=ENROLLMENT_IDLE_MS_MAX,
            connections_share=ENROLLMENT_CONNECTIONS_SHARE,
            # Short calls of strangers; at the control endpoint workers' streams last for days.
            age_ms_max=ENROLLMENT_AGE_MS_MAX,
            reflect=True,
        )

    # ------------------------------------------------------------------------------------------- life

    async def start(self) -> Started:
        """Everything runs when this returns. Raises FallowError with what to do when something can't."""
        if await self._engine.start() == 0:
            await self._engine.submit(StartJournal(OPERATOR_ACCOUNT_NAME, DEFAULT_POOL_NAME))
        await self._local_credentials(self._folder.client, "operator", Role.OPERATOR, None)
        self._start_follower_and_blobs()
        host = self._listen
        await _listening(
            self._enrollment_server, host, self._ports.enrollment, "enrolment", server_tls(self._key, self._certificate)
        )
        await _listening(
            self._control_server,
            host,
            self._ports.control,
            "control",
            mutual_tls(self._key, self._certificate, self._authority.certificate_pem),
        )
        await _reachable(self._local_endpoints.blobs)
        if self._options.single_port is not None:
            self._start_splice(self._options.single_port)
        if self._options.operator_worker:
            await self._local_credentials(self._folder.operator_worker, "operator-worker", Role.WORKER, Tier.OPERATOR)
            self._start_operator_worker()
        spawn = asyncio.create_task
        self._tasks = [
            spawn(self._streams.watch_expiry(self._doorkeeper.not_after_ms, wall_clock_ms), name="streams.expiry"),
            spawn(self._keep_local_credentials(), name="credentials.local"),
            spawn(self._collector.sweep_for_ever(self._engine), name="blobs.sweep"),
            spawn(self._collector.drop_inputs_for_ever(), name="blobs.inputs"),
            spawn(self._carbon.keep_for_ever(self._engine), name="carbon"),
        ]
        worker = await self.admin.issue_token(
            account_id=None,
            role=Role.WORKER,
            tier=Tier.VOLUNTEER,
            pool_id=None,
            uses_max=START_WORKER_TOKEN_USES,
            valid_for_ms=START_TOKEN_VALID_FOR_MS,
            tags=("start",),
        )
        client = await self.admin.issue_token(
            account_id=self._operator_account(),
            role=Role.CLIENT,
            tier=None,
            pool_id=None,
            uses_max=START_CLIENT_TOKEN_USES,
            valid_for_ms=START_TOKEN_VALID_FOR_MS,
            tags=("start",),
        )
        # What was loaded and replayed stays: the collector need not look at it again.
        gc.collect()
        gc.freeze()
        _log.info("coordinator.started control=%s state=%s", self.endpoints.control, self._folder.path)
        return Started(self.endpoints, worker.join_line, client.join_line, self._authority.fingerprint.hex())

    async def stop(self) -> None:
        """Ends streams with a reason, then calls, children, engine and journal; nothing is left running."""
        stopping = FallowError(
            Reason.COORDINATOR_STOPPING, "the coordinator is stopping", hint="reconnect in a few seconds"
        )
        self._streams.stop(stopping)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(self._control_server.stop(), self._enrollment_server.stop(), self._children.stop())
        await self._workers.drain()
        await self._engine.stop()
        await self._packer.close()
        self._prover.close()
        self._store.close()
        _log.info("coordinator.stopped")

    # ------------------------------------------------------------------------------------------- parts

    def _write_public_files(self) -> None:
        blobs = self._authority.server_certificate(self._blob_key.raw.public_key(), (BLOBS_NAME,), _now())
        write_private(self._folder.blobs / "certificate.pem", blobs)
        write_private(self._folder.authority_certificate, self._authority.certificate_pem)
        write_private(self._folder.coordinator_public_key, self._key.public_der)

    def _start_follower_and_blobs(self) -> None:
        state = str(self._folder.path)
        address = f"{_bracketed(self._listen)}:{self._ports.blobs}"
        logs = self._folder.logs
        self._children.start(
            ChildCommand(
                "blobs",
                "fallow_coordinator.blobs",
                (
                    *("--state", state, "--listen", address),
                    *("--grace-ms", str(self._options.collection.blob_grace_ms)),
                    *self._bucket_arguments(),
                ),
                logs / "blobs.log",
            )
        )
        self._children.start(
            ChildCommand(
                "follower",
                "fallow_coordinator.follower",
                ("--state", str(self._folder.journal), "--key", str(self._folder.coordinator_key)),
                logs / "follower.log",
            )
        )

    def _start_splice(self, port: int) -> None:
        ports = self._ports
        self._children.start(
            ChildCommand(
                "splice",
                "fallow_coordinator.splice",
                (
                    *("--listen", self._options.listen, "--port", str(port), "--inner-host", self._listen),
                    *("--enrollment", str(ports.enrollment), "--control", str(ports.control)),
                    *("--blobs", str(ports.blobs)),
                ),
                self._folder.logs / "splice.log",
            )
        )

    def _bucket_arguments(self) -> tuple[str, ...]:
        """For the blob service, when blobs lie in a bucket; remembered for `check` and for starts that name none."""
        folder = self._folder.blobs
        place = self._options.bucket or BucketPlace.of_folder(folder)
        if place is None:
            return ()
        place.remember(folder)
        where = ("--s3-bucket", place.bucket, "--s3-prefix", place.prefix)
        return (*where, "--s3-endpoint", place.endpoint, "--s3-region", place.region)

    def _start_operator_worker(self) -> None:
        arguments = (
            "start",
            "--state",
            str(self._folder.operator_worker),
            "--executor",
            "process",
            "--task-kinds",
            "inspect,check,referee",
        )
        log = self._folder.logs / "operator-worker.log"
        self._children.start(ChildCommand("operator-worker", "fallow_worker", arguments, log))

    def _operator_account(self) -> AccountId:
        return self._engine.state.operator_account_id

    async def _local_credentials(self, path: Path, name: str, role: Role, tier: Tier | None) -> None:
        """Credentials of a party of this machine, enrolled on first use; fresh, and with today's endpoints."""
        key = key_of_folder(path)
        known = caller_by_key(self._engine.state, key.fingerprint)
        if known is not None and known.revoked:
            raise FallowError(
                Reason.PARTY_REVOKED,
                f"the party whose key lies in {path} was revoked",
                field=str(path),
                hint=f"remove {path} and start again: a new one is made",
            )
        if known is None:
            decision = await self._engine.submit(
                EnrollLocal(key.fingerprint, key.public_der, name, role, tier, CERTIFICATE_VALID_FOR_MS)
            )
        else:
            decision = await self._engine.submit(RenewCertificate(key.fingerprint, CERTIFICATE_VALID_FOR_MS))
        granted = decision.answer
        assert isinstance(granted, CertificateGranted), "enrolling and renewing grant a certificate"
        certificate = self._authority.party_certificate(key.raw.public_key(), granted, _now())
        Credentials(
            folder=path,
            key=key,
            certificate_pem=pem_of(certificate),
            authority_pem=self._authority.certificate_pem,
            party_id=granted.party_id,
            account_id=granted.account_id,
            role=granted.role,
            tier=granted.tier,
            pool_id=granted.pool_id,
            enrollment_endpoint=self._local_endpoints.enrollment,
            control_endpoint=self._local_endpoints.control,
            blob_endpoint=self._local_endpoints.blobs,
            coordinator_public_key=self._key.public_der,
        ).save()

    async def _keep_local_credentials(self) -> None:
        """Renews the operator's client certificate at half life; the worker renews its own."""
        while True:
            await asyncio.sleep(LOCAL_RENEWAL_CHECK_S)
            try:
                credentials = Credentials.load(self._folder.client)
                if credentials.not_after_ms - wall_clock_ms() < CERTIFICATE_VALID_FOR_MS // 2:
                    await self._local_credentials(self._folder.client, "operator", Role.OPERATOR, None)
            except (FallowError, OSError) as error:
                _log.warning("credentials.not_renewed folder=%s error=%s", self._folder.client, error)


@contextlib.asynccontextmanager
async def running(options: StartOptions) -> AsyncGenerator[Started, None]:
    """A coordinator while the block runs; the folder is locked. Raises FallowError with what to do."""
    raise_limit()
    folder = StateFolder(options.state)
    folder.prepare()
    with folder.locked():
        coordinator = Coordinator(options, folder)
        try:
            yield await coordinator.start()
        finally:
            await coordinator.stop()


def _key(path: Path) -> PrivateKey:
    if not path.exists():
        PrivateKey.generate().save(path)
    return PrivateKey.load(path)


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _endpoints(host: str, ports: Ports) -> Endpoints:
    name = _bracketed(host)
    return Endpoints(f"{name}:{ports.enrollment}", f"{name}:{ports.control}", f"{name}:{ports.blobs}")


async def _listening(
    server: RpcServer, host: str, port: int, endpoint: str, credentials: grpc.ServerCredentials
) -> None:
    try:
        await server.start(host, port, credentials)
    except OSError as error:
        raise port_taken(host, port, endpoint, error) from None


async def _reachable(endpoint: str) -> None:
    """Returns when the blob service listens. Raises COORDINATOR_UNREACHABLE."""
    host, _, port = endpoint.rpartition(":")
    try:
        async with asyncio.timeout(BLOBS_PATIENCE_S):
            while True:
                try:
                    _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
                except OSError:
                    await asyncio.sleep(0.05)
                    continue
                writer.close()
                return
    except TimeoutError:
        raise FallowError(
            Reason.COORDINATOR_UNREACHABLE,
            f"the blob service does not listen on {endpoint}",
            limit=f"{BLOBS_PATIENCE_S:g} s",
            hint="its log is in the state folder: logs/blobs.log",
        ) from None
