"""Energy of tasks: sensors over recordings of machines that are not here, and what of it belongs to whom."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fallow.ids import LeaseId, digest_of
from fallow.session import EnergySource, TaskKind, Usage
from fallow_worker import metering
from fallow_worker.core.energy import (
    INTERVALS_MAX,
    WATTS_MAX,
    Counter,
    EnergyBook,
    Power,
    PowerModel,
    Sample,
    spent_microjoules,
)
from fallow_worker.metering import EnergyMeter, MeteredExecutor
from fallow_worker.ports import LoadedBundle, Outcome, Work
from fallow_worker.probes.energy import (
    Reading,
    SensorKind,
    busy_microseconds,
    find_sensors,
    nvidia_reading,
    power_model,
    read_sensors,
)
from fallow_worker.probes.machine import Answer
from fallow_worker.testing import FakeExecutor
from recorded_machine import FOLDER, RecordedMachine

SECOND = 1_000_000
RANGE = 262_143_328_850


def sample(at_s: float, joules: float, busy_s: float, range_microjoules: int = RANGE) -> Sample:
    return Sample(
        int(at_s * SECOND), int(busy_s * SECOND), (Counter("package-0", int(joules * 1e6), range_microjoules),)
    )


# ------------------------------------------------------------------------------------------------- probes


def test_packages_and_their_memory_are_counted_once() -> None:
    machine = RecordedMachine.named("energy_rapl")
    sensors = find_sensors(machine)
    assert sensors.kind is SensorKind.RAPL
    assert [name for name, _ in sensors.places] == [
        "intel-rapl:0 package-0", "intel-rapl:0:0 dram", "intel-rapl:1 package-1", "intel-rapl:1:0 dram",
    ]  # fmt: skip
    reading = read_sensors(machine, sensors)
    assert [counter.microjoules for counter in reading.counters] == [10**9, 2 * 10**8, 262_143_000_000, 10**8]
    assert reading.counters[0].range_microjoules == RANGE
    assert busy_microseconds(machine) == 1_520 * 10_000


def test_counters_for_root_alone_are_told_and_the_battery_takes_their_place() -> None:
    machine = RecordedMachine.named("energy_battery")
    sensors = find_sensors(machine)
    assert sensors.kind is SensorKind.BATTERY
    assert "sudo chmod a+r /sys/class/powercap/*/energy_uj" in sensors.obstacle
    assert read_sensors(machine, sensors).powers == (Power("BAT0", 18_000_000),)
    machine.files["/sys/class/power_supply/BAT0/power_now"] = "-17500000"
    assert read_sensors(machine, sensors).powers == (Power("BAT0", 17_500_000),), "some drivers count below zero"
    machine.files["/sys/class/power_supply/BAT0/status"] = "Charging"
    assert not read_sensors(machine, sensors)
    plugged = find_sensors(machine)
    assert plugged.kind is SensorKind.NONE and plugged.may_come


def test_a_machine_without_sensors_says_so() -> None:
    sensors = find_sensors(RecordedMachine.named("headless_vm"))
    assert (sensors.kind, sensors.may_come) == (SensorKind.NONE, False)
    assert "virtual" in sensors.obstacle
    assert not read_sensors(RecordedMachine(), sensors)
    assert find_sensors(RecordedMachine.named("apple_m3")).kind is SensorKind.NONE


@pytest.mark.parametrize("text", ["", "-5", "soon", "1e9", None])
def test_a_zone_that_says_nonsense_is_no_measurement(text: str | None) -> None:
    machine = RecordedMachine.named("energy_rapl")
    sensors = find_sensors(machine)
    place = "/sys/class/powercap/intel-rapl:1/energy_uj"
    if text is None:
        del machine.files[place]
    else:
        machine.files[place] = text
    assert not read_sensors(machine, sensors), "half a machine is no measurement"


def test_gpus_tell_their_counter_or_their_power() -> None:
    machine = RecordedMachine(
        answers={
            "nvml": {
                "energies": [
                    {"address": "00000000:01:00.0", "milliwatts": 250_000, "millijoules": 123_456},
                    {"address": "00000000:02:00.0", "milliwatts": 40_000},
                    {},
                    "nonsense",
                ]
            }
        }
    )
    reading, trouble = nvidia_reading(machine)
    assert reading.counters == (Counter("00000000:01:00.0", 123_456_000),)
    assert reading.powers == (Power("00000000:02:00.0", 40_000_000),)
    assert not trouble


@pytest.mark.parametrize(
    "answer",
    [{"failure": "no answer within 5 s"}, {"error": "Driver/library version mismatch"}, {"error": "not-installed"}],
)
def test_a_broken_gpu_driver_is_told_and_counts_for_nothing(answer: dict[str, object]) -> None:
    reading, trouble = nvidia_reading(RecordedMachine(answers={"nvml": answer}))
    assert reading == Reading() and trouble


def test_processors_are_modelled_by_their_data_sheet_or_by_a_core() -> None:
    laptop = power_model(RecordedMachine.named("energy_battery"))
    assert (laptop.milliwatts_per_cpu, "28 W" in laptop.source) == (3_500, True)
    unknown = power_model(RecordedMachine(files={"/proc/cpuinfo": "model name : Z80\nsiblings : 8\ncpu cores : 4"}))
    assert (unknown.milliwatts_per_cpu, "Green Algorithms" in unknown.source) == (6_000, True)
    assert power_model(RecordedMachine()).milliwatts_per_cpu == 12_000
    joules = PowerModel(12_000, "", 400).estimated_joules(wall_us=10 * SECOND, cpu_us=5 * SECOND, memory_bytes=1 << 30)
    assert joules == pytest.approx(5 * 12 + 10 * 0.4)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_every_recorded_machine_has_sensors_or_a_model(path: object) -> None:
    machine = RecordedMachine.named(path.stem)  # type: ignore[attr-defined]
    sensors = find_sensors(machine)
    assert sensors.places or sensors.obstacle
    assert 100 <= power_model(machine).milliwatts_per_cpu <= 12_000


# ------------------------------------------------------------------------------------------------- counting


def test_a_counter_that_begins_anew_is_followed() -> None:
    before, after = sample(0, 262_143, 0), sample(1, 0.5, 0.5)
    assert spent_microjoules(before, after) == RANGE - 262_143_000_000 + 500_000


def test_a_reset_counter_a_new_one_and_absurd_power_count_for_nothing() -> None:
    assert spent_microjoules(sample(0, 9, 0, 0), sample(1, 1, 0.1, 0)) == 0
    fresh = replace(sample(1, 1, 0.1), counters=(Counter("another", 10**12),))
    assert spent_microjoules(sample(0, 9, 0), fresh) == 0
    assert spent_microjoules(sample(0, 0, 0), sample(1, WATTS_MAX + 1, 1)) is None
    assert spent_microjoules(sample(1, 0, 0), sample(1, 5, 1)) is None


def test_a_counter_that_stands_still_under_load_is_broken() -> None:
    assert spent_microjoules(sample(0, 7, 0), sample(1, 7, 1)) is None
    assert spent_microjoules(sample(0, 7, 0), sample(1, 7, 0.1)) == 0, "at rest it may"


def test_the_idle_baseline_is_taken_away_and_the_rest_shared_by_cpu_time() -> None:
    book = EnergyBook()
    book.observe(sample(0, 0, 0), working=False)
    book.observe(sample(10, 50, 0.1), working=False)  # 5 W at rest
    assert book.idle_microwatts == 5_000_000
    book.observe(sample(20, 300, 20.1), working=True)  # 25 W, two cores busy
    assert book.take(10 * SECOND, 20 * SECOND, 10 * SECOND) == 100 * SECOND, "half of 200 J beyond rest"
    assert book.take(10 * SECOND, 20 * SECOND, 10 * SECOND) == 100 * SECOND
    assert book.take(10 * SECOND, 20 * SECOND, 10 * SECOND) == 0, "nothing is given twice"


def test_other_programs_work_is_not_the_tasks() -> None:
    book = EnergyBook()
    book.observe(sample(0, 0, 0), working=True)
    book.observe(sample(10, 400, 40), working=True)
    assert book.take(0, 10 * SECOND, 10 * SECOND) == 100 * SECOND


def test_a_task_that_samples_do_not_cover_is_not_measured() -> None:
    book = EnergyBook()
    assert book.take(0, 10 * SECOND, SECOND) is None
    book.observe(sample(0, 0, 0), working=True)
    book.observe(sample(5, 10, 5), working=True)
    assert book.take(0, 10 * SECOND, SECOND) is None
    book.forget()
    book.observe(sample(10, 20, 10), working=True)
    assert book.take(0, 10 * SECOND, SECOND) is None, "while sensors are away nothing is known"


def test_intervals_are_bounded() -> None:
    book = EnergyBook()
    for second in range(INTERVALS_MAX + 100):
        book.observe(sample(second, second, second), working=True)
    assert book.take(0, 10 * SECOND, SECOND) is None
    assert book.take((INTERVALS_MAX + 90) * SECOND, (INTERVALS_MAX + 99) * SECOND, SECOND) is not None


@dataclass(frozen=True)
class Life:
    """A made-up machine: steps between samples, and tasks over them."""

    steps: tuple[tuple[int, int, int], ...]
    """(micro-seconds, micro-joules, busy micro-seconds) each."""
    tasks: tuple[tuple[int, int, int], ...]
    """(first step, steps, CPU micro-seconds)."""
    range_microjoules: int


lives = st.builds(
    Life,
    steps=st.lists(
        st.tuples(st.integers(1, 5 * SECOND), st.integers(0, 500 * SECOND), st.integers(0, 20 * SECOND)),
        min_size=1, max_size=12,
    ).map(tuple),
    tasks=st.lists(
        st.tuples(st.integers(0, 11), st.integers(1, 12), st.integers(0, 100 * SECOND)), max_size=12
    ).map(tuple),
    range_microjoules=st.sampled_from([0, 600 * SECOND, RANGE]),
)  # fmt: skip


@given(lives)
def test_what_tasks_get_is_never_negative_and_never_more_than_was_measured(life: Life) -> None:
    book = EnergyBook()
    at, joules, busy, measured = 0, 0, 0, 0
    edges = [0]
    last = Sample(0, 0, (Counter("p", 0, life.range_microjoules),))
    book.observe(last, working=True)
    for took, spent, worked in life.steps:
        at, joules, busy = at + took, joules + spent, busy + worked
        shown = joules % life.range_microjoules if life.range_microjoules else joules
        now = Sample(at, busy, (Counter("p", shown, life.range_microjoules),))
        measured += spent_microjoules(last, now) or 0
        book.observe(now, working=True)
        last = now
        edges.append(at)
    given_out = 0
    for first, count, cpu in life.tasks:
        start = edges[min(first, len(edges) - 1)]
        taken = book.take(start, edges[min(first + count, len(edges) - 1)], cpu)
        assert taken is None or taken >= 0
        given_out += taken or 0
    assert given_out <= measured <= joules


# ------------------------------------------------------------------------------------------------- the meter


def some_work() -> Work:
    bundle = LoadedBundle(digest_of(b"bundle"), b"", {}, 1, False, 0)
    return Work(LeaseId("lease-1"), TaskKind.MAP, bundle, b"", 1, bytes(16), 0, 1_000)


@dataclass
class Working:
    """An executor that says what it used, and a machine whose counter it drives."""

    machine: RecordedMachine
    usage: Usage = field(default_factory=lambda: Usage(2 * SECOND, SECOND, energy_joules=1e9))
    joules: int = 30
    busy_s: int = 2
    inner: FakeExecutor = field(default_factory=FakeExecutor)

    async def run(self, work: Work, progress: object) -> Outcome:
        # The first sample is taken in the meter's thread.
        await asyncio.sleep(0.05)
        place = "/sys/class/powercap/intel-rapl:0/energy_uj"
        if place in self.machine.files:
            self.machine.files[place] = str(int(self.machine.files[place]) + self.joules * SECOND)
        self.machine.files["/proc/stat"] = f"cpu  {1_520 + 100 * self.busy_s} 0 0 0 0 0 0 0 0 0"
        return Outcome(b"", (), self.usage, "class")

    async def start(self) -> None: ...

    async def stop(self) -> None: ...


async def metered(machine: RecordedMachine, working: Working | None = None, *, owns_devices: bool = True) -> Usage:
    meter = EnergyMeter(machine, owns_devices=owns_devices)
    executor = MeteredExecutor(working or Working(machine), meter)  # type: ignore[arg-type]
    try:
        outcome = await executor.run(some_work(), lambda rows: None)
    finally:
        await executor.stop()
    return outcome.usage


async def test_a_run_between_samples_is_measured() -> None:
    usage = await metered(RecordedMachine.named("energy_rapl"))
    # Almost nothing of the counters' past is idle: half of the work is the task's.
    assert usage.energy_source is EnergySource.MEASURED
    assert usage.energy_joules <= 15.0


async def test_without_sensors_energy_is_estimated_and_no_thread_runs() -> None:
    assert not EnergyMeter(RecordedMachine.named("headless_vm")).samples
    usage = await metered(RecordedMachine.named("headless_vm"))
    assert usage.energy_source is EnergySource.ESTIMATED
    assert 0 < usage.energy_joules <= 12.0, "what the child says is not taken over"


async def test_work_on_other_machines_is_not_measured_by_this_one() -> None:
    usage = await metered(RecordedMachine.named("energy_rapl"), owns_devices=False)
    assert usage.energy_source is EnergySource.ESTIMATED


class StuckMachine(RecordedMachine):
    """Its kernel never answers about energy."""

    def __init__(self) -> None:
        recorded = RecordedMachine.named("energy_rapl")
        super().__init__(files=recorded.files)
        self.release_it = threading.Event()
        self.stuck = False

    def read(self, path: str) -> str | None:
        if self.stuck and path.endswith("energy_uj"):
            self.release_it.wait(30)
        return super().read(path)

    def ask(self, child: str, question: object, *, deadline_s: float) -> Answer:
        raise AssertionError("no child is asked")


async def test_a_stuck_sensor_stalls_nothing(caplog: pytest.LogCaptureFixture) -> None:
    machine = StuckMachine()
    meter = EnergyMeter(machine)
    machine.stuck = True
    executor = MeteredExecutor(Working(machine), meter)  # type: ignore[arg-type]
    try:
        began = asyncio.get_running_loop().time()
        outcomes = [await executor.run(some_work(), lambda rows: None) for _ in range(2)]
        assert asyncio.get_running_loop().time() - began < 5
    finally:
        machine.release_it.set()
        meter.stop()
    assert {outcome.usage.energy_source for outcome in outcomes} == {EnergySource.ESTIMATED}
    assert caplog.text.count("energy.sensor_stuck") == 1, "told once"


async def test_a_sensor_that_says_nonsense_is_told_once_and_estimated(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metering, "FAULTS_MAX", 2)
    machine = RecordedMachine.named("energy_rapl")
    meter = EnergyMeter(machine)
    executor = MeteredExecutor(Working(machine, joules=10**9), meter)  # type: ignore[arg-type]
    try:
        outcomes = []
        for _ in range(4):
            machine.files["/sys/class/powercap/intel-rapl:0/energy_uj"] = "0"
            outcomes.append(await executor.run(some_work(), lambda rows: None))
    finally:
        meter.stop()
    assert all(outcome.usage.energy_joules < 1_000 for outcome in outcomes)
    assert all(outcome.usage.energy_source is EnergySource.ESTIMATED for outcome in outcomes)


async def test_a_run_that_fails_leaves_nothing_behind() -> None:
    class Failing(Working):
        async def run(self, work: Work, progress: object) -> Outcome:
            raise RuntimeError("no")

    machine = RecordedMachine.named("energy_rapl")
    meter = EnergyMeter(machine)
    executor = MeteredExecutor(Failing(machine), meter)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError):
        await executor.run(some_work(), lambda rows: None)
    assert meter._sampler is not None and meter._sampler._running == 0
    meter.stop()
