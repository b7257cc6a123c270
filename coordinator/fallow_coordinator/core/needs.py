"""What work asks of a worker, what a worker offers, and whether the two fit: the one function that says so.

`misfit` is asked by matching, `explain`, `why` and `quote` alike. It knows nothing of load: a worker that fits may be
busy. Memory and asks are compared by classes, powers of two, so that few kinds of lanes and of workers exist however
many jobs and machines there are; an ask is compared exactly once more when a task is given out.
"""

from __future__ import annotations

from enum import StrEnum
from functools import lru_cache
from typing import NamedTuple

from fallow.bundle import Precision
from fallow.credits import PoolMode
from fallow.ids import PoolId
from fallow.job import JobOptions, Objective
from fallow.roles import TIERS_ALLOWED, DataClass, Tier
from fallow.session import Capability, DeviceKind, DeviceLevel, TaskKind

ANY_POOL = PoolId("")
"""Stands for the pool where trust does not depend on one: inspections go to operators' workers of every pool."""

_ABSENT = -1
_OF_OPERATORS = frozenset({TaskKind.INSPECT, TaskKind.REFEREE})
"""Kinds of tasks that go to operators' workers alone, whatever they offer else."""
_NPU_PRECISIONS = frozenset({Precision.FP16, Precision.INT8})


class Needs(NamedTuple):
    """What work asks of a worker; tasks with the same needs stand in one lane. Inspections have no data class."""

    kind: TaskKind
    pool_id: PoolId
    data_class: DataClass | None
    device_kind: DeviceKind | None = None
    """None: any."""
    memory_class: int = 0
    """2 to this power bytes on one device, rounded up; 0: any."""
    region: str = ""
    """Lower case; `us` is met by `us` and by `us-east`; empty: any."""
    precision: Precision | None = None
    """None: the bundle's own."""
    objective: Objective = Objective.COST
    paid: bool = False
    """Paid work goes to measured workers only."""
    limit_class: int = 0
    """Bits of the highest price for a unit; 0: free work only, or a pool without prices."""
    assured: bool = False
    """Rows are checked: workers that were proven wrong get none."""


class Ability(NamedTuple):
    """What a worker offers, as far as it decides what fits; workers of one ability stand in one group."""

    kinds: frozenset[TaskKind]
    pool_id: PoolId
    tier: Tier
    region: str
    cpu_class: int
    """2 to this power bytes are there, rounded down; 0: nobody knows; -1: it has no such usable device."""
    gpu_class: int
    npu_class: int
    measured: bool
    ask_class: int
    """Bits of what it asks for a unit; 0: nothing, or a pool without prices."""
    distrusted: bool = False
    """A row of it was proven wrong."""


class Misfit(StrEnum):
    """Why a worker cannot do some work, ever or now. The first that holds is told."""

    REVOKED = "revoked"
    QUARANTINED = "quarantined"
    KIND = "kind"
    DISTRUSTED = "distrusted"
    POOL = "pool"
    TIER = "tier"
    DEVICE_KIND = "device-kind"
    MEMORY = "memory"
    PRECISION = "precision"
    REGION = "region"
    NOT_MEASURED = "not-measured"
    ASK = "ask"
    AWAY = "away"
    COOLING_DOWN = "cooling-down"
    WINDOW_CLOSED = "window-closed"
    BUSY = "busy"
    FAILED_BEFORE = "failed-before"


MISFIT_WORDS: dict[Misfit, tuple[str, str]] = {
    Misfit.REVOKED: ("its certificate is revoked", "join anew with a fresh token, if the operator gives one"),
    Misfit.QUARANTINED: ("the operator holds it back", "ask the operator why and to release it"),
    Misfit.AWAY: ("it is not connected", "start it with `fallow-worker start`"),
    Misfit.KIND: ("it was started for tasks of other kinds", "see `fallow-worker start --tasks`"),
    Misfit.DISTRUSTED: (
        "a row of it was proven wrong",
        "jobs that are checked go elsewhere; `fallow-coordinator worker release` lets it begin anew",
    ),
    Misfit.POOL: ("it serves another pool", "submit to its pool with --pool, or join it to this one"),
    Misfit.TIER: (
        "its tier may not see rows of this data class",
        "declare the rows public if they are, or add managed or operator workers",
    ),
    Misfit.DEVICE_KIND: (
        "it has no usable device of this kind",
        "drop --device, or see `fallow-worker probe` for what is missing",
    ),
    Misfit.MEMORY: ("no fitting device has so much memory", "ask for less with --memory, or add larger machines"),
    Misfit.PRECISION: ("its devices cannot compute that finely", "accept a coarser precision, or another device"),
    Misfit.REGION: ("it stands in another region", "drop --region, or add workers there"),
    Misfit.NOT_MEASURED: (
        "its devices are not measured, and paid work needs that",
        "leave it connected: it is measured when it is idle",
    ),
    Misfit.ASK: ("it asks for more than the job's limit", "raise --limit, or lower the worker's ask"),
    Misfit.WINDOW_CLOSED: (
        "its owner lets it take no work now",
        "see `fallow-worker status`: in use, on battery, outside its hours, or draining",
    ),
    Misfit.COOLING_DOWN: (
        "it rests after failures of its own",
        "it comes back by itself; its log tells what failed",
    ),
    Misfit.BUSY: ("it fits and is busy", "wait, or add workers"),
    Misfit.FAILED_BEFORE: ("this work failed there before", "others try it first"),
}
"""For each reason: what is so, and what a person can do."""


