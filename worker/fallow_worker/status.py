"""How a worker fares, for `fallow-worker status`: written when something has changed, and at most once a second."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from dataclasses import asdict
from typing import Final

from fallow.session import Capability, Device
from fallow_worker.core.world import Connecting, Offline, Online, World
from fallow_worker.daemon import Daemon
from fallow_worker.pool_cache import PoolCacheCounts
from fallow_worker.state_folder import StateFolder

WRITE_EVERY_S: Final = 1.0


class StatusReport:
    """Keeps the status file of one daemon."""

    def __init__(self, folder: StateFolder, facts: dict[str, object], served: PoolCacheCounts | None = None) -> None:
        """`facts` do not change while the daemon runs; `served`: what others got from its cache."""
        self._served = served
        self._folder = folder
        self._facts = facts
        self._written: dict[str, object] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._daemon: Daemon | None = None

    def attach(self, daemon: Daemon) -> None:
        """From now on reports this one."""
        self._daemon = daemon
        self.write()

    def changed(self) -> None:
        """Something may have changed: it is written soon, once for everything that changes until then."""
        if self._timer is None and self._daemon is not None:
            self._timer = asyncio.get_running_loop().call_later(WRITE_EVERY_S, self.write)

    def write(self) -> None:
        """Writes what has changed."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._daemon is None:
            return
        served = {"served": asdict(self._served)} if self._served is not None else {}
        now = {**self._facts, **_told(self._daemon), **served}
        if now != self._written:
            self._written = now
            with contextlib.suppress(OSError):
                # A full disk must not end a worker; whoever asks sees how old the word is.
                self._folder.write_status({**now, "written_at_ms": int(time.time() * 1000)})


def capability_facts(capability: Capability) -> dict[str, object]:
    """A capability for JSON."""
    return {
        "executor": capability.executor,
        "nodes": capability.nodes,
        "sandbox_level": capability.sandbox_level.value,
        "memory_bytes_free": capability.memory_bytes_free,
        "operating_system": capability.operating_system,
        "region": capability.region,
        "on_battery": capability.on_battery,
        "network_down_bytes_per_s": capability.network_down_bytes_per_s,
        "network_up_bytes_per_s": capability.network_up_bytes_per_s,
        "network_round_trip_microseconds": capability.network_round_trip_microseconds,
        "ask_microcredits_per_unit": capability.ask_microcredits_per_unit,
        "task_kinds": sorted(kind.value for kind in capability.task_kinds),
        "devices": [device_facts(device) for device in capability.devices],
    }


def device_facts(device: Device) -> dict[str, object]:
    """A device for JSON."""
    return {
        "device_id": device.device_id,
        "kind": device.kind.value,
        "level": device.level.value,
        "vendor": device.vendor,
        "model": device.model,
        "cores": device.cores,
        "memory_bytes": device.memory_bytes,
        "architecture": device.architecture,
        "providers": list(device.providers),
        "driver_version": device.driver_version,
        "obstacle": device.obstacle,
        "execution_class": device.execution_class,
        "slots": device.slots,
    }


def _told(daemon: Daemon) -> dict[str, object]:
    world = daemon.world
    error = daemon.last_error
    return {
        "session": _session_word(world),
        "capability": capability_facts(world.capability),
        "standings": {name: asdict(standing) for name, standing in sorted(daemon.standings.items())},
        "draining": world.drain.reason if world.drain else "",
        "trouble": world.trouble.failures if world.trouble else 0,
        "leases": dict(Counter(type(held.phase).__name__.lower() for held in world.leases.values())),
        "executor_warm": world.executor_warm,
        "counts": {**asdict(daemon.counts), **daemon.transfers.told()},
        "last_error": {"reason": error.reason.value, "message": str(error)} if error else None,
    }


def _session_word(world: World) -> str:
    match world.session:
        case Offline():
            return "offline"
        case Connecting():
            return "connecting"
        case Online():
            return "online"
