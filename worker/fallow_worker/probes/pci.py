"""What sits on the PCI bus, whether a driver is bound to it or not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from fallow_worker.probes.machine import Machine

FOLDER: Final = "/sys/bus/pci/devices"
INTEL: Final = 0x8086
AMD: Final = 0x1022
AMD_GRAPHICS: Final = 0x1002
NVIDIA: Final = 0x10DE
_DISPLAYS: Final = frozenset({0x0300, 0x0302, 0x0380})
"""VGA, 3D and other display controllers."""


@dataclass(frozen=True, slots=True)
class PciDevice:
    """One function on the bus. `kind` is its class and subclass, `driver` the bound kernel driver or empty."""

    address: str
    vendor: int
    device: int
    kind: int
    driver: str

    @property
    def folder(self) -> str:
        """Where the kernel describes it."""
        return f"{FOLDER}/{self.address}"

    @property
    def is_display(self) -> bool:
        """Whether it is a graphics or 3D controller."""
        return self.kind in _DISPLAYS


def pci_devices(machine: Machine) -> tuple[PciDevice, ...]:
    """Every function on the bus, by address."""
    found: list[PciDevice] = []
    for address in machine.names(FOLDER):
        folder = f"{FOLDER}/{address}"
        vendor, device, kind = (hexadecimal(machine.read(f"{folder}/{name}")) for name in ("vendor", "device", "class"))
        if vendor is None or device is None or kind is None:
            continue
        driver = (machine.target(f"{folder}/driver") or "").rpartition("/")[2]
        found.append(PciDevice(address, vendor, device, kind >> 8, driver))
    return tuple(found)


def hexadecimal(text: str | None) -> int | None:
    """The value of `0x8086`; None for anything else."""
    try:
        return int(text, 16) if text else None
    except ValueError:
        return None
