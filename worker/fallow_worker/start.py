"""From options to a running daemon and back to an exit status."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import platform
import signal
import sys
from collections.abc import Callable, Generator
from dataclasses import replace
from typing import Final

from fallow.credentials import Credentials
from fallow.enrollment import join
from fallow.errors import FallowError, Reason
from fallow.join_line import parse_join_line
from fallow.roles import Role, Tier
from fallow.session import Capability, DeviceLevel, PoolCache
from fallow_worker.bundle_cache import BundleCache
from fallow_worker.config import PREDECESSOR_WAIT_S, WorkerConfig, drain_run_grace_ms, offer_words, refusal
from fallow_worker.core.limits import RUNS_QUEUED
from fallow_worker.core.world import Terms
from fallow_worker.daemon import Daemon
from fallow_worker.executor import WorkFailed
from fallow_worker.executor.choice import Choice, ExecutorKind, chosen_executor
from fallow_worker.heap import keep_small
from fallow_worker.link import ResumeToken, open_session
from fallow_worker.metering import EnergyMeter, MeteredExecutor
from fallow_worker.nearby import Nearby
from fallow_worker.pool_cache import TIERS_THAT_SERVE, PoolCacheServer
from fallow_worker.ports import Executor
from fallow_worker.probes.cpu import cpu_devices
from fallow_worker.renewal import Renewal
from fallow_worker.state_folder import StateFolder
from fallow_worker.status import StatusReport, capability_facts
from fallow_worker.surroundings import Surroundings
from fallow_worker.transfers import Blobs, ChannelBlobs, Transfers

_log = logging.getLogger(__name__)

_SIGNAL_REASONS: Final = {
    signal.SIGTERM: "the owner stops this worker",
    signal.SIGINT: "the owner stops this worker",
}
CACHE_ONLY: Final = "it serves its pool's cache and takes no work"
_PARENT_GONE: Final = "the process that started this worker is gone"


def joined(folder: StateFolder) -> Credentials:
    """The credentials in a worker's folder. Raises UNAUTHENTICATED with the command to run when nobody joined."""
    try:
        credentials = Credentials.load(folder.credentials)
    except FallowError as error:
        if error.reason is Reason.UNAUTHENTICATED:
            raise FallowError(
                error.reason,
                f"this worker has not joined yet: {folder.folder} holds no credentials",
                field="--state",
                hint="run fallow-worker join LINE with the line that the coordinator's operator gave you",
            ) from None
        raise
    if credentials.role is not Role.WORKER:
        raise FallowError(
            Reason.PERMISSION_DENIED,
            f"{folder.folder} holds the credentials of a {credentials.role.value}, not of a worker",
            field="--state",
            hint="join with a join line for workers, in a folder of its own",
        )
    return credentials


def executor_for(config: WorkerConfig, tier: Tier | None) -> tuple[Executor, Choice]:
    """The executor that the owner's options and the devices here call for; nothing of it runs yet."""
    from fallow_worker.executor.supervisor import SupervisorSettings

    choice = chosen_executor(
        config.executor,
        # What engine children drive: one processor, however many accelerators stand beside it.
        devices=len(cpu_devices()),
        ray_address=config.ray_address,
        tier=tier or Tier.VOLUNTEER,
    )
    settings = SupervisorSettings(cores=config.cpus, tuning_path=str(StateFolder(config.state).tuning.absolute()))
    if choice.kind is ExecutorKind.PROCESS:
        from fallow_worker.executor.on_processes import ProcessExecutor

        return ProcessExecutor(settings), choice
    from fallow_worker.executor.on_ray import RayExecutor
    from fallow_worker.executor.ray_settings import LOCAL_ADDRESS, RaySettings

    return RayExecutor(RaySettings(address=config.ray_address or LOCAL_ADDRESS, supervisor=settings)), choice


def no_executor() -> tuple[Executor, Choice]:
    """For a worker that only serves its pool's cache."""
    from fallow_worker.executor.nothing import NoExecutor

    return NoExecutor(), Choice(ExecutorKind.PROCESS, CACHE_ONLY)


def check_serves(tier: Tier | None) -> None:
    """Returns when a worker of that tier may serve its pool's cache. Raises PERMISSION_DENIED."""
    if tier not in TIERS_THAT_SERVE:
        raise FallowError(
            Reason.PERMISSION_DENIED,
            f"only managed and operators' workers serve a pool, and this one is a {tier.value if tier else 'stranger'}",
            field="--serve-cache",
            hint="join with a line of a managed pool, in a folder of its own",
        )


async def capability_of(executor: Executor, config: WorkerConfig) -> Capability:
    """What the worker will say of itself. Raises EXECUTOR_UNAVAILABLE in words for people."""
    try:
        await executor.start()
        found = await executor.capability()
    except WorkFailed as failed:
        raise FallowError(
            Reason.EXECUTOR_UNAVAILABLE,
            f"nothing can run here: {failed.reason}",
            hint="fallow-worker probe shows what this machine has",
        ) from None
    refused = refusal(config, found.sandbox_level)
    return replace(found, task_kinds=frozenset() if refused else config.task_kinds)


def terms_of(config: WorkerConfig, capability: Capability) -> Terms:
    """What the worker takes on."""
    slots = sum(device.slots for device in capability.devices if device.level is not DeviceLevel.PRESENT)
    return Terms(
        slots=min(config.slots, slots) if config.slots else max(1, slots),
        task_kinds=capability.task_kinds,
        refusal=refusal(config, capability.sandbox_level),
        idle_release_ms=config.idle_release_ms,
        runs_queued=RUNS_QUEUED,
    )


