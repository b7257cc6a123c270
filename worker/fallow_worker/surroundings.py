"""What a worker says beyond its executor: accelerators, power, free memory, region; and how that changes.

Looks run in a thread of their own, which a stuck driver may keep for itself: nothing here waits longer than its limit.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from typing import Final, TypeVar

from fallow.session import Capability, Device, DeviceKind
from fallow_worker.executor.capability import as_offered
from fallow_worker.probes.machine import HERE, Machine
from fallow_worker.probes.memory import memory_bytes_free
from fallow_worker.probes.power import on_battery
from fallow_worker.probes.survey import Survey, present_accelerators, survey

_log = logging.getLogger(__name__)
_Found = TypeVar("_Found")

LOOK_EVERY_S: Final = 10.0
LOOK_SECONDS_MAX: Final = 5.0
"""Nobody waits longer for a look or a survey; one that takes longer goes on and is told of later."""


@dataclass(frozen=True, slots=True)
class _Glance:
    """What files tell, cheaply."""

    accelerators: frozenset[str]
    on_battery: bool
    memory_bytes_free: int


class Surroundings:
    """Looks at this machine for a daemon. Its own devices count only when the executor works on this machine."""

    def __init__(
        self,
        machine: Machine = HERE,
        *,
        region: str = "",
        ask: Callable[[], int] = lambda: 0,
        owns_devices: bool = True,
        every_s: float = LOOK_EVERY_S,
    ) -> None:
        """`ask` tells what the owner asks for a unit, now.

        `owns_devices`: false when the executor's nodes are other machines.
        """
        self._machine = machine
        self._region = region
        self._ask = ask
        self._owns_devices = owns_devices
        self._every_s = every_s
        self._seen: frozenset[str] = frozenset()
        """Accelerators that files have ever shown."""
        self._known: frozenset[str] = frozenset()
        """Accelerators at the last survey, without those that are gone."""
        self._accelerators: tuple[Device, ...] = ()
        self._glancing: asyncio.Future[_Glance] | None = None
        self._surveying: asyncio.Future[Survey] | None = None

    async def now(self, capability: Capability) -> Capability:
        """`capability` with what a look shows. Accelerators that are new are surveyed, those that are gone left out.

        Takes at most `LOOK_SECONDS_MAX` for the look and as long for a survey; a survey that goes on is for a later
        call to tell of.
        """
        self._glancing = self._glancing or _in_thread(self._glance)
        if not await _ends(self._glancing):
            _log.warning("probes.stuck after_s=%g", LOOK_SECONDS_MAX)
            return replace(capability, region=self._region)
        glance, self._glancing = self._glancing.result(), None
        self._seen |= glance.accelerators
        if self._surveying is None and glance.accelerators - self._known:
            _log.info("probes.survey accelerators=%s", ",".join(sorted(glance.accelerators)))
            self._surveying = _in_thread(lambda: survey(self._machine))
        if self._surveying is not None and await _ends(self._surveying):
            surveyed, self._surveying = self._surveying.result(), None
            self._accelerators = tuple(
                as_offered(device) for device in surveyed.devices if device.kind is not DeviceKind.CPU
            )
            # What the survey did not list, for whatever reason, is not surveyed again and again.
            self._known = glance.accelerators | {device.device_id for device in self._accelerators}
        self._leave_out(self._known - glance.accelerators)
        processors = tuple(device for device in capability.devices if device.kind is DeviceKind.CPU)
        return replace(
            capability,
            devices=(*processors, *self._accelerators),
            on_battery=glance.on_battery,
            memory_bytes_free=glance.memory_bytes_free if self._owns_devices else capability.memory_bytes_free,
            region=self._region,
            ask_microcredits_per_unit=self._ask(),
        )

    def _leave_out(self, gone: frozenset[str]) -> None:
        """Forgets accelerators that files showed and show no more; those that only a driver lists stay."""
        gone &= self._seen
        if gone:
            _log.warning("probes.vanished devices=%s", ",".join(sorted(gone)))
            self._known -= gone
            self._accelerators = tuple(device for device in self._accelerators if device.device_id not in gone)

    async def watch(self, capability: Capability) -> AsyncIterator[Capability]:
        """What the worker can do, every `every_s`, for ever."""
        while True:
            await asyncio.sleep(self._every_s)
            capability = await self.now(capability)
            yield capability

    def _glance(self) -> _Glance:
        devices = present_accelerators(self._machine) if self._owns_devices else ()
        return _Glance(
            frozenset(device.device_id for device in devices),
            on_battery(self._machine),
            memory_bytes_free(self._machine),
        )


def _in_thread(look: Callable[[], _Found]) -> asyncio.Future[_Found]:
    """What the look finds, from a daemon thread: a driver that holds it for ever does not hold up the process's end."""
    loop = asyncio.get_running_loop()
    found: asyncio.Future[_Found] = loop.create_future()

    def work() -> None:
        try:
            value = look()
        except Exception as mistake:
            _settle(loop, found.set_exception, mistake)
        else:
            _settle(loop, found.set_result, value)

    threading.Thread(target=work, name="look", daemon=True).start()
    return found


def _settle(loop: asyncio.AbstractEventLoop, settle: Callable[[_Found], None], value: _Found) -> None:
    # A loop that has closed meanwhile wants to hear nothing.
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(settle, value)


async def _ends(found: asyncio.Future[_Found]) -> bool:
    """Whether it ends within `LOOK_SECONDS_MAX`; it goes on when it does not."""
    done, _ = await asyncio.wait({found}, timeout=LOOK_SECONDS_MAX)
    return bool(done)
