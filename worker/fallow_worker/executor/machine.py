"""The machine that a supervisor runs on: cores it may use, memory, and what its processor is called."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_CGROUP: Final = Path("/sys/fs/cgroup")
_PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


@dataclass(frozen=True, slots=True)
class Machine:
    """What children may be given."""

    cores: int
    """Cores that this process may run on, after affinity and container limits."""
    memory_bytes: int
    architecture: str
    vendor: str
    model: str
    operating_system: str


def this_machine() -> Machine:
    """The machine we are on, read from the system's own files."""
    vendor, model = _processor()
    return Machine(
        cores=usable_cores(),
        memory_bytes=memory_bytes_total(),
        architecture=platform.machine(),
        vendor=vendor,
        model=model,
        operating_system=f"{platform.system()} {platform.release()}",
    )


def usable_cores() -> int:
    """Cores that this process may keep busy, at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _first_line(_CGROUP / "cpu.max").split()
    if len(quota) == 2 and quota[0].isdigit() and quota[1].isdigit() and int(quota[1]) > 0:
        cores = min(cores, max(1, int(quota[0]) // int(quota[1])))
    return max(1, cores)


def memory_bytes_total() -> int:
    """Memory of the machine or of the container around us."""
    total = _meminfo_bytes("MemTotal")
    if not total and hasattr(os, "sysconf"):
        total = os.sysconf("SC_PHYS_PAGES") * _PAGE_BYTES
    limit = _first_line(_CGROUP / "memory.max")
    return min(total, int(limit)) if limit.isdigit() else total


def memory_bytes_free() -> int:
    """Memory that could be given out now without swapping; 0 where the system does not tell."""
    return _meminfo_bytes("MemAvailable")


def resident_bytes(pid: int) -> int:
    """Resident size of a process, shared memory included; 0 when it is gone or the system does not tell."""
    fields = _first_line(Path(f"/proc/{pid}/statm")).split()
    return int(fields[1]) * _PAGE_BYTES if len(fields) > 1 else 0


def _processor() -> tuple[str, str]:
    vendor = model = ""
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                key, _, value = line.partition(":")
                if key.strip() == "vendor_id":
                    vendor = vendor or value.strip()
                elif key.strip() in {"model name", "Model"}:
                    model = model or value.strip()
                elif not line.strip() and model:
                    break
    except OSError:
        pass
    return vendor, model or platform.processor() or platform.machine()


def _meminfo_bytes(name: str) -> int:
    try:
        with Path("/proc/meminfo").open(encoding="ascii", errors="replace") as lines:
            for line in lines:
                if line.startswith(f"{name}:"):
                    return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return 0


def _first_line(path: Path) -> str:
    try:
        with path.open(encoding="ascii", errors="replace") as file:
            return file.readline().strip()
    except OSError:
        return ""
