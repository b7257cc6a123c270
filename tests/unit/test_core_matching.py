"""Which work starts where, and how large tasks are cut."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.job import DatasetBlock, JobState
from fallow.limits import BLOCK_BYTES_MAX, BLOCK_ROWS_MAX, JOB_TASKS_MAX
from fallow.ranges import RangeSet
from fallow.roles import DataClass, Role, Tier
from fallow.session import TaskKind
from fallow_coordinator.core import commands as c
from fallow_coordinator.core import cutting
from fallow_coordinator.core.answers import AccountMade
from fallow_coordinator.core.cutting import Cost, Layout, cut_size, unit_micros
from fallow_coordinator.core.limits import (
    RUNTIME_MS_MIN,
    TASK_BLOCKS_MAX,
    TASK_UNITS_MIN,
    TASK_UNITS_TARGET,
    UNIT_MICROS,
)
from fallow_coordinator.core.state import TaskPhase
from simulation.core_world import World, blob, capability


def test_two_equal_workers_share_a_job_evenly_to_the_end() -> None:
    world = World().start().ready_bundle(per_row=2_000, batch=4)
    world.volunteer("a", window=4)
    world.volunteer("b", window=4)
    job_id = world.submit(7_700)
    world.work_off()
    rows: Counter[str] = Counter()
    for result in world.state.jobs[job_id].results:
        rows[result.worker_id] += sum(span.rows for span in result.spans)
    assert sum(rows.values()) == 7_700
    assert max(rows.values()) - min(rows.values()) <= 7_700 * 0.1
    last = world.state.jobs[job_id].results[-1]
    assert sum(span.rows for span in last.spans) * 2_000 <= UNIT_MICROS, "the tail is short"


def test_work_is_packed_ahead_for_each_slot_and_no_further() -> None:
    world = World().start().ready_bundle()
    world.volunteer("a", window=2, slots=2)
    world.volunteer("b", window=1, slots=2)
    world.submit(10_000)
    world.pack_all()
    phases = Counter(task.phase for task in world.state.tasks.values())
    assert phases == {TaskPhase.LEASED: 3, TaskPhase.READY: 3}


def test_the_least_loaded_worker_gets_the_next_task() -> None:
    world = World().start().ready_bundle()
    small, large = world.volunteer("small", window=4, slots=1), world.volunteer("large", window=4, slots=4)
    world.submit(100_000)
    for _ in range(5):
        packing = [task_id for lane in world.state.lanes.values() for task_id in lane.packing]
        world.pack(packing[0])
    assert (len(world.leases_of(small)), len(world.leases_of(large))) == (1, 4)


def test_accounts_take_turns_and_jobs_of_one_account_stand_in_line() -> None:
    world = World().start().ready_bundle()
    other = world.ask(c.CreateAccount("other"))
    assert isinstance(other, AccountMade)
    world.register(other.account_id)
    first = world.submit(10_000, key="first")
    second = world.submit(10_000, key="second")
    theirs = world.submit(10_000, key="theirs", account_id=other.account_id)
    world.volunteer("v", window=3)
    cut = Counter(task.job_id for task in world.state.tasks.values())
    assert cut == {first: 2, theirs: 2} and second not in cut


def test_a_volunteer_comes_before_an_operators_machine() -> None:
    world = World().start().ready_bundle()
    operator = next(worker_id for worker_id, worker in world.state.workers.items() if worker.tier is Tier.OPERATOR)
    world.connect(operator, able=capability(TaskKind.MAP, TaskKind.INSPECT))
    volunteer = world.volunteer("v")
    world.submit(4)
    world.pack_all()
    assert (len(world.leases_of(volunteer)), len(world.leases_of(operator))) == (1, 0)


def test_internal_rows_go_to_managed_workers() -> None:
    world = World().start().ready_bundle()
    volunteer = world.volunteer("v")
    managed = world.enroll("m", world.token(Role.WORKER, Tier.MANAGED)).party_id
    world.connect(managed)
    job_id = world.submit(100, data_class=DataClass.INTERNAL)
    world.work_off()
    assert {result.worker_id for result in world.state.jobs[job_id].results} == {managed}
    assert world.leases_of(volunteer) == []


def test_a_deadline_allows_for_what_the_worker_holds_already() -> None:
    world = World().start().ready_bundle()
    worker_id = world.volunteer("v", window=4)
    world.submit(10_000)
    world.pack_all()
    deadlines = [lease.deadline_ms - world.now_ms for lease in world.leases_of(worker_id)]
    assert deadlines == sorted(deadlines) and deadlines[0] >= RUNTIME_MS_MIN
    assert deadlines[-1] >= 4 * RUNTIME_MS_MIN


def test_a_job_without_feasible_workers_waits_and_starts_when_one_comes() -> None:
    world = World().start().ready_bundle()
    job_id = world.submit(10)
    assert world.state.tasks == {}
    world.volunteer("v")
    world.work_off()
    assert world.status(job_id).state is JobState.SUCCEEDED


# -------------------------------------------------------------------------------------------------- cutting


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Datasets of up to thirty blocks, some full, some tiny."""
    rows = draw(st.lists(st.integers(1, 2_000), min_size=1, max_size=30))
    sizes = draw(
        st.lists(st.sampled_from([100, 10_000, 1_000_000, BLOCK_BYTES_MAX]), min_size=len(rows), max_size=len(rows))
    )
    return Layout(tuple(accumulate(rows, initial=0)), tuple(accumulate(sizes, initial=0)))


