"""Limits that a container or a service manager set: control groups, version 2 and version 1."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from fallow_worker.probes.machine import Machine

_ROOT: Final = "/sys/fs/cgroup"
_NO_LIMIT_BYTES: Final = 1 << 60
"""Version 1 writes "no limit" as a huge number of bytes."""


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """What a control group lets its processes hold, and what they hold now beyond what the kernel can drop."""

    limit_bytes: int
    used_bytes: int


def cores_quota(machine: Machine) -> float | None:
    """The least quota of processor time in this process's group and those above it, in cores; None: no limit."""
    quotas = [
        quota for folder in _folders(machine, "") if (quota := _quota_v2(machine.read(f"{folder}/cpu.max"))) is not None
    ]
    for folder in _folders(machine, "cpu"):
        allowed = _number(machine.read(f"{folder}/cpu.cfs_quota_us"))
        period = _number(machine.read(f"{folder}/cpu.cfs_period_us"))
        if allowed is not None and allowed > 0 and period:
            quotas.append(allowed / period)
    return min(quotas, default=None)


def memory_limits(machine: Machine) -> tuple[MemoryLimit, ...]:
    """Every limit on memory that holds for this process: its own group's and those above it."""
    limits = [_limit(machine, folder, "memory.max", "memory.current") for folder in _folders(machine, "")]
    limits += [
        _limit(machine, folder, "memory.limit_in_bytes", "memory.usage_in_bytes")
        for folder in _folders(machine, "memory")
    ]
    return tuple(limit for limit in limits if limit is not None)


def _limit(machine: Machine, folder: str, limit_file: str, used_file: str) -> MemoryLimit | None:
    limit = _number(machine.read(f"{folder}/{limit_file}"))
    if limit is None or limit >= _NO_LIMIT_BYTES:
        return None
    used = _number(machine.read(f"{folder}/{used_file}")) or 0
    # What was read from files and not touched lately is dropped before anyone is refused memory.
    droppable = 0
    for line in (machine.read(f"{folder}/memory.stat") or "").splitlines():
        name, _, value = line.partition(" ")
        if name in {"inactive_file", "total_inactive_file"}:
            droppable = max(droppable, _number(value) or 0)
    return MemoryLimit(limit, max(0, used - droppable))


def _folders(machine: Machine, controller: str) -> Iterator[str]:
    """This process's group and those above it; `controller` names one of version 1, empty is version 2."""
    for line in (machine.read("/proc/self/cgroup") or "").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controller not in controllers.split(","):
            continue
        root = f"{_ROOT}/{controllers}" if controller else _ROOT
        if controller and not machine.names(root):
            root = f"{_ROOT}/{controller}"
        # Inside a container the path is that of the host, and only the root is there to see.
        folder = path.strip("/")
        while folder:
            if machine.names(f"{root}/{folder}"):
                yield f"{root}/{folder}"
            folder = folder.rpartition("/")[0]
        yield root
        return


def _quota_v2(text: str | None) -> float | None:
    """Cores of a `cpu.max` file: `max 100000` is no limit, `150000 100000` one and a half."""
    quota, _, period = (text or "").partition(" ")
    allowed, each = _number(quota), _number(period)
    return allowed / each if allowed is not None and each else None


def _number(text: str | None) -> int | None:
    try:
        return int(text) if text is not None else None
    except ValueError:
        return None
