"""Main memory: what this process may use, not what the host has."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from fallow_worker.probes.control_groups import control_group_limit, control_group_value

_MEMORY_INFO: Final = Path("/proc/meminfo")


def memory_bytes_total() -> int:
    """Memory of this machine, or of its control group when that is less."""
    total = _memory_info("MemTotal") or _configured_bytes()
    limit = control_group_limit("memory.max", _bytes)
    return min(total, int(limit)) if limit is not None and total else total or int(limit or 0)


def memory_bytes_free() -> int:
    """Memory that a new process may still take without swapping anyone out."""
    free = _memory_info("MemAvailable") or memory_bytes_total()
    limit = control_group_limit("memory.max", _bytes)
    used = control_group_value("memory.current", _bytes)
    if limit is None or used is None:
        return free
    return max(0, min(free, int(limit - used)))


def _memory_info(name: str) -> int:
    """A line of /proc/meminfo in bytes; 0 where there is none."""
    try:
        text = _MEMORY_INFO.read_text()
    except OSError:
        return 0
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0]) * 1024
    return 0


def _configured_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0


def _bytes(text: str) -> float | None:
    return float(text) if text.isdigit() else None
