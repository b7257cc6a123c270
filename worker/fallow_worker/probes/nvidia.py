"""NVIDIA GPUs: seen on the bus, described by NVML in a short-lived child, or by nvidia-smi where NVML is not there.

The bus alone says *present*; a driver that does not answer, or does not match its libraries, is an obstacle with the
fix and holds nobody up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from fallow.limits import MIB
from fallow.session import Device, DeviceKind, DeviceLevel
from fallow_worker.probes.machine import Machine
from fallow_worker.probes.pci import NVIDIA, PciDevice

NVML_SECONDS_MAX: Final = 5.0
_SMI: Final = (
    "nvidia-smi",
    "--query-gpu=pci.bus_id,name,memory.total,driver_version,compute_cap",
    "--format=csv,noheader,nounits",
)
_MISMATCH: Final = (
    "broken: the driver in the kernel and its libraries are of different versions, as after an update: "
    "restart the machine, or `sudo rmmod nvidia_uvm nvidia && sudo modprobe nvidia`"
)
_NOT_LOADED: Final = "broken: the driver is installed and not loaded: `sudo modprobe nvidia`, or install it anew"


def nvidia_gpus(machine: Machine, bus: Sequence[PciDevice], *, closely: bool = True) -> tuple[Device, ...]:
    """Every NVIDIA GPU. `closely` asks the driver for names, memory and health; without, only the bus is read."""
    if machine.system not in {"Linux", "Windows"}:
        return ()
    bus = [found for found in bus if found.vendor == NVIDIA and found.is_display]
    # Below WSL2 the GPU is no PCI device: only the driver's library shows it.
    through_windows = "dxg" in machine.names("/dev") and "libcuda.so.1" in machine.names("/usr/lib/wsl/lib")
    if not closely or not (bus or through_windows):
        return tuple(_seen(machine, found) for found in bus)
    described, trouble = _described(machine)
    found_devices = tuple(_gpu(facts) for facts in described)
    known = {device.device_id for device in found_devices}
    unseen = tuple(_broken(_seen(machine, found), trouble) for found in bus if f"gpu-{found.address}" not in known)
    return (*found_devices, *unseen)


def _seen(machine: Machine, found: PciDevice) -> Device:
    version = machine.read("/sys/module/nvidia/version") if found.driver == "nvidia" else None
    obstacle = ""
    if not found.driver:
        obstacle = "no driver is bound: install NVIDIA's driver for this kernel"
    elif found.driver != "nvidia":
        obstacle = f"the driver {found.driver} is bound, which cannot compute: install NVIDIA's own"
    return Device(
        device_id=f"gpu-{found.address}",
        kind=DeviceKind.GPU,
        level=DeviceLevel.PRESENT,
        vendor="NVIDIA",
        model=f"NVIDIA GPU {found.device:04x}",
        driver_version=version or "",
        obstacle=obstacle,
    )


def _broken(device: Device, trouble: str) -> Device:
    """A GPU on the bus that the driver did not describe; a driver that is not bound at all says more by itself."""
    return device if device.obstacle else replace(device, obstacle=trouble or "broken: the driver does not list it")


def _described(machine: Machine) -> tuple[Sequence[Mapping[str, Any]], str]:
    """What the driver tells of each GPU, or why it tells nothing."""
    answer = machine.ask("nvml", {}, deadline_s=NVML_SECONDS_MAX)
    if answer.failure:
        return (), f"broken: NVIDIA's management library gave {answer.failure}; restart the machine or its driver"
    error = str(answer.facts.get("error", ""))
    if not error:
        gpus: Sequence[Mapping[str, Any]] = answer.facts.get("gpus") or ()
        return gpus, str(answer.facts.get("trouble", ""))
    if error != "not-installed":
        return (), _words(error)
    ran = machine.run(_SMI, deadline_s=NVML_SECONDS_MAX)
    if ran.status != 0:
        said = " ".join((ran.output.strip() or ran.failure).split())
        return (), _words(said)
    return [gpu for line in ran.output.splitlines() if (gpu := _from_smi(line)) is not None], ""


def _words(error: str) -> str:
    lower = error.lower()
    if "mismatch" in lower:
        return _MISMATCH
    if "driver not loaded" in lower or "couldn't communicate" in lower or "driver/library" in lower:
        return _NOT_LOADED
    if "no such file" in lower or "library not found" in lower:
        return "NVIDIA's driver libraries are missing: install the driver, or give this container the GPU"
    return f"broken: {error[:160]}"


def _from_smi(line: str) -> Mapping[str, Any] | None:
    values = [value.strip() for value in line.split(",")]
    if len(values) != 5:
        return None
    address, name, memory, driver, capability = values
    return {
        "address": address,
        "name": name,
        "memory_bytes": int(memory) * MIB if memory.isdigit() else 0,
        "driver": driver,
        "capability": capability,
    }


def _gpu(facts: Mapping[str, Any]) -> Device:
    # NVML writes an eight-digit domain in capitals, the kernel four digits and small letters.
    domain, _, rest = str(facts.get("address", "")).lower().partition(":")
    capability = str(facts.get("capability", "")).replace(".", "")
    memory = facts.get("memory_bytes")
    return Device(
        device_id=f"gpu-{domain[-4:]}:{rest}",
        kind=DeviceKind.GPU,
        level=DeviceLevel.PRESENT,
        vendor="NVIDIA",
        model=str(facts.get("name", "")) or "NVIDIA GPU",
        memory_bytes=memory if isinstance(memory, int) and memory >= 0 else 0,
        driver_version=str(facts.get("driver", "")),
        architecture=f"sm_{capability}" if capability.isdigit() else "",
        obstacle=str(facts.get("obstacle", "")),
    )
