"""When a worker tells that what it can do has changed, and how often at most."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from fallow.ids import SessionId
from fallow.limits import GIB
from fallow.session import Capability, CapabilityChanged, Device, DeviceKind, DeviceLevel, TaskKind
from fallow_worker.core.actions import Action, Say
from fallow_worker.core.advertising import advertised, change_due_ms
from fallow_worker.core.happenings import CapabilitySeen, DrainAsked, Happening, SessionEnded, SessionOpened, TimePassed
from fallow_worker.core.limits import CAPABILITY_SAID_EVERY_MS, MEMORY_SAID_EVERY_MS, MEMORY_STEP_BYTES
from fallow_worker.core.observe import observe
from fallow_worker.core.plan import begun, next_wake_ms, plan
from fallow_worker.core.world import Offline, Terms, World
from fallow_worker.network import NetworkMeter
from fallow_worker.surroundings import Surroundings
from recorded_machine import RecordedMachine

CPU = Device("cpu-0", DeviceKind.CPU, DeviceLevel.USABLE, cores=4)
GPU = Device("gpu-0", DeviceKind.GPU, DeviceLevel.PRESENT, vendor="NVIDIA")
BASE = Capability(devices=(CPU, GPU), memory_bytes_free=16 * GIB)


class Telling:
    """A worker in an open session whose clock a test turns; it notes when which capability was told."""

    def __init__(self) -> None:
        self.now_ms = 1_000
        self.world = World(Terms(1, frozenset({TaskKind.MAP})), Offline(0, 0), BASE, busy_at_ms=0)
        self.told: list[tuple[int, Capability]] = []
        self.act()
        self.hears(SessionOpened(SessionId("session-1"), 5_000, frozenset()))
        self.opened_ms = self.now_ms

    def hears(self, happening: Happening) -> None:
        self.world = observe(self.world, happening, self.now_ms)
        self.act()

    def act(self) -> None:
        for _ in range(3):
            for action in plan(self.world, self.now_ms):
                self.world = begun(self.world, action, self.now_ms)
                self._note(action)

    def until(self, now_ms: int) -> None:
        """Wakes whenever the plan says so, until then."""
        while (wake_ms := next_wake_ms(self.world, self.now_ms)) is not None and wake_ms <= now_ms:
            self.now_ms = wake_ms
            self.hears(TimePassed())
        self.now_ms = now_ms

    def _note(self, action: Action) -> None:
        match action:
            case Say(message=CapabilityChanged(capability=capability)) if capability is not None:
                self.told.append((self.now_ms, capability))
            case _:
                pass


def test_a_vanished_device_is_told_after_the_least_interval() -> None:
    worker = Telling()
    without = replace(BASE, devices=(CPU,))
    worker.until(worker.opened_ms + 2_000)
    worker.hears(CapabilitySeen(without))
    worker.until(worker.opened_ms + 60_000)
    assert worker.told == [(worker.opened_ms + CAPABILITY_SAID_EVERY_MS, without)]


def test_a_change_long_after_the_last_word_is_told_at_once() -> None:
    worker = Telling()
    worker.until(worker.opened_ms + 3 * CAPABILITY_SAID_EVERY_MS)
    on_battery = replace(BASE, on_battery=True)
    worker.hears(CapabilitySeen(on_battery))
    assert worker.told == [(worker.now_ms, on_battery)]


def test_what_flips_every_second_is_told_at_most_every_interval() -> None:
    worker = Telling()
    for second in range(120):
        worker.until(worker.opened_ms + 1_000 * second)
        worker.hears(CapabilitySeen(replace(BASE, on_battery=second % 2 == 0)))
    moments = [at for at, _ in worker.told]
    assert len(moments) >= 2
    assert all(later - earlier >= CAPABILITY_SAID_EVERY_MS for earlier, later in itertools.pairwise(moments))


def test_what_flips_back_in_time_is_not_told() -> None:
    worker = Telling()
    worker.hears(CapabilitySeen(replace(BASE, on_battery=True)))
    worker.hears(CapabilitySeen(BASE))
    worker.until(worker.opened_ms + 60_000)
    assert worker.told == []


def test_memory_alone_is_told_rarely_and_in_steps() -> None:
    worker = Telling()
    worker.hears(CapabilitySeen(replace(BASE, memory_bytes_free=BASE.memory_bytes_free - MEMORY_STEP_BYTES // 2)))
    worker.until(worker.opened_ms + 10 * MEMORY_SAID_EVERY_MS)
    assert worker.told == []
    less = replace(BASE, memory_bytes_free=4 * GIB)
    worker.hears(CapabilitySeen(less))
    assert worker.told == [(worker.now_ms, less)]
    worker.hears(CapabilitySeen(BASE))
    worker.until(worker.now_ms + 2 * MEMORY_SAID_EVERY_MS)
    assert [at - worker.told[0][0] for at, _ in worker.told] == [0, MEMORY_SAID_EVERY_MS]


def test_the_network_is_told_rarely_and_in_steps() -> None:
    meter = NetworkMeter()
    meter.received(1_000, 1.0)
    assert meter.into(BASE) == BASE, "a short transfer says nothing of the width"
    meter.received(10_000_000, 1.0)
    meter.sent(1_000_000, 1.0)
    meter.answered(0.030)
    meter.answered(0.050)
    measured = meter.into(BASE)
    assert (measured.network_down_bytes_per_s, measured.network_up_bytes_per_s) == (10_000_000, 1_000_000)
    assert measured.network_round_trip_microseconds == 30_000
    worker = Telling()
    worker.hears(CapabilitySeen(measured))
    worker.until(worker.opened_ms + 2 * MEMORY_SAID_EVERY_MS)
    assert worker.told == [(worker.opened_ms + MEMORY_SAID_EVERY_MS, measured)]
    worker.hears(CapabilitySeen(replace(measured, network_up_bytes_per_s=1_400_000)))
    worker.until(worker.now_ms + 2 * MEMORY_SAID_EVERY_MS)
    assert len(worker.told) == 1, "a rate that wavers is no news"


def test_a_new_session_says_the_latest_and_nothing_is_told_twice() -> None:
    worker = Telling()
    worker.hears(SessionEnded(0.0))
    latest = replace(BASE, devices=(CPU,))
    worker.hears(CapabilitySeen(latest))
    worker.until(worker.now_ms + 5_000)
    worker.hears(SessionOpened(SessionId("session-2"), 5_000, frozenset()))
    worker.until(worker.now_ms + 60_000)
    assert worker.world.capability == latest
    assert worker.told == []


def test_a_worker_that_leaves_tells_no_more_changes() -> None:
    worker = Telling()
    worker.hears(DrainAsked("enough", 30_000))
    worker.hears(CapabilitySeen(replace(BASE, on_battery=True)))
    worker.until(worker.now_ms + 120_000)
    assert worker.told == []


@given(st.lists(st.integers(0, 64 * GIB), min_size=1, max_size=30), st.integers(0, 64 * GIB))
def test_advertised_memory_is_never_a_step_away_from_what_was_seen(seen: list[int], first: int) -> None:
    capability = Capability(memory_bytes_free=first)
    for free in seen:
        capability = advertised(capability, Capability(memory_bytes_free=free))
        off = abs(capability.memory_bytes_free - free)
        assert off < max(MEMORY_STEP_BYTES, capability.memory_bytes_free // 8 + 1)


@given(st.integers(0, 1 << 50))
def test_equal_capabilities_are_never_due(at_ms: int) -> None:
    assert change_due_ms(BASE, replace(BASE), at_ms) is None


# ------------------------------------------------------------------------------------------------- looking


async def test_a_look_adds_accelerators_power_and_region() -> None:
    machine = RecordedMachine.named("intel_arc_npu")
    looked = await Surroundings(machine, region="de").now(Capability(devices=(CPU,)))
    assert [device.device_id for device in looked.devices] == ["cpu-0", "gpu-0000:00:02.0", "npu-0000:00:0b.0"]
    assert {device.level for device in looked.devices[1:]} == {DeviceLevel.PRESENT}, "engines drive the CPU alone"
    assert looked.on_battery
    assert looked.region == "de"
    assert looked.memory_bytes_free == 16 * GIB


async def test_a_device_that_vanishes_is_left_out_and_surveyed_when_it_comes_back() -> None:
    machine = RecordedMachine.named("amd_rocm")
    surroundings = Surroundings(machine)
    looked = await surroundings.now(Capability(devices=(CPU,)))
    assert len(looked.devices) == 2
    links = machine.links
    machine.links, machine.asked = {}, []
    assert (await surroundings.now(looked)).devices == (CPU,)
    assert machine.asked == []
    machine.links = links
    assert len((await surroundings.now(looked)).devices) == 2
    assert "MIGraphXExecutionProvider 0" in machine.asked


async def test_drivers_are_asked_once_for_devices_that_stay() -> None:
    machine = RecordedMachine.named("nvidia_broken_driver")
    surroundings = Surroundings(machine)
    looked = await surroundings.now(Capability(devices=(CPU,)))
    machine.asked = []
    assert await surroundings.now(looked) == looked
    assert machine.asked == []


async def test_a_cluster_of_other_machines_does_not_count_this_ones_devices() -> None:
    machine = RecordedMachine.named("amd_rocm")
    asked = Capability(devices=(CPU,), memory_bytes_free=5)
    looked = await Surroundings(machine, owns_devices=False).now(asked)
    assert looked == asked


async def test_the_watch_looks_again_and_again() -> None:
    machine = RecordedMachine.named("intel_arc_npu")
    seen: list[bool] = []
    async with asyncio.timeout(10):
        async for capability in Surroundings(machine, every_s=0.001).watch(Capability(devices=(CPU,))):
            seen.append(capability.on_battery)
            if len(seen) == 2:
                break
            machine.files["/sys/class/power_supply/AC/online"] = "1"
    assert seen == [True, False]