async def _join_as_image(folder: StateFolder) -> None:
    """A copied machine's first start: a key of its own, enrolled with the line that its image kept."""
    with folder.locked():
        line = parse_join_line(folder.join_line.read_text().strip())
        credentials = await join(line, folder.credentials, platform.node())
        logging.getLogger(__name__).info("image.joined worker=%s", credentials.party_id)


async def work(config: WorkerConfig, *, told: Callable[[dict[str, object]], None]) -> int:
    """Runs a worker until it is told to stop; its exit status. `told` hears once what it offers.

    Raises FallowError: not joined, folder in use, executor unavailable, or why the coordinator will not have it.
    """
    keep_small()
    folder = StateFolder(config.state)
    if not (folder.credentials / "certificate.pem").exists() and folder.join_line.exists():
        await _join_as_image(folder)
    credentials = joined(folder)
    wait_s = PREDECESSOR_WAIT_S if credentials.tier is Tier.OPERATOR or config.life_fd is not None else 0.0
    with folder.locked(wait_s=wait_s):
        if config.ask_microcredits_per_unit is not None:
            folder.write_ask(config.ask_microcredits_per_unit)
        return await _work_alone(config, folder, credentials, told)


async def _work_alone(
    config: WorkerConfig, folder: StateFolder, credentials: Credentials, told: Callable[[dict[str, object]], None]
) -> int:
    if config.serve_cache:
        check_serves(credentials.tier)
    chosen, choice = executor_for(config, credentials.tier) if config.works else no_executor()
    executor = MeteredExecutor(chosen, EnergyMeter(owns_devices=not config.ray_address))
    try:
        surroundings = Surroundings(region=config.region, ask=folder.read_ask, owns_devices=not config.ray_address)
        capability = await surroundings.now(await capability_of(executor, config))
    except BaseException:
        await executor.stop()
        raise
    terms = terms_of(config, capability)
    if not config.works:
        terms = replace(terms, refusal=CACHE_ONLY)
    words = offer_words(capability, terms.slots, terms.refusal)
    level = logging.WARNING if terms.refusal and config.works else logging.INFO
    _log.log(level, "worker.offer worker=%s %s", credentials.party_id, words)
    _log.info("worker.executor kind=%s why=%r", choice.kind.value, choice.why)
    facts: dict[str, object] = {
        "worker_id": credentials.party_id,
        "pool_id": credentials.pool_id,
        "tier": credentials.tier.value if credentials.tier else "",
        "coordinator": credentials.control_endpoint,
        "pid": os.getpid(),
        "offer": words,
        "slots": terms.slots,
        "capability": capability_facts(capability),
    }
    cache = BundleCache(folder.cache, bytes_max=config.cache_bytes_max)
    server = PoolCacheServer(credentials, cache) if config.serve_cache else None
    pool_cache = await server.start(config.serve_cache) if server is not None else None
    if server is not None and pool_cache is not None:
        facts["pool_cache"] = pool_cache.endpoint
    report = StatusReport(folder, facts, server.counts if server is not None else None)
    daemon = _daemon(config, folder, credentials, executor, capability, terms, report, surroundings, cache, pool_cache)
    report.attach(daemon)
    told(facts)
    try:
        with _stopping(daemon, drain_run_grace_ms(config, credentials.tier), config.life_fd):
            error = await daemon.run()
    finally:
        if server is not None:
            await server.stop()
    report.write()
    if error is not None:
        raise error
    return 0


def _daemon(
    config: WorkerConfig,
    folder: StateFolder,
    credentials: Credentials,
    executor: Executor,
    capability: Capability,
    terms: Terms,
    report: StatusReport,
    surroundings: Surroundings,
    cache: BundleCache,
    pool_cache: PoolCache | None,
) -> Daemon:
    token = ResumeToken(folder.resume_token)
    nearby = Nearby(credentials)

    def blobs_of(papers: Credentials) -> Blobs:
        nearby.use(papers)
        return ChannelBlobs(papers)

    return Daemon(
        terms=terms,
        capability=capability,
        credentials=credentials,
        executor=executor,
        transfers=Transfers(cache, ChannelBlobs(credentials), nearby),
        blobs_of=blobs_of,
        dial=lambda papers, greeting: open_session(papers, greeting, token, pool_cache),
        renewal=Renewal(),
        changed=report.changed,
        looks=surroundings.watch,
    )


@contextlib.contextmanager
def _stopping(daemon: Daemon, run_grace_ms: int, life_fd: int | None) -> Generator[None]:
    """While the block runs, signals and the life descriptor end the daemon: the second time without grace."""
    loop = asyncio.get_running_loop()
    asked = 0

    def stop(reason: str) -> None:
        nonlocal asked
        asked += 1
        daemon.drain(reason, run_grace_ms if asked == 1 else 0)

    for number, reason in _SIGNAL_REASONS.items():
        loop.add_signal_handler(number, stop, reason)
    if life_fd is not None:
        loop.add_reader(life_fd, _read_life, loop, life_fd, lambda: daemon.drain(_PARENT_GONE, 0))
    try:
        yield
    finally:
        for number in _SIGNAL_REASONS:
            loop.remove_signal_handler(number)
        if life_fd is not None:
            loop.remove_reader(life_fd)


def _read_life(loop: asyncio.AbstractEventLoop, life_fd: int, gone: Callable[[], None]) -> None:
    try:
        data = os.read(life_fd, 4096)
    except OSError:
        data = b""
    if not data:
        loop.remove_reader(life_fd)
        gone()


def print_json(value: object) -> None:
    """One JSON object on stdout."""
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()
