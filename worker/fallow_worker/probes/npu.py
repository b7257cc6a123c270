"""NPUs of PCs. Intel's and AMD's share the kernel's accel class: the driver link tells which is which."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from fallow.session import Device, DeviceKind, DeviceLevel
from fallow_worker.probes.machine import Machine
from fallow_worker.probes.pci import AMD, INTEL, PciDevice

_CLASS: Final = "/sys/class/accel"
_PROCESSING_ACCELERATOR: Final = 0x1200
_AMD_NPUS: Final = frozenset({0x1502, 0x17F0})
"""AMD's NPUs call themselves signal processing controllers: Phoenix and Hawk Point, then Strix and later."""
_DRIVERS: Final = {"intel_vpu": "Intel", "amdxdna": "AMD"}
_VENDORS: Final = {INTEL: ("Intel", "intel_vpu"), AMD: ("AMD", "amdxdna")}


def npus(machine: Machine, bus: Sequence[PciDevice]) -> tuple[Device, ...]:
    """Every NPU with a driver, then those on the bus that have none. Other accelerators of the class are left out."""
    if machine.system != "Linux":
        return ()
    found = [device for name in machine.names(_CLASS) if (device := _driven(machine, name)) is not None]
    known = {device.device_id for device in found}
    found += [_idle(seen) for seen in bus if _is_npu(seen) and f"npu-{seen.address}" not in known]
    return tuple(found)


def _driven(machine: Machine, name: str) -> Device | None:
    folder = f"{_CLASS}/{name}/device"
    driver = (machine.target(f"{folder}/driver") or "").rpartition("/")[2]
    vendor = _DRIVERS.get(driver)
    if vendor is None:
        return None
    address = (machine.target(folder) or name).rpartition("/")[2]
    obstacle = ""
    if name not in machine.names("/dev/accel"):
        obstacle = f"the device file /dev/accel/{name} is missing here: give this container or user the device"
    return Device(
        device_id=f"npu-{address}",
        kind=DeviceKind.NPU,
        level=DeviceLevel.PRESENT,
        vendor=vendor,
        model=machine.read(f"{folder}/vbnv") or ("Intel AI Boost" if vendor == "Intel" else "AMD XDNA"),
        driver_version=" ".join(filter(None, (driver, machine.read(f"{folder}/fw_version") or machine.release))),
        obstacle=obstacle,
    )


def _is_npu(found: PciDevice) -> bool:
    if found.vendor == INTEL:
        return found.kind == _PROCESSING_ACCELERATOR
    return found.vendor == AMD and found.device in _AMD_NPUS


def _idle(found: PciDevice) -> Device:
    vendor, driver = _VENDORS[found.vendor]
    return Device(
        device_id=f"npu-{found.address}",
        kind=DeviceKind.NPU,
        level=DeviceLevel.PRESENT,
        vendor=vendor,
        model=f"{vendor} NPU {found.device:04x}",
        obstacle=f"no driver is bound: the kernel's {driver} brings it (`sudo modprobe {driver}`, Linux 6.14 or newer)",
    )
