"""All probes together: every device of a machine with its level, and for what is not usable the way out."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

from fallow.session import Device, DeviceKind, DeviceLevel
from fallow_worker.core.providers import Provider
from fallow_worker.probes.amd import amd_gpus
from fallow_worker.probes.apple import apple_devices
from fallow_worker.probes.cpu import cpu_devices
from fallow_worker.probes.intel import intel_gpus
from fallow_worker.probes.machine import HERE, Machine
from fallow_worker.probes.memory import memory_bytes_free
from fallow_worker.probes.npu import npus
from fallow_worker.probes.nvidia import nvidia_gpus
from fallow_worker.probes.pci import pci_devices
from fallow_worker.probes.power import on_battery
from fallow_worker.probes.remedies import obstacle_of
from fallow_worker.probes.runtimes import Runtime, installed_runtime, trial_choices, trial_error

TRIALS_AT_ONCE_MAX: Final = 4
DEVICES_MAX: Final = 32
"""Devices of one machine that are looked at."""


@dataclass(frozen=True, slots=True)
class Survey:
    """What was found."""

    devices: tuple[Device, ...]
    """CPU first. Usable ones have their providers; the others an obstacle."""
    runtime: Runtime
    on_battery: bool
    memory_bytes_free: int
    took_ms: int


def present_devices(machine: Machine = HERE, *, closely: bool = False) -> tuple[Device, ...]:
    """Every device that the operating system shows, CPUs first.

    Reads files only, unless `closely`: then drivers are asked too, in children.
    """
    return (*cpu_devices(machine), *present_accelerators(machine, closely=closely))[:DEVICES_MAX]


def present_accelerators(machine: Machine = HERE, *, closely: bool = False) -> tuple[Device, ...]:
    """The GPUs and NPUs among `present_devices`."""
    bus = pci_devices(machine) if machine.system == "Linux" else ()
    return (
        *nvidia_gpus(machine, bus, closely=closely),
        *amd_gpus(machine, bus),
        *intel_gpus(machine, bus),
        *apple_devices(machine, closely=closely),
        *npus(machine, bus),
    )


def survey(machine: Machine = HERE) -> Survey:
    """Looks at everything and tries what is there. Bounded by the deadlines of the probes; never raises."""
    started = time.monotonic()
    with ThreadPoolExecutor(TRIALS_AT_ONCE_MAX, thread_name_prefix="probe") as threads:
        asked_runtime = threads.submit(installed_runtime, machine)
        present = present_devices(machine, closely=True)
        runtime = asked_runtime.result()
        present = (*present, *_listed_beside(present, runtime, machine))[:DEVICES_MAX]
        judged = threads.map(partial(_judged, machine, runtime), _numbered(present))
        devices = tuple(judged)
    took_ms = int((time.monotonic() - started) * 1000)
    return Survey(devices, runtime, on_battery(machine), memory_bytes_free(machine), took_ms)


def _judged(machine: Machine, runtime: Runtime, numbered: tuple[Device, int]) -> Device:
    """The device with its level: tried where a provider for it is installed."""
    device, ordinal = numbered
    if device.kind is DeviceKind.CPU:
        return _judged_cpu(machine, runtime, device)
    if device.obstacle or len(runtime.builds) > 1:
        return replace(device, obstacle=obstacle_of(device, runtime, {}, system=machine.system))
    errors: dict[Provider, str] = {}
    works: list[str] = []
    for choice in trial_choices(device, runtime, ordinal=ordinal):
        error = trial_error(machine, choice)
        if error:
            errors[choice.provider] = error
        else:
            works.append(choice.provider.value)
    if works:
        return replace(device, level=DeviceLevel.USABLE, providers=tuple(works))
    return replace(device, obstacle=obstacle_of(device, runtime, errors, system=machine.system))


def _judged_cpu(machine: Machine, runtime: Runtime, device: Device) -> Device:
    if runtime.error or runtime.cpu_error or Provider.CPU.value not in runtime.providers:
        errors = {Provider.CPU: runtime.cpu_error} if runtime.cpu_error else {}
        return replace(device, obstacle=obstacle_of(device, runtime, errors, system=machine.system))
    return replace(
        device,
        level=DeviceLevel.USABLE,
        providers=(Provider.CPU.value,),
        driver_version=f"onnxruntime {runtime.version}",
    )


def _listed_beside(present: Sequence[Device], runtime: Runtime, machine: Machine) -> tuple[Device, ...]:
    """On Windows, what the runtime lists and no probe of ours has found: of a kind and vendor not seen yet."""
    if machine.system != "Windows":
        return ()
    seen = {(device.kind, device.vendor) for device in present}
    return tuple(device for device in runtime.listed if (device.kind, device.vendor) not in seen)


def _numbered(devices: Sequence[Device]) -> list[tuple[Device, int]]:
    """Each device with the number by which providers know it: counted by kind and vendor."""
    counts: Counter[tuple[DeviceKind, str]] = Counter()
    numbered: list[tuple[Device, int]] = []
    for device in devices:
        key = (device.kind, device.vendor)
        numbered.append((device, counts[key]))
        counts[key] += 1
    return numbered
