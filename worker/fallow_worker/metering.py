"""An executor that knows what each task spent: sensors where the machine has them, a model of its processor elsewhere.

Sensors are read in a thread of their own, which a stuck driver may keep for itself: a task's end waits for a last
sample no longer than `LAST_SAMPLE_SECONDS_MAX`, and is estimated then. What engine children say of energy is never
taken over.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from fallow.session import Capability, EnergySource, Usage
from fallow_worker.core.energy import EnergyBook, Sample
from fallow_worker.ports import Executor, Outcome, Work
from fallow_worker.probes.energy import (
    SensorKind,
    Sensors,
    busy_microseconds,
    find_sensors,
    power_model,
    read_sensors,
)
from fallow_worker.probes.machine import HERE, Machine

_log = logging.getLogger(__name__)

SAMPLE_EVERY_S: Final = 5.0
"""While work runs; each start and end of a task is a sample of its own."""
IDLE_SAMPLE_EVERY_S: Final = 15.0
LOOK_AGAIN_EVERY_S: Final = 60.0
"""How often better sensors are looked for: a laptop is unplugged, a right is given."""
LAST_SAMPLE_SECONDS_MAX: Final = 0.25
FAULTS_MAX: Final = 5
"""Samples in a row that can't be right, after which it is told."""


def _monotonic_us() -> int:
    return time.monotonic_ns() // 1_000


class EnergyMeter:
    """Tells what a task on this machine spent. `stop` ends its thread."""

    def __init__(
        self,
        machine: Machine = HERE,
        *,
        owns_devices: bool = True,
        clock_us: Callable[[], int] = _monotonic_us,
    ) -> None:
        """`owns_devices`: false when the work runs on other machines, of which these sensors know nothing."""
        self._machine = machine
        self._clock_us = clock_us
        self._model = power_model(machine)
        self._sampler: _Sampler | None = None
        if owns_devices:
            sensors = find_sensors(machine)
            _log.info(
                "energy.sensors kind=%s places=%s obstacle=%r model=%r",
                sensors.kind.value, ",".join(name for name, _ in sensors.places), sensors.obstacle, self._model.source,
            )  # fmt: skip
            if sensors.kind is not SensorKind.NONE or sensors.may_come:
                self._sampler = _Sampler(machine, sensors, clock_us)

    @property
    def samples(self) -> bool:
        """Whether anything is measured here; else every task is estimated."""
        return self._sampler is not None

    def began(self) -> int:
        """A task begins; give what this returns to `ended`."""
        if self._sampler is not None:
            self._sampler.task_began()
        return self._clock_us()

    def gave_up(self) -> None:
        """A task that began came to nothing."""
        if self._sampler is not None:
            self._sampler.task_ended()

    async def ended(self, began_us: int, usage: Usage) -> Usage:
        """The usage with energy: measured if the sensors covered the task, else estimated."""
        joules, source = self._estimate(usage), EnergySource.ESTIMATED
        if self._sampler is not None:
            try:
                await self._sampler.sampled(LAST_SAMPLE_SECONDS_MAX)
            finally:
                self._sampler.task_ended()
            microjoules = self._sampler.take(began_us, self._clock_us(), usage.cpu_microseconds)
            if microjoules is not None:
                joules, source = microjoules / 1e6, EnergySource.MEASURED
        return replace(usage, energy_joules=joules, energy_source=source)

    def stop(self) -> None:
        """Ends the thread, at its next look when a driver holds it now."""
        if self._sampler is not None:
            self._sampler.stop()

    def _estimate(self, usage: Usage) -> float:
        return self._model.estimated_joules(
            wall_us=usage.wall_microseconds, cpu_us=usage.cpu_microseconds, memory_bytes=usage.memory_bytes_peak
        )


