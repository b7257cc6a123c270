"""The CPU: model, cores that this process may really use, instruction set level."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

from fallow.session import Device, DeviceKind, DeviceLevel
from fallow_worker.probes.control_groups import cores_quota
from fallow_worker.probes.machine import HERE, Machine
from fallow_worker.probes.memory import COMMAND_SECONDS_MAX, memory_bytes_total

# The x86-64 psABI levels (https://gitlab.com/x86-psABIs/x86-64-ABI), by the names the Linux kernel gives the features.
_LEVELS: Final[tuple[tuple[str, frozenset[str]], ...]] = (
    ("x86-64-v2", frozenset({"cx16", "lahf_lm", "popcnt", "pni", "sse4_1", "sse4_2", "ssse3"})),
    ("x86-64-v3", frozenset({"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"})),
    ("x86-64-v4", frozenset({"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"})),
)
_EXTRAS: Final = ("avx512_vnni", "avx_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16", "avx512_fp16")
"""Beyond the levels: features that change which kernels a runtime picks, and so the bits of its results."""
_ARM_FEATURES: Final = ("asimddp", "i8mm", "bf16", "sve", "sve2", "fphp")
_APPLE_FEATURES: Final = {
    "hw.optional.arm.FEAT_DotProd": "asimddp",
    "hw.optional.arm.FEAT_I8MM": "i8mm",
    "hw.optional.arm.FEAT_BF16": "bf16",
    "hw.optional.arm.FEAT_FP16": "fphp",
}
"""Apple's names for what Linux calls otherwise."""


def cpu_devices(machine: Machine = HERE) -> tuple[Device, ...]:
    """This machine's CPU as one device with one slot: the threads of a slot are the executor's to choose."""
    facts = cpu_facts(machine)
    return (
        Device(
            device_id="cpu-0",
            kind=DeviceKind.CPU,
            level=DeviceLevel.PRESENT,
            vendor=facts.get("vendor_id", ""),
            model=facts.get("model name") or machine.architecture,
            memory_bytes=memory_bytes_total(machine),
            cores=cores_usable(machine),
            architecture=instruction_set(machine.architecture, facts.get("flags") or facts.get("Features", "")),
        ),
    )


def cpu_facts(machine: Machine = HERE) -> Mapping[str, str]:
    """The first processor's entry of /proc/cpuinfo, or the same names from Apple's sysctl; empty where there is
    neither."""
    if machine.system == "Darwin":
        return _apple_facts(machine)
    pairs = (line.partition(":") for line in (machine.read("/proc/cpuinfo") or "").partition("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _apple_facts(machine: Machine) -> Mapping[str, str]:
    brand = machine.run(("sysctl", "-n", "machdep.cpu.brand_string"), deadline_s=COMMAND_SECONDS_MAX).output.strip()
    listed = machine.run(("sysctl", "hw.optional.arm"), deadline_s=COMMAND_SECONDS_MAX).output
    pairs = (line.partition(": ") for line in listed.splitlines())
    flags = [_APPLE_FEATURES[name] for name, _, value in pairs if name in _APPLE_FEATURES and value.strip() == "1"]
    facts = {"model name": brand, "Features": " ".join(flags)}
    return facts | {"vendor_id": "Apple"} if brand.startswith("Apple") else facts


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


def cores_usable(machine: Machine = HERE) -> int:
    """Cores that this process may use: affinity and control group quota count, not what the host shows. At least 1."""
    allowed = machine.cores_allowed()
    quota = cores_quota(machine)
    return max(1, min(allowed, math.floor(quota))) if quota is not None else allowed
