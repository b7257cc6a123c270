"""Sensors of energy: RAPL through powercap, the battery's discharge, NVIDIA's counters; and a model where none is.

RAPL: https://docs.kernel.org/power/powercap/powercap.html (`energy_uj` counts micro-joules up to
`max_energy_range_uj`). Battery: https://docs.kernel.org/power/power_supply_class.html (µW, µA, µV).
NVML: nvmlDeviceGetTotalEnergyConsumption (mJ, from Volta on), else nvmlDeviceGetPowerUsage (mW).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, cast

from fallow_worker.core.energy import Counter, Power, PowerModel
from fallow_worker.probes.cpu import cpu_facts
from fallow_worker.probes.machine import HERE, Machine
from fallow_worker.probes.nvidia import NVML_SECONDS_MAX

_POWERCAP: Final = "/sys/class/powercap"
_SUPPLIES: Final = "/sys/class/power_supply"
_ZONE: Final = re.compile(r"intel-rapl:\d+(:\d+)?")
"""Zones, not control types; the `-mmio` control type counts the same packages once more."""
ZONES_MAX: Final = 64
JIFFY_MICROSECONDS: Final = 10_000
"""/proc/stat counts in 1/100 s on every architecture (USER_HZ)."""


class SensorKind(StrEnum):
    """What tells the energy of the processors."""

    RAPL = "rapl"
    BATTERY = "battery"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class Sensors:
    """What was found on a machine."""

    kind: SensorKind
    places: tuple[tuple[str, str], ...] = ()
    """(name, folder) of each zone or battery."""
    obstacle: str = ""
    """Why there is nothing better and what to do."""
    may_come: bool = False
    """Whether a later look may find more: a right that is given, a battery that takes over."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What the sensors say now; empty when they say nothing."""

    counters: tuple[Counter, ...] = ()
    powers: tuple[Power, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.counters or self.powers)


def find_sensors(machine: Machine = HERE) -> Sensors:
    """The best sensor that can be read: RAPL counts the processors alone, a battery the whole machine.

    Reads files only. A battery counts only while it feeds the machine.
    """
    if machine.system != "Linux":
        return Sensors(SensorKind.NONE, obstacle=f"no sensor of energy is read on {machine.system}")
    zones, locked = _rapl_zones(machine)
    if zones:
        return Sensors(SensorKind.RAPL, zones)
    present = _batteries(machine)
    batteries = tuple((name, folder) for name, folder in present if _discharge_microwatts(machine, folder) is not None)
    may_come = bool(locked or present)
    obstacle = ""
    if locked:
        obstacle = (
            f"{locked} is there and only root may read it: `sudo chmod a+r {_POWERCAP}/*/energy_uj`; "
            "programs of the same machine can then see each other's load"
        )
    if batteries:
        return Sensors(SensorKind.BATTERY, batteries, obstacle, may_come)
    nothing = "the kernel shows no powercap zone, as in most virtual machines"
    return Sensors(SensorKind.NONE, (), obstacle or nothing, may_come)


def _rapl_zones(machine: Machine) -> tuple[tuple[tuple[str, str], ...], str]:
    """(name, folder) of every package and its memory, and the first that is there and can't be read.

    `core` and `uncore` are parts of their package; `psys` contains it.
    """
    zones: list[tuple[str, str]] = []
    locked = ""
    for entry in machine.names(_POWERCAP)[:ZONES_MAX]:
        if not _ZONE.fullmatch(entry):
            continue
        folder = f"{_POWERCAP}/{entry}"
        name = machine.read(f"{folder}/name") or ""
        if not (name.startswith("package") or name == "dram"):
            continue
        if _number(machine.read(f"{folder}/energy_uj")) is None:
            locked = locked or f"RAPL ({name})"
        else:
            zones.append((f"{entry} {name}", folder))
    return tuple(zones), locked


def _batteries(machine: Machine) -> tuple[tuple[str, str], ...]:
    """(name, folder) of the batteries that can feed the machine; those of mice and headsets feed nothing else."""
    found: list[tuple[str, str]] = []
    for entry in machine.names(_SUPPLIES):
        folder = f"{_SUPPLIES}/{entry}"
        if machine.read(f"{folder}/type") != "Battery" or machine.read(f"{folder}/scope") == "Device":
            continue
        found.append((entry, folder))
    return tuple(found)


def _discharge_microwatts(machine: Machine, folder: str) -> int | None:
    """What a battery gives, or None when it gives nothing or does not say."""
    if machine.read(f"{folder}/status") != "Discharging":
        return None
    power = _number(machine.read(f"{folder}/power_now"))
    if power is None:
        current = _number(machine.read(f"{folder}/current_now"))
        voltage = _number(machine.read(f"{folder}/voltage_now"))
        if current is None or voltage is None:
            return None
        power = abs(current) * voltage // 1_000_000
    # Some drivers count discharge below zero.
    return abs(power) or None


