"""Apple's own chips: GPU and Neural Engine, which share the machine's memory."""

from __future__ import annotations

import json
from typing import Any, Final, cast

from fallow.session import Device, DeviceKind, DeviceLevel
from fallow_worker.probes.machine import Machine
from fallow_worker.probes.memory import COMMAND_SECONDS_MAX, memory_bytes_total

PROFILER_SECONDS_MAX: Final = 10.0


def apple_devices(machine: Machine, *, closely: bool = True) -> tuple[Device, ...]:
    """GPU and Neural Engine of an Apple chip; nothing on other machines, Macs with Intel processors included.

    `closely` asks the system profiler too, which takes a second.
    """
    if machine.system != "Darwin" or machine.architecture != "arm64":
        return ()
    brand = machine.run(("sysctl", "-n", "machdep.cpu.brand_string"), deadline_s=COMMAND_SECONDS_MAX).output.strip()
    memory = memory_bytes_total(machine)
    chip = brand or "Apple chip"
    gpu = Device(
        device_id="gpu-apple-0",
        kind=DeviceKind.GPU,
        level=DeviceLevel.PRESENT,
        vendor="Apple",
        model=(_gpu_model(machine) if closely else "") or f"{chip} GPU",
        memory_bytes=memory,
        driver_version=f"macOS kernel {machine.release}",
    )
    engine = Device(
        device_id="npu-apple-0",
        kind=DeviceKind.NPU,
        level=DeviceLevel.PRESENT,
        vendor="Apple",
        model=f"{chip} Neural Engine",
        memory_bytes=memory,
        driver_version=f"macOS kernel {machine.release}",
    )
    return (gpu, engine)


def _gpu_model(machine: Machine) -> str:
    """The name and cores of the first GPU as the system profiler tells them; empty when it does not."""
    ran = machine.run(("system_profiler", "-json", "SPDisplaysDataType"), deadline_s=PROFILER_SECONDS_MAX)
    try:
        told = cast("dict[str, list[dict[str, Any]]]", json.loads(ran.output))
        first = told["SPDisplaysDataType"][0]
        cores = first.get("sppci_cores", "")
        return f"{first['sppci_model']} GPU" + (f", {cores} cores" if cores else "")
    except (ValueError, LookupError, TypeError):
        return ""