class _Sampler:
    """A daemon thread that reads sensors into a book, now and then and whenever asked."""

    def __init__(self, machine: Machine, sensors: Sensors, clock_us: Callable[[], int]) -> None:
        self._machine = machine
        self._sensors = sensors
        self._clock_us = clock_us
        self._lock = threading.Lock()
        """Guards everything below."""
        self._book = EnergyBook()
        self._running = 0
        self._worked = False
        self._stopped = False
        self._told_broken = self._told_stuck = False
        self._looked_at_us = clock_us()
        self._waiters: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []
        self._wanted = threading.Event()
        threading.Thread(target=self._run, name="energy", daemon=True).start()

    def task_began(self) -> None:
        """Work runs from now on."""
        with self._lock:
            self._running += 1
        self._wanted.set()

    def task_ended(self) -> None:
        """A task is over."""
        with self._lock:
            self._running -= 1

    async def sampled(self, seconds_max: float) -> bool:
        """Whether a fresh sample came in time."""
        event = asyncio.Event()
        with self._lock:
            self._waiters.append((asyncio.get_running_loop(), event))
        self._wanted.set()
        try:
            async with asyncio.timeout(seconds_max):
                await event.wait()
        except TimeoutError:
            if not self._told_stuck:
                self._told_stuck = True
                _log.warning("energy.sensor_stuck after_s=%g: tasks are estimated until it answers", seconds_max)
            return False
        self._told_stuck = False
        return True

    def take(self, start_us: int, end_us: int, cpu_us: int) -> int | None:
        """Micro-joules of a task, or None when they were not measured."""
        with self._lock:
            return self._book.take(start_us, end_us, cpu_us)

    def stop(self) -> None:
        """The thread ends soon."""
        self._stopped = True
        self._wanted.set()

    def _run(self) -> None:
        while not self._stopped:
            try:
                sample = self._look()
            except Exception:
                # A probe that breaks must not end a worker; its tasks are estimated.
                _log.exception("energy.sensor_mistake")
                sample = None
            self._note(sample)
            self._wanted.wait(SAMPLE_EVERY_S if self._running else IDLE_SAMPLE_EVERY_S)
            self._wanted.clear()

    def _look(self) -> Sample | None:
        at_us = self._clock_us()
        if self._sensors.kind is not SensorKind.RAPL and at_us - self._looked_at_us >= LOOK_AGAIN_EVERY_S * 1e6:
            self._looked_at_us = at_us
            self._sensors = find_sensors(self._machine)
        reading = read_sensors(self._machine, self._sensors)
        if not reading:
            return None
        return Sample(self._clock_us(), busy_microseconds(self._machine), reading.counters, reading.powers)

    def _note(self, sample: Sample | None) -> None:
        with self._lock:
            if sample is None:
                self._book.forget()
            else:
                self._book.observe(sample, working=self._worked or self._running > 0)
            self._worked = self._running > 0
            waiters, self._waiters = self._waiters, []
        if self._book.faults >= FAULTS_MAX and not self._told_broken:
            self._told_broken = True
            _log.warning("energy.sensor_broken samples=%d: tasks are estimated", self._book.faults)
        self._told_broken &= self._book.faults > 0
        for loop, event in waiters:
            if not loop.is_closed():
                loop.call_soon_threadsafe(event.set)


@dataclass(slots=True)
class MeteredExecutor:
    """Any executor, with the energy of each run in its usage."""

    executor: Executor
    meter: EnergyMeter

    async def start(self) -> None:
        """Starts the executor."""
        await self.executor.start()

    async def capability(self) -> Capability:
        """The executor's."""
        return await self.executor.capability()

    async def run(self, work: Work, progress: Callable[[int], None]) -> Outcome:
        """Runs one lease, and tells what it spent."""
        began_us = self.meter.began()
        try:
            outcome = await self.executor.run(work, progress)
        except BaseException:
            self.meter.gave_up()
            raise
        return replace(outcome, usage=await self.meter.ended(began_us, outcome.usage))

    async def release(self) -> None:
        """Stops what the executor keeps warm."""
        await self.executor.release()

    async def stop(self) -> None:
        """Ends everything."""
        self.meter.stop()
        await self.executor.stop()
