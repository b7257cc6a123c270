"""AMD GPUs: the display functions on the bus, their memory from the amdgpu driver, and ROCm's gate /dev/kfd."""

from __future__ import annotations

from collections.abc import Sequence

from fallow.session import Device, DeviceKind, DeviceLevel
from fallow_worker.probes.machine import Machine
from fallow_worker.probes.pci import AMD_GRAPHICS, PciDevice


def amd_gpus(machine: Machine, bus: Sequence[PciDevice]) -> tuple[Device, ...]:
    """Every AMD GPU that the bus shows."""
    if machine.system != "Linux":
        return ()
    return tuple(_gpu(machine, found) for found in bus if found.vendor == AMD_GRAPHICS and found.is_display)


def _gpu(machine: Machine, found: PciDevice) -> Device:
    memory = machine.read(f"{found.folder}/mem_info_vram_total") or ""
    obstacle = ""
    if found.driver != "amdgpu":
        bound = f"the driver {found.driver} is bound" if found.driver else "no driver is bound"
        obstacle = f"{bound} instead of amdgpu: load it with `sudo modprobe amdgpu`"
    elif "kfd" not in machine.names("/dev"):
        obstacle = "the kernel offers no /dev/kfd, which ROCm needs: install AMD's ROCm driver for this kernel"
    return Device(
        device_id=f"gpu-{found.address}",
        kind=DeviceKind.GPU,
        level=DeviceLevel.PRESENT,
        vendor="AMD",
        model=machine.read(f"{found.folder}/product_name") or f"AMD GPU {found.device:04x}",
        memory_bytes=int(memory) if memory.isdigit() else 0,
        driver_version=_driver(machine, found.driver),
        architecture=_architecture(machine, found),
        obstacle=obstacle,
    )


def _driver(machine: Machine, driver: str) -> str:
    version = machine.read(f"/sys/module/{driver}/version") if driver else None
    return f"{driver} {version or machine.release}" if driver else ""


def _architecture(machine: Machine, found: PciDevice) -> str:
    """ROCm's name of the instruction set, such as gfx1100, from the topology node of this PCI address."""
    domain, bus, rest = found.address.split(":")
    slot, _, function = rest.partition(".")
    location = int(bus, 16) << 8 | int(slot, 16) << 3 | int(function, 16)
    nodes = "/sys/class/kfd/kfd/topology/nodes"
    for node in machine.names(nodes):
        lines = (machine.read(f"{nodes}/{node}/properties") or "").splitlines()
        properties = dict(line.split(" ", 1) for line in lines if " " in line)
        if properties.get("location_id") != str(location) or properties.get("domain", "0") != str(int(domain, 16)):
            continue
        version = properties.get("gfx_target_version", "0")
        if version.isdigit() and int(version):
            major, minor, step = int(version) // 10_000, int(version) // 100 % 100, int(version) % 100
            return f"gfx{major}{minor:x}{step:x}"
    return ""
