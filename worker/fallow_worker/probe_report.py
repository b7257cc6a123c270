"""What `fallow-worker probe` says: a table for people, the same facts for programs."""

from __future__ import annotations

import textwrap
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final

from fallow.errors import FallowError, Reason
from fallow.limits import GIB, MIB
from fallow.session import Device, DeviceKind, DeviceLevel, SandboxLevel
from fallow_worker.executor.capability import as_offered
from fallow_worker.probes.energy import SensorKind, find_sensors, power_model
from fallow_worker.probes.machine import HERE, Machine
from fallow_worker.probes.survey import Survey, survey
from fallow_worker.status import device_facts

_COLUMNS: Final = ("device", "what", "present", "usable", "measured")
_WIDTH: Final = 100
REPORT_SECONDS_MAX: Final = 180.0
"""Beyond the deadlines of all probes together."""


def report_of(machine: Machine = HERE, *, lock_down: bool = True) -> dict[str, Any]:
    """Every device with its level, the runtime, and how far strangers' programs are locked in here.

    `lock_down`: whether to start an engine child to find that out.
    """
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(_sandbox) if lock_down else None
        found = survey(machine)
        sandbox, trouble = asked.result() if asked else (SandboxLevel.NONE, "")
    return {
        "devices": [_told(device, trouble) for device in found.devices],
        "runtime": _runtime_facts(found),
        "sandbox_level": sandbox.value,
        "sandbox_obstacle": trouble,
        "memory_bytes_free": found.memory_bytes_free,
        "on_battery": found.on_battery,
        "energy": _energy_facts(machine),
        "took_ms": found.took_ms,
    }


