"""Main memory: what this process may use, not what the host has."""

from __future__ import annotations

import os
from typing import Final

from fallow_worker.probes.control_groups import memory_limits
from fallow_worker.probes.machine import HERE, Machine

COMMAND_SECONDS_MAX: Final = 2.0


def memory_bytes_total(machine: Machine = HERE) -> int:
    """Memory of this machine, or of its control group when that is less; 0 when nobody tells."""
    total = _memory_info(machine, "MemTotal") or _configured_bytes(machine)
    limits = [limit.limit_bytes for limit in memory_limits(machine)]
    if total:
        limits.append(total)
    return min(limits, default=0)


def memory_bytes_free(machine: Machine = HERE) -> int:
    """Memory that a new process may still take without swapping anyone out."""
    free = _memory_info(machine, "MemAvailable") or memory_bytes_total(machine)
    return max(0, min([free, *(limit.limit_bytes - limit.used_bytes for limit in memory_limits(machine))]))


def _memory_info(machine: Machine, name: str) -> int:
    """A line of /proc/meminfo in bytes; 0 where there is none."""
    for line in (machine.read("/proc/meminfo") or "").splitlines():
        key, _, value = line.partition(":")
        if key == name and (words := value.split()) and words[0].isdigit():
            return int(words[0]) * 1024
    return 0


def _configured_bytes(machine: Machine) -> int:
    if machine.system == "Darwin":
        text = machine.run(("sysctl", "-n", "hw.memsize"), deadline_s=COMMAND_SECONDS_MAX).output.strip()
        return int(text) if text.isdigit() else 0
    if machine is not HERE:
        return 0
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0