costs = st.builds(Cost, st.sampled_from([0, 1, 500, 100_000, 5_000_000]), st.sampled_from([0, 1, 1_000, 100_000]))


@settings(max_examples=150, deadline=None)
@given(
    layout=layouts(), cost=costs, batch=st.integers(1, 64), leases=st.integers(1, 500), output=st.integers(0, 1 << 24)
)
def test_cuts_partition_the_job_and_fit_their_blocks(
    layout: Layout, cost: Cost, batch: int, leases: int, output: int
) -> None:
    total, start, tasks = layout.row_starts[-1], 0, 0
    cut = RangeSet()
    while start < total:
        rows = cut_size(layout, cost, start=start, batch_rows=batch, leases=leases, output_row_bytes=output)
        assert 1 <= rows <= min(total - start, BLOCK_ROWS_MAX)
        first, last = layout.block_of(start), layout.block_of(start + rows - 1)
        assert last - first < TASK_BLOCKS_MAX
        assert layout.byte_starts[last + 1] - layout.byte_starts[first] <= BLOCK_BYTES_MAX
        assert rows == 1 or rows * output <= BLOCK_BYTES_MAX
        assert not cut.overlaps(start, start + rows)
        cut = cut.add(start, start + rows)
        start += rows
        tasks += 1
    assert cut == RangeSet.of(0, total)
    assert tasks <= JOB_TASKS_MAX


@settings(max_examples=150, deadline=None)
@given(layout=layouts(), cost=costs, start=st.integers(0, 100), leases=st.integers(1, 50))
def test_a_cut_costs_no_more_than_its_share_unless_a_batch_does(
    layout: Layout, cost: Cost, start: int, leases: int
) -> None:
    total = layout.row_starts[-1]
    start = min(start, total - 1)
    rows = cut_size(layout, cost, start=start, batch_rows=1, leases=leases, output_row_bytes=0)
    left = unit_micros(layout, cost, start, total)
    share = min(TASK_UNITS_TARGET * UNIT_MICROS, max(TASK_UNITS_MIN * UNIT_MICROS, left // leases))
    assert rows == 1 or unit_micros(layout, cost, start, start + rows) <= share or start + rows == total


@settings(max_examples=100, deadline=None)
@given(layout=layouts(), cost=costs, target=st.integers(1, 10**9))
def test_the_guess_finds_what_a_plain_search_finds(layout: Layout, cost: Cost, target: int) -> None:
    ceiling = layout.row_starts[-1]
    found = cutting._rows_for(layout, cost, 0, ceiling, target)
    assert found == 0 or unit_micros(layout, cost, 0, found) <= target
    assert found == ceiling or unit_micros(layout, cost, 0, found + 1) > target


def test_a_cut_is_made_of_whole_batches_but_for_the_end() -> None:
    layout, cost = Layout((0, 1_003), (0, 10_000)), Cost(10_000, 0)
    start, sizes = 0, []
    while start < 1_003:
        sizes.append(cut_size(layout, cost, start=start, batch_rows=32, leases=2, output_row_bytes=0))
        start += sizes[-1]
    assert all(rows % 32 == 0 for rows in sizes[:-1]) and sizes[-1] >= 32


def test_a_job_of_many_cheap_rows_never_has_too_many_tasks() -> None:
    rows = 10_000_000
    layout = Layout(tuple(range(0, rows + 1, 500)), tuple(range(0, 20_001)))
    start = tasks = 0
    while start < rows:
        start += cut_size(layout, Cost(10_000_000, 0), start=start, batch_rows=1, leases=1_000, output_row_bytes=0)
        tasks += 1
    assert tasks <= JOB_TASKS_MAX


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_a_tiny_job_is_one_task(rows: int) -> None:
    world = World().start().ready_bundle()
    world.volunteer("v", window=8)
    world.submit(rows)
    assert len(world.state.tasks) == 1


def test_large_blocks_are_never_packed_together() -> None:
    world = World().start().ready_bundle(per_row=1)
    world.volunteer("v", window=8)
    big = [blob(n, length_bytes=BLOCK_BYTES_MAX) for n in range(3)]
    facts = [c.StoredBlob(b, 10, b.digest, world.submission(1).inline_blocks[0].schema_digest) for b in big]
    for fact in facts:
        world.record(fact)
    blocks = tuple(DatasetBlock(b, 10, inline=False) for b in big)
    world.take(replace(world.submission(30), blocks=blocks, inline_blocks=()))
    assert [task.spans for task in world.state.tasks.values()] == [((0, 10),), ((10, 20),), ((20, 30),)]
