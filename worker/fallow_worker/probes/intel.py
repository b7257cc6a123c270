"""Intel GPUs: the display functions on the bus that the drivers i915 and xe drive."""

from __future__ import annotations

from collections.abc import Sequence

from fallow.session import Device, DeviceKind, DeviceLevel
from fallow_worker.probes.machine import Machine
from fallow_worker.probes.pci import INTEL, PciDevice

_DRIVERS = frozenset({"i915", "xe"})


def intel_gpus(machine: Machine, bus: Sequence[PciDevice]) -> tuple[Device, ...]:
    """Every Intel GPU that the bus shows; most share the machine's memory and tell no size."""
    if machine.system != "Linux":
        return ()
    return tuple(_gpu(machine, found) for found in bus if found.vendor == INTEL and found.is_display)


def _gpu(machine: Machine, found: PciDevice) -> Device:
    obstacle = ""
    if found.driver not in _DRIVERS:
        bound = f"the driver {found.driver} is bound" if found.driver else "no driver is bound"
        obstacle = f"{bound} instead of i915 or xe: a newer kernel, or `sudo modprobe xe`, brings it"
    elif not any(name.startswith("renderD") for name in machine.names("/dev/dri")):
        obstacle = "the kernel offers no /dev/dri/renderD* here: give this container or user the render device"
    memory = machine.read(f"{found.folder}/lmem_total_bytes") or ""
    return Device(
        device_id=f"gpu-{found.address}",
        kind=DeviceKind.GPU,
        level=DeviceLevel.PRESENT,
        vendor="Intel",
        model=f"Intel GPU {found.device:04x}",
        memory_bytes=int(memory) if memory.isdigit() else 0,
        driver_version=f"{found.driver} {machine.release}" if found.driver else "",
        obstacle=obstacle,
    )
