"""What an owner can say about a worker."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fallow.limits import GIB
from fallow.roles import Tier
from fallow.session import SANDBOX_ORDER, Capability, SandboxLevel, TaskKind
from fallow_worker.bundle_cache import CACHE_BYTES_MAX_DEFAULT
from fallow_worker.core.limits import DRAIN_OPERATOR_RUN_GRACE_MS, DRAIN_RUN_GRACE_MS
from fallow_worker.executor.choice import ExecutorSetting

IDLE_RELEASE_MS_DEFAULT = 300_000
PREDECESSOR_WAIT_S = 15.0
"""A worker that a coordinator started waits so long for its predecessor, which ends with its own coordinator."""


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """The options of `fallow-worker start`."""

    state: Path
    executor: ExecutorSetting = ExecutorSetting.AUTO
    ray_address: str = ""
    """The owner's Ray cluster; empty: none, Ray stays on this machine."""
    cpus: int = 0
    """Cores to lend; 0: all that this process may use."""
    slots: int = 0
    """Leases that run at once; 0: as many as the executor has."""
    task_kinds: frozenset[TaskKind] = frozenset({TaskKind.MAP, TaskKind.CHALLENGE})
    weakest_sandbox: SandboxLevel = SandboxLevel.FULL
    """Strangers' programs are refused below this."""
    idle_release_ms: int = IDLE_RELEASE_MS_DEFAULT
    drain_run_grace_ms: int | None = None
    """How long runs may go on when the worker is to stop; None: by tier."""
    region: str = ""
    """Where the machine stands, by the owner's word; empty: not told."""
    ask_microcredits_per_unit: int | None = None
    """What the owner asks in market pools; None: as said last, at first nothing."""
    cache_bytes_max: int = CACHE_BYTES_MAX_DEFAULT
    serve_cache: str = ""
    """Where to serve blobs to others of the pool, `host:port`; empty: not."""
    works: bool = True
    """False: it takes no leases, and is there for its cache alone."""
    life_fd: int | None = None
    """A descriptor that closes when whoever started this worker ends."""


def drain_run_grace_ms(config: WorkerConfig, tier: Tier | None) -> int:
    """How long runs may go on when the worker is to stop."""
    if config.drain_run_grace_ms is not None:
        return config.drain_run_grace_ms
    return DRAIN_OPERATOR_RUN_GRACE_MS if tier is Tier.OPERATOR else DRAIN_RUN_GRACE_MS


def refusal(config: WorkerConfig, reached: SandboxLevel) -> str:
    """Why strangers' programs are refused here, and how the owner may allow them; empty when they are not refused."""
    if SANDBOX_ORDER.index(reached) >= SANDBOX_ORDER.index(config.weakest_sandbox):
        return ""
    return (
        f"the sandbox here reaches only level {reached.value}, below {config.weakest_sandbox.value}; "
        f"the owner can allow that with --accept-weaker-sandbox {reached.value}"
    )


def offer_words(capability: Capability, slots: int, refused: str) -> str:
    """What a worker offers, in one line for people."""
    devices = ", ".join(
        f"{device.kind.value} {device.model or device.device_id}"
        + (f" ({device.cores} cores)" if device.cores else "")
        + (f" [unusable: {device.obstacle}]" if device.obstacle else "")
        for device in capability.devices
    )
    if refused:
        return f"offers nothing: {refused}"
    kinds = ", ".join(sorted(kind.value for kind in capability.task_kinds)) or "nothing"
    memory = f", {capability.memory_bytes_free / GIB:.1f} GiB free" if capability.memory_bytes_free else ""
    return (
        f"offers {kinds} on {devices or 'no device'}{memory}; executor {capability.executor}, {slots} at once, "
        f"sandbox {capability.sandbox_level.value}"
    )