def misfit(needs: Needs, ability: Ability) -> Misfit | None:
    """Why a worker of this ability cannot do such work, or None when it can."""
    if needs.kind not in ability.kinds:
        return Misfit.KIND
    if needs.assured and ability.distrusted:
        return Misfit.DISTRUSTED
    if needs.pool_id not in (ANY_POOL, ability.pool_id):
        return Misfit.POOL
    if needs.kind in _OF_OPERATORS:
        return None if ability.tier is Tier.OPERATOR else Misfit.TIER
    if needs.data_class is not None and ability.tier not in TIERS_ALLOWED[needs.data_class]:
        return Misfit.TIER
    reason = _device_misfit(needs, ability)
    if reason is not None:
        return reason
    if needs.region and ability.region != needs.region and not ability.region.startswith(f"{needs.region}-"):
        return Misfit.REGION
    if needs.paid and not ability.measured:
        return Misfit.NOT_MEASURED
    if ability.ask_class > needs.limit_class:
        return Misfit.ASK
    return None


@lru_cache(maxsize=4_096)
def fits_own(needs: Needs, ability: Ability) -> bool:
    """Whether a worker of this ability can do such work of its own owner, which is free and outside the market."""
    return misfit(needs._replace(paid=False, limit_class=ability.ask_class), ability) is None


def _device_misfit(needs: Needs, ability: Ability) -> Misfit | None:
    """Some one device must be of the kind, large enough, and fine enough."""
    classes = {
        DeviceKind.CPU: ability.cpu_class,
        DeviceKind.GPU: ability.gpu_class,
        DeviceKind.NPU: ability.npu_class,
    }
    if needs.device_kind is not None:
        classes = {needs.device_kind: classes[needs.device_kind]}
    found = {kind: memory for kind, memory in classes.items() if memory != _ABSENT}
    if not found and needs.device_kind is not None:
        return Misfit.DEVICE_KIND
    large = {kind for kind, memory in found.items() if memory >= needs.memory_class}
    if not large:
        return Misfit.MEMORY if needs.memory_class else None
    if large == {DeviceKind.NPU} and needs.precision not in _NPU_PRECISIONS:
        return Misfit.PRECISION
    return None


def ability_of(
    capability: Capability, *, pool_id: PoolId, tier: Tier, mode: PoolMode, measured: bool, distrusted: bool = False
) -> Ability:
    """What a worker offers that says this of itself in a pool of this mode."""
    classes = dict.fromkeys(DeviceKind, _ABSENT)
    for device in capability.devices:
        if device.level is DeviceLevel.PRESENT:
            continue
        memory_bytes = device.memory_bytes or (capability.memory_bytes_free if device.kind is DeviceKind.CPU else 0)
        classes[device.kind] = max(classes[device.kind], 0, memory_bytes.bit_length() - 1)
    return Ability(
        kinds=capability.task_kinds,
        pool_id=pool_id,
        tier=tier,
        region=capability.region.lower(),
        cpu_class=classes[DeviceKind.CPU],
        gpu_class=classes[DeviceKind.GPU],
        npu_class=classes[DeviceKind.NPU],
        measured=measured,
        ask_class=price_class(capability.ask_microcredits_per_unit) if mode is PoolMode.MARKET else 0,
        distrusted=distrusted,
    )


def needs_of_job(options: JobOptions, *, pool_id: PoolId, data_class: DataClass, mode: PoolMode) -> Needs:
    """What a job with these options asks of a worker in a pool of this mode."""
    limit = options.limit_microcredits_per_unit if mode is PoolMode.MARKET else 0
    return Needs(
        kind=TaskKind.MAP,
        pool_id=pool_id,
        data_class=data_class,
        device_kind=DeviceKind(options.device_kind) if options.device_kind else None,
        memory_class=(options.memory_bytes_min - 1).bit_length() if options.memory_bytes_min > 0 else 0,
        region=options.region.lower(),
        precision=options.precision,
        objective=options.objective,
        paid=limit > 0,
        limit_class=price_class(limit),
        assured=bool(options.assurance),
    )


def price_class(microcredits_per_unit: int) -> int:
    """Bits of a price: prices of one class differ by less than a factor of two."""
    return max(0, microcredits_per_unit).bit_length()


INSPECTION = Needs(TaskKind.INSPECT, ANY_POOL, None)
"""What an inspection asks for: an operator's worker."""
REFEREEING = Needs(TaskKind.REFEREE, ANY_POOL, None)
"""What a referee's task asks for: the same."""
