"""What this machine has: one module for each kind of device, each a function without heavy imports.

A probe reports what the operating system shows (*present*) and, when something is in the way of using it, the obstacle
in words. Whether a runtime really works on a device (*usable*) is for the executor to find out, in a child; how fast it
is (*measured*) for a challenge.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fallow.session import Device

Probe = Callable[[], Sequence[Device]]
"""Finds devices of one kind. Must not raise, stall or import a runtime: a broken driver is an obstacle, no error."""


def present_devices() -> tuple[Device, ...]:
    """Every device that the operating system shows, CPUs first."""
    from fallow_worker.probes.cpu import cpu_devices

    probes: tuple[Probe, ...] = (cpu_devices,)
    return tuple(device for probe in probes for device in probe())
