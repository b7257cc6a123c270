"""The CPU: model, cores that this process may really use, instruction set level."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from fallow.session import Device, DeviceKind, DeviceLevel
from fallow_worker.probes.control_groups import control_group_limit
from fallow_worker.probes.memory import memory_bytes_total

_CPU_INFO: Final = Path("/proc/cpuinfo")

# The x86-64 psABI levels (https://gitlab.com/x86-psABIs/x86-64-ABI), by the names the Linux kernel gives the features.
_LEVELS: Final[tuple[tuple[str, frozenset[str]], ...]] = (
    ("x86-64-v2", frozenset({"cx16", "lahf_lm", "popcnt", "pni", "sse4_1", "sse4_2", "ssse3"})),
    ("x86-64-v3", frozenset({"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"})),
    ("x86-64-v4", frozenset({"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"})),
)
_EXTRAS: Final = ("avx512_vnni", "avx_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16", "avx512_fp16")
"""Beyond the levels: features that change which kernels a runtime picks, and so the bits of its results."""
_ARM_FEATURES: Final = ("asimddp", "i8mm", "bf16", "sve", "sve2", "fphp")


def cpu_devices() -> tuple[Device, ...]:
    """This machine's CPU as one device with one slot: the threads of a slot are the executor's to choose."""
    facts = cpu_facts()
    return (
        Device(
            device_id="cpu-0",
            kind=DeviceKind.CPU,
            level=DeviceLevel.PRESENT,
            vendor=facts.get("vendor_id", ""),
            model=facts.get("model name") or platform.processor() or platform.machine(),
            memory_bytes=memory_bytes_total(),
            cores=cores_usable(),
            architecture=instruction_set(platform.machine(), facts.get("flags") or facts.get("Features", "")),
        ),
    )


def cpu_facts() -> Mapping[str, str]:
    """The first processor's entry of /proc/cpuinfo; empty where there is none."""
    try:
        text = _CPU_INFO.read_text(errors="replace")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def instruction_set(machine: str, flags: str) -> str:
    """The instruction set level with the extras that change numerics: `x86-64-v3+avx_vnni`, `aarch64+bf16`."""
    present = frozenset(flags.split())
    if machine in {"x86_64", "AMD64"}:
        level = "x86-64-v1"
        for name, needed in _LEVELS:
            if not needed <= present:
                break
            level = name
        return "+".join((level, *(extra for extra in _EXTRAS if extra in present)))
    if machine in {"aarch64", "arm64"}:
        return "+".join(("aarch64", *(feature for feature in _ARM_FEATURES if feature in present)))
    return machine


def cores_usable() -> int:
    """Cores that this process may use: affinity and control group quota count, not what the host shows. At least 1."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = control_group_limit("cpu.max", _quota_cores)
    return max(1, min(allowed, math.floor(quota))) if quota is not None else allowed


def _quota_cores(text: str) -> float | None:
    """Cores of a `cpu.max` file: `max 100000` is no limit, `150000 100000` one and a half."""
    quota, _, period = text.partition(" ")
    if quota == "max" or not period.strip().isdigit():
        return None
    return int(quota) / int(period)