def read_sensors(machine: Machine, sensors: Sensors) -> Reading:
    """What they say now. Anything that can't be read leaves all of it out: half a machine is no measurement."""
    if sensors.kind is SensorKind.RAPL:
        counters: list[Counter] = []
        for name, folder in sensors.places:
            energy = _number(machine.read(f"{folder}/energy_uj"))
            if energy is None or energy < 0:
                return Reading()
            counters.append(Counter(name, energy, max(0, _number(machine.read(f"{folder}/max_energy_range_uj")) or 0)))
        return Reading(tuple(counters))
    if sensors.kind is SensorKind.BATTERY:
        powers: list[Power] = []
        for name, folder in sensors.places:
            microwatts = _discharge_microwatts(machine, folder)
            if microwatts is None:
                return Reading()
            powers.append(Power(name, microwatts))
        return Reading(powers=tuple(powers))
    return Reading()


def busy_microseconds(machine: Machine) -> int:
    """CPU time of all programs since the machine started, by /proc/stat; waiting and stolen time are not work."""
    fields = (machine.read("/proc/stat") or "").partition("\n")[0].split()
    if len(fields) < 8 or fields[0] != "cpu":
        return 0
    user, nice, system, _idle, _waiting, interrupts, soft = (_number(field) or 0 for field in fields[1:8])
    return (user + nice + system + interrupts + soft) * JIFFY_MICROSECONDS


def nvidia_reading(machine: Machine) -> tuple[Reading, str]:
    """What NVML counts for every GPU, asked in a child, and why it says nothing where it does not.

    A GPU of which energy is not counted (before Volta) tells its power instead.
    """
    answer = machine.ask("nvml", {"energy": True}, deadline_s=NVML_SECONDS_MAX)
    trouble = answer.failure or str(answer.facts.get("error", "") or answer.facts.get("trouble", ""))
    counters: list[Counter] = []
    powers: list[Power] = []
    listed: object = answer.facts.get("energies")
    for told in cast("list[object]", listed) if isinstance(listed, list) else []:
        gpu: Mapping[str, Any] = cast("Mapping[str, Any]", told) if isinstance(told, dict) else {}
        name, energy, power = str(gpu.get("address", "")), gpu.get("millijoules"), gpu.get("milliwatts")
        if isinstance(energy, int) and energy >= 0:
            counters.append(Counter(name, energy * 1_000))
        elif isinstance(power, int) and power >= 0:
            powers.append(Power(name, power * 1_000))
    return Reading(tuple(counters), tuple(powers)), trouble


def _number(text: str | None) -> int | None:
    try:
        return int((text or "").strip())
    except ValueError:
        return None


# ------------------------------------------------------------------------------------------------- the model

MILLIWATTS_PER_GIB: Final = 400
"""Of memory held: 0.3725 W/GB, as a GiB (Karyakin and Salem, DaMoN 2017; so do Green Algorithms)."""
MILLIWATTS_PER_CORE_DEFAULT: Final = 12_000
"""Of a core whose processor is not in the table: Green Algorithms' own default (Lannelongue, Grealey and Inouye,
Advanced Science 8, 2021)."""
_TABLE: Final[tuple[tuple[str, int, int], ...]] = (
    # (pattern of the model's name, thermal design power in watts, hardware threads), from the makers' data sheets.
    (r"EPYC 7763", 280, 128),
    (r"EPYC 7742", 225, 128),
    (r"EPYC 9654", 360, 192),
    (r"Xeon.* Platinum 8259CL", 210, 48),
    (r"Xeon.* Platinum 8375C", 300, 64),
    (r"Xeon.* E5-2680 v4", 120, 28),
    (r"Ryzen 9 5950X", 105, 32),
    (r"Ryzen 7 5800X", 105, 16),
    (r"Ryzen 7 7840U", 28, 16),
    (r"Core.* i7-8550U", 15, 8),
    (r"Core.* i7-1185G7", 28, 8),
    (r"Core.* i9-13900K", 125, 32),
    (r"Core.* Ultra 7 155H", 28, 22),
)


def power_model(machine: Machine = HERE) -> PowerModel:
    """What a hardware thread of this machine is taken to spend at full work: thermal design power over threads.

    A processor outside the table counts as Green Algorithms' 12 W a core; threads that share a core share it.
    """
    facts = cpu_facts(machine)
    model = facts.get("model name", "")
    for pattern, watts, threads in _TABLE:
        if re.search(pattern, model):
            source = f"{model}: {watts} W of thermal design power over {threads} threads"
            return PowerModel(watts * 1_000 // threads, source, MILLIWATTS_PER_GIB)
    cores, siblings = _number(facts.get("cpu cores")) or 0, _number(facts.get("siblings")) or 0
    threads = max(1, siblings // cores) if cores > 0 else 1
    source = f"{model or 'an unknown processor'}: 12 W a core of {threads} threads, as Green Algorithms assumes"
    return PowerModel(MILLIWATTS_PER_CORE_DEFAULT // threads, source, MILLIWATTS_PER_GIB)
