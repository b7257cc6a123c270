"""What one account or one report may make the state hold, and that the largest numbers fit the journal."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fallow.errors import FallowError, Reason
from fallow.ids import AccountId, Digest
from fallow.job import DatasetBlock
from fallow.limits import JOB_BLOCKS_MAX, ROW_BYTES_MAX
from fallow.session import Cause, Usage
from fallow_coordinator.core import commands as c
from fallow_coordinator.core import events as e
from fallow_coordinator.core import invariants
from fallow_coordinator.core.answers import AccountMade
from fallow_coordinator.core.limits import (
    BLOCKS_UNFINISHED_PER_ACCOUNT_MAX,
    COST_UNIT_MICROS_MAX,
    INSPECTIONS_WAITING_PER_ACCOUNT_MAX,
    TASK_UNIT_MICROS_MAX,
)
from fallow_coordinator.store.encoding import decode_event, encode_event
from simulation.core_world import INPUT_SCHEMA, World, blob, digest, report


def other_account(world: World, name: str) -> AccountId:
    made = world.ask(c.CreateAccount(name))
    assert isinstance(made, AccountMade)
    return made.account_id


def refusal(world: World, command: c.Command) -> FallowError:
    with pytest.raises(FallowError) as caught:
        world.take(command)
    return caught.value


def test_blocks_of_unfinished_jobs_are_counted_until_the_jobs_end() -> None:
    world = World().start().ready_bundle()
    stored = c.StoredBlob(blob("row"), rows=1, root=digest("root"), schema_digest=INPUT_SCHEMA)
    world.record(stored)
    block = DatasetBlock(stored.blob, 1, inline=False)
    for number in range(BLOCKS_UNFINISHED_PER_ACCOUNT_MAX // JOB_BLOCKS_MAX):
        submission = world.submission(1, key=f"job {number}")
        world.take(replace(submission, blocks=(block,) * JOB_BLOCKS_MAX, inline_blocks=()))
    more = world.submission(1, key="one more")
    error = refusal(world, more)
    assert (error.reason, error.field) == (Reason.OVERLOADED, "blocks")
    invariants.check(world.state)
    world.take(c.CancelJob(world.account_id, next(iter(world.state.jobs))))
    world.take(more)
    invariants.check(world.state)


def test_inspections_that_wait_have_a_limit_and_accounts_take_turns() -> None:
    world = World().start()
    many, few = other_account(world, "many"), other_account(world, "few")
    bundles = [Digest(digest("bundle", number)) for number in range(INSPECTIONS_WAITING_PER_ACCOUNT_MAX)]
    for bundle in bundles:
        world.register(many, bundle_digest=bundle)
    with pytest.raises(FallowError) as caught:
        world.register(many, bundle_digest=Digest(digest("one more")))
    assert caught.value.reason is Reason.OVERLOADED
    world.register(few, bundle_digest=Digest(digest("late")))
    inspector = world.inspector()
    served: list[Digest] = []
    for _ in range(4):
        leases = world.leases_of(inspector)
        for lease in leases:
            served.append(world.state.tasks[lease.task_id].bundle_digest)
            world.take(world.fail_command(lease, Cause.PROGRAM, "killed"))
    assert digest("late") in served[: 2 + 1], "one turn each, however many wait"
    invariants.check(world.state)


def test_a_known_row_block_does_not_become_mere_bytes_again() -> None:
    world = World().start()
    rows = c.StoredBlob(blob("rows"), rows=5, root=digest("root"), schema_digest=INPUT_SCHEMA)
    plain = c.StoredBlob(blob("rows"))
    assert len(world.take(c.RecordBlobs(world.account_id, (plain,))).events) == 1
    assert len(world.take(c.RecordBlobs(world.account_id, (rows,))).events) == 1
    for stored in (plain, rows, plain):
        assert world.take(c.RecordBlobs(world.account_id, (stored,))).events == ()
    assert world.state.accounts[world.account_id].blobs[rows.blob.digest] == rows


@pytest.mark.parametrize("size", [ROW_BYTES_MAX + 1, 2**64, 2**200, -1])
def test_no_row_is_larger_than_a_row_may_be(size: int) -> None:
    world = World().start()
    with pytest.raises(FallowError) as caught:
        world.register(output_row_bytes=size)
    assert caught.value.reason is Reason.BUNDLE_INVALID


@pytest.mark.parametrize("field", ["unit_micros_per_row", "unit_micros_per_kib"])
def test_a_report_of_an_absurd_cost_is_the_inspectors_fault(field: str) -> None:
    world = World().start()
    inspector = world.inspector()
    world.register()
    (lease,) = world.leases_of(inspector)
    absurd = replace(report(world.bundle_digest), **{field: COST_UNIT_MICROS_MAX + 1})  # type: ignore[arg-type]
    world.take(
        c.ReportInspection(
            session_id=lease.session_id,
            worker_id=inspector,
            lease_id=lease.lease_id,
            fence=lease.fence,
            report=absurd,
            usage=Usage(),
            message_digest=digest("message"),
            signature=b"signature",
            sequence=1,
        )
    )
    assert world.state.bundles[world.bundle_digest].report is None


def test_the_dearest_rows_that_lie_about_their_size_still_fit_the_journal() -> None:
    """Each row says that it has 4 GiB, at the highest price that a report may name."""
    world = World().start()
    world.inspector()
    world.register(size_feature_count=1, bytes_feature_index=0)
    world.inspect(per_row=COST_UNIT_MICROS_MAX, batch=1_000_000)
    world.volunteer("v")
    rows = 1_000_000
    stored = c.StoredBlob(
        blob("lies", length_bytes=64 * 2**20),
        rows=rows,
        root=digest("root"),
        schema_digest=INPUT_SCHEMA,
        size_feature_sums=(rows * (2**32 - 1),),
    )
    world.record(stored)
    block = DatasetBlock(stored.blob, rows, inline=False)
    turn = world.take(replace(world.submission(), blocks=(block,), inline_blocks=()))
    created = [event for event in turn.events if isinstance(event, e.TaskCreated)]
    assert created and all(event.unit_micros <= TASK_UNIT_MICROS_MAX for event in created)
    for event in turn.events:
        assert decode_event(encode_event(event)) == event