def with_standings(report: dict[str, Any], standings: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The report with what a coordinator said of the devices to the worker on the same folder."""
    devices: list[dict[str, Any]] = []
    for device in report["devices"]:
        standing = standings.get(device["device_id"], {})
        measured = bool(standing.get("units_milli_per_s"))
        level = (
            DeviceLevel.MEASURED.value if measured and device["level"] == DeviceLevel.USABLE.value else device["level"]
        )
        devices.append({**device, "level": level, "standing": dict(standing)})
    return {**report, "devices": devices}


def standing_words(standing: Mapping[str, Any]) -> str:
    """What is known of a device, for people."""
    if not standing["units_milli_per_s"]:
        return f"no: {standing['reason']}" if standing["reason"] else "no"
    return f"{standing['units_milli_per_s'] / 1_000:.2f} units/s, {_size(standing['memory_bytes'])}"


def report_in_time() -> dict[str, Any]:
    """`report_of` this machine. Raises EXECUTOR_UNAVAILABLE when a driver holds even the reading of files."""
    found: Future[dict[str, Any]] = Future()

    def look() -> None:
        try:
            found.set_result(report_of())
        except BaseException as mistake:  # whoever waits hears of it
            found.set_exception(mistake)

    # A daemon thread: what a driver holds for ever does not hold up the end of the command.
    threading.Thread(target=look, name="probe", daemon=True).start()
    try:
        return found.result(REPORT_SECONDS_MAX)
    except TimeoutError:
        raise FallowError(
            Reason.EXECUTOR_UNAVAILABLE,
            f"the probes did not end within {REPORT_SECONDS_MAX:g} s: a driver holds them",
            hint="look for errors of drivers in the kernel's log (dmesg)",
        ) from None


def _sandbox() -> tuple[SandboxLevel, str]:
    """The level that a locked-down child really reached after a program ran in it, or why none came up."""
    from fallow_worker.engine.spawn import probe_level

    try:
        return probe_level().level, ""
    except (FallowError, OSError) as error:
        return SandboxLevel.NONE, str(error)


def _told(device: Device, engine_trouble: str) -> dict[str, Any]:
    """A device's facts and `offered`: whether a worker would take work for it now."""
    offered = as_offered(device)
    gets_work = offered.level is not DeviceLevel.PRESENT and not engine_trouble
    note = device.obstacle or offered.obstacle or engine_trouble
    return {**device_facts(device), "offered": gets_work, "note": note}


def _runtime_facts(found: Survey) -> dict[str, Any]:
    runtime = found.runtime
    return {
        "name": runtime.name,
        "version": runtime.version,
        "providers": sorted(runtime.providers),
        "packages": dict(runtime.packages),
        "error": runtime.error,
    }


def _energy_facts(machine: Machine) -> dict[str, Any]:
    """How a task's energy is known here: by which sensors, or by which model, and what stands in the way of better."""
    sensors, model = find_sensors(machine), power_model(machine)
    return {
        "source": "estimated" if sensors.kind is SensorKind.NONE else "measured",
        "sensor": sensors.kind.value,
        "places": [name for name, _ in sensors.places],
        "obstacle": sensors.obstacle,
        "model": model.source,
        "milliwatts_per_cpu": model.milliwatts_per_cpu,
    }


def report_text(report: dict[str, Any]) -> str:
    """The table: present, usable, measured, and below each device what stands in the way and what to install."""
    rows = [(_row(device), str(device["note"])) for device in report["devices"]]
    widths = [max(len(row[column]) for row in (_COLUMNS, *(row for row, _ in rows))) for column in range(len(_COLUMNS))]

    def line(row: tuple[str, ...]) -> str:
        return "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()

    lines = [line(_COLUMNS)]
    for row, note in rows:
        lines.append(line(row))
        lines += textwrap.wrap(
            note, _WIDTH, initial_indent="    ! ", subsequent_indent="      ", break_on_hyphens=False
        )
    runtime = report["runtime"]
    providers = ", ".join(name.removesuffix("ExecutionProvider") for name in runtime["providers"])
    power = "battery" if report["on_battery"] else "mains"
    lines += [
        "",
        f"runtime      {runtime['name'] or 'none'}" + (f" with {providers}" if providers else ""),
        f"sandbox      {report['sandbox_level']}",
        f"memory free  {_size(report['memory_bytes_free'])}",
        f"power        {power}",
        f"energy       {_energy_text(report['energy'])}",
    ]
    if any(device["kind"] != DeviceKind.CPU.value and not device["offered"] for device in report["devices"]):
        lines += ["", "This version gives work to the CPU alone: accelerators are found and tried, not used yet."]
    return "\n".join(lines) + "\n"


def _energy_text(energy: dict[str, Any]) -> str:
    if energy["source"] == "measured":
        return f"measured: {energy['sensor']} ({', '.join(energy['places'])})"
    watts = energy["milliwatts_per_cpu"] / 1_000
    return f"estimated at {watts:g} W a hardware thread ({energy['model']}); {energy['obstacle']}"


def _row(device: dict[str, Any]) -> tuple[str, ...]:
    what = [str(device["model"])]
    if device["kind"] == DeviceKind.CPU.value:
        what += [f"{device['cores']} cores", str(device["architecture"])]
    elif device["architecture"]:
        what.append(str(device["architecture"]))
    if device["memory_bytes"]:
        what.append(_size(device["memory_bytes"]))
    levels = [level.value for level in DeviceLevel]
    reached = levels.index(device["level"])
    marks = ["yes" if reached >= rank else "no" for rank in range(len(levels))]
    if device["providers"]:
        marks[1] = ", ".join(str(name).removesuffix("ExecutionProvider") for name in device["providers"])
    standing = device.get("standing", {})
    if reached == 1:
        marks[2] = "not yet" if device["offered"] else "no"
        if device["offered"] and standing.get("reason"):
            marks[2] = f"no: {standing['reason']}"
    elif reached == len(levels) - 1 and standing:
        marks[2] = standing_words(standing)
    return (str(device["device_id"]), ", ".join(filter(None, what)), *marks)


def _size(count: int) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{max(1, count // MIB)} MiB"
