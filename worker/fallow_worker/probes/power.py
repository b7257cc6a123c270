"""Whether the machine runs on its battery."""

from __future__ import annotations

from typing import Final

from fallow_worker.probes.machine import Machine

_SUPPLIES: Final = "/sys/class/power_supply"
COMMAND_SECONDS_MAX: Final = 2.0


def on_battery(machine: Machine) -> bool:
    """Whether a battery feeds the machine. Machines without one, and those that do not say, run on mains."""
    match machine.system:
        case "Linux":
            return _linux(machine)
        case "Darwin":
            told = machine.run(("pmset", "-g", "batt"), deadline_s=COMMAND_SECONDS_MAX).output
            return "'Battery Power'" in told.partition("\n")[0]
        case _:
            return False


def _linux(machine: Machine) -> bool:
    """A mains or USB supply that is on outweighs a battery that says it discharges: weak chargers do both."""
    discharging = False
    for name in machine.names(_SUPPLIES):
        folder = f"{_SUPPLIES}/{name}"
        match machine.read(f"{folder}/type"):
            case "Mains" | "USB":
                if machine.read(f"{folder}/online") == "1":
                    return False
            case "Battery":
                # Batteries of mice and headsets have the scope of a device and feed nothing else.
                if machine.read(f"{folder}/scope") != "Device":
                    discharging |= machine.read(f"{folder}/status") == "Discharging"
            case _:
                pass
    return discharging
