"""Workers that lie about their devices over a real stream: none is certified, and the honest one beside them is."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fallow.blob_client import BlobClient
from fallow.challenge import MANIFEST, OUTPUT_SCHEMA_DIGEST, ChallengeKind, ChallengePlan
from fallow.channel import blob_channel
from fallow.errors import Reason
from fallow.ids import digest_of
from fallow.limits import GIB, INLINE_PAYLOAD_BYTES_MAX
from fallow.merkle import leaf_digest
from fallow.row_block import RowBlock
from fallow.rows import RowCodec
from fallow.session import (
    BlobReference,
    Capability,
    Cause,
    Commitment,
    Delivery,
    Device,
    DeviceKind,
    DeviceLevel,
    DeviceStanding,
    HeldLease,
    Lease,
    LeaseReturned,
    LeaseRevoked,
    LeaseSeen,
    Refused,
    SandboxLevel,
    Settled,
    TaskKind,
    UploadOffer,
)
from fallow_worker.engine import challenge as engine
from integration.harness import CoordinatorService, coordinator, wait_for, worker
from integration.raw_session import RawSession, hello, joined, raw_session

pytestmark = pytest.mark.processes

PATIENCE_S = 60.0
CPU = Device("cpu-0", DeviceKind.CPU, DeviceLevel.USABLE, model="Liar 1", cores=2, memory_bytes=GIB)
Answer = Callable[[ChallengePlan], bytes]


@pytest.fixture(scope="module")
def measuring(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CoordinatorService]:
    """A coordinator that challenges at once, little, with an operator's worker that checks."""
    arguments = ("--measure-after", "0s", "--measure-for", "150", "--measure-memory", "8")
    with coordinator(tmp_path_factory.mktemp("measuring"), *arguments, operator_worker=True) as service:
        yield service
        assert "Traceback" not in service.log.read_text(errors="replace")


def honest(plan: ChallengePlan) -> bytes:
    return engine.answer(plan, threads=2, allow_spinning=False, nonce=bytes(16), progress=lambda _: None)


def block_of(answer: bytes) -> bytes:
    return RowCodec(MANIFEST.output_schema, OUTPUT_SCHEMA_DIGEST).encode({"answer": [answer]}, nonce=bytes(16))


class Liar:
    """A worker whose stream is the test's own, and how it answers challenges."""

    def __init__(self, session: RawSession, blobs: BlobClient) -> None:
        self.session = session
        self.blobs = blobs
        self.plans: list[ChallengePlan] = []

    async def open(self, device: Device) -> None:
        capability = Capability(
            devices=(device,),
            sandbox_level=SandboxLevel.FULL,
            memory_bytes_free=GIB,
            task_kinds=frozenset({TaskKind.MAP, TaskKind.CHALLENGE}),
        )
        await self.session.open(replace(hello(), capability=capability))

    async def lease(self) -> Lease:
        """The next challenge's lease, seen."""
        while True:
            message = await self.heard()
            if isinstance(message, Lease):
                assert message.kind is TaskKind.CHALLENGE and message.challenge is not None
                self.plans.append(message.challenge)
                await self.session.send(LeaseSeen(message.lease_id, message.fence), sign=False)
                return message

    async def heard(self) -> object:
        async with asyncio.timeout(PATIENCE_S):
            return await self.session.receive()

    async def answer(self, answer: Answer) -> None:
        """Answers the next challenge by `answer`, delivers it, and waits until it is settled, if it ever is."""
        lease = await self.lease()
        assert lease.challenge is not None
        block = await asyncio.to_thread(answer, lease.challenge)
        await self.commit(lease, block)
        while True:
            message = await self.heard()
            if isinstance(message, UploadOffer):
                receipt = await self.blobs.put(message.grant, block)
                await self.session.send(Delivery(lease.lease_id, lease.fence, receipt), sign=False)
            elif isinstance(message, Settled):
                return

    async def commit(self, lease: Lease, block: bytes) -> None:
        """Binds itself to an answer."""
        inline = len(block) <= INLINE_PAYLOAD_BYTES_MAX
        await self.session.send(
            Commitment(
                lease_id=lease.lease_id,
                fence=lease.fence,
                output_root=RowBlock.parse(block).root(),
                rows=1,
                output=BlobReference(digest_of(block), len(block)),
                inline_output=block if inline else b"",
            )
        )

    async def standing(self) -> DeviceStanding:
        """The next word about the device."""
        while True:
            message = await self.heard()
            if isinstance(message, DeviceStanding):
                return message


async def as_liar(
    service: CoordinatorService, folder: Path, story: Callable[[Liar], Awaitable[Any]], device: Device = CPU
) -> Any:
    """Plays a story as a worker of its own."""
    credentials = await joined(service.worker_join_line, folder / secrets.token_hex(4))
    async with raw_session(credentials) as session, blob_channel(credentials) as channel:
        liar = Liar(session, BlobClient(channel))
        await liar.open(device)
        return await story(liar)


def told(service: CoordinatorService) -> dict[str, str]:
    """The measured speed of each worker by name of its device's model."""
    return {
        one["worker_id"]: standing.get("units_milli_per_s", "0")
        for one in service.cli("worker", "list")["workers"]
        for standing in one.get("device_standings", [])
    }


# ------------------------------------------------------------------------------------------------- lies


def in_half_precision(plan: ChallengePlan) -> bytes:
    """Products of factors that were rounded to 16 bits: several times as fast on a GPU."""
    base, right = engine.matrices(plan)
    short = right.astype(np.float16).astype(np.float32)
    products = []
    for step in range(plan.steps):
        left = engine.left_rows(base, np.full((plan.rows, 1), engine.factor(plan, step), np.float32))
        products.append((left.astype(np.float16).astype(np.float32) @ short).astype("<f4"))
    leaves = [leaf_digest(index, row.tobytes()) for index, row in enumerate(np.concatenate(products))]
    tree = engine.Tree(leaves)
    pieces = [tree.root]
    for index in engine.drawn_rows(plan, tree.root):
        step, row = divmod(index, plan.rows)
        pieces += [products[step][row].tobytes(), tree.proof(index)]
    return block_of(b"".join(pieces))


def with_half_of_the_work(plan: ChallengePlan) -> bytes:
    """Every second product is the one before it again."""
    base, right = engine.matrices(plan)
    products: list[Any] = []
    for step in range(plan.steps):
        if step % 2:
            products.append(products[-1])
            continue
        left = engine.left_rows(base, np.full((plan.rows, 1), engine.factor(plan, step), np.float32))
        products.append((left @ right).astype("<f4"))
    tree = engine.Tree([leaf_digest(index, row.tobytes()) for index, row in enumerate(np.concatenate(products))])
    pieces = [tree.root]
    for index in engine.drawn_rows(plan, tree.root):
        step, row = divmod(index, plan.rows)
        pieces += [products[step][row].tobytes(), tree.proof(index)]
    return block_of(b"".join(pieces))


def with_half_of_the_memory(plan: ChallengePlan) -> bytes:
    """The upper half of the blocks is made anew whenever it is wanted, from its number alone: no memory is needed."""
    if plan.kind is ChallengeKind.SPEED:
        return honest(plan)
    half = plan.blocks // 2
    filled = np.empty((plan.blocks, engine.WORDS_PER_BLOCK), np.uint64)
    filled[:2] = engine.first_blocks(plan.seed)
    spare = np.empty(engine.WORDS_PER_BLOCK, np.uint64)
    for index in range(2, half):
        engine.mix(filled[index - 1], filled[engine.partner(index, filled[index - 1])], filled[index], spare)
    for index in range(half, plan.blocks):
        filled[index] = index
    tree = engine.Tree([leaf_digest(index, row.tobytes()) for index, row in enumerate(filled)])
    pieces, hashed = [tree.root], engine.walk_start(plan, tree.root)
    for _ in range(plan.samples):
        index = engine.walk_index(plan, hashed)
        hashed = engine.walk_on(hashed, filled[index].tobytes())
        for shown in (index, index - 1, engine.partner(index, filled[index - 1])):
            pieces += [filled[shown].tobytes(), tree.proof(shown)]
    return block_of(b"".join(pieces))


# ------------------------------------------------------------------------------------------------- tests


async def test_an_honest_worker_is_measured_within_seconds(measuring: CoordinatorService, tmp_path: Path) -> None:
    with worker(measuring, tmp_path / "honest", "--executor", "process") as service:
        speeds = await asyncio.to_thread(
            wait_for, lambda: [int(s) for s in told(measuring).values() if int(s)], PATIENCE_S, "a certificate"
        )
        assert 10 < speeds[0] < 1_000_000
        status = tmp_path / "honest" / "status.json"
        await asyncio.to_thread(
            wait_for, lambda: '"units_milli_per_s": 0' not in status.read_text(), PATIENCE_S, "word"
        )
        assert service.running()


async def test_a_ten_times_faster_claim_is_not_kept(measuring: CoordinatorService, tmp_path: Path) -> None:
    async def story(liar: Liar) -> DeviceStanding:
        lease = await liar.lease()
        assert lease.challenge is not None and lease.challenge.operations > 100 * 50e9 * 0.1
        # It would take this machine 20 s and more; half of that is too long as well.
        block = await asyncio.to_thread(slow_answer, lease.challenge)
        await liar.commit(lease, block)
        return await liar.standing()

    standing = await as_liar(measuring, tmp_path, story, replace(CPU, claimed_milliunits_per_s=100_000))
    assert not standing.units_milli_per_s and "where it claims 100" in standing.reason


def slow_answer(plan: ChallengePlan) -> bytes:
    """What can be done in two seconds: a part of the work, which takes too long already."""
    base, right = engine.matrices(replace(plan, inner=2_048))
    until = time.monotonic() + 2
    while time.monotonic() < until:
        base @ right
    return block_of(b"not even an answer")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (in_half_precision, "is not the product"),
        (with_half_of_the_work, "is not the product"),
        (lambda plan: block_of(secrets.token_bytes(100_000)), "is not under its root"),
        (lambda plan: honest(replace(plan, seed=bytes(32))), "answer is wrong"),
        (lambda plan: block_of(b""), "it ends after"),
        (lambda plan: block_of(honest_row(plan)[:-7]), "it ends after"),
        (lambda plan: block_of(honest_row(plan) + b"!"), "bytes too many"),
    ],
    ids=["half precision", "half the work", "any bytes", "another seed's answer", "nothing", "too short", "too long"],
)
async def test_a_wrong_answer_is_found_out(
    measuring: CoordinatorService, tmp_path: Path, answer: Answer, reason: str
) -> None:
    async def story(liar: Liar) -> DeviceStanding:
        await liar.answer(answer)
        return await liar.standing()

    standing = await as_liar(measuring, tmp_path, story)
    assert not standing.units_milli_per_s and reason in standing.reason


def honest_row(plan: ChallengePlan) -> bytes:
    block = RowBlock.parse(honest(plan))
    row = RowCodec(MANIFEST.output_schema, OUTPUT_SCHEMA_DIGEST).decode(block).columns["answer"][0]
    assert isinstance(row, bytes)
    return row


async def test_memory_that_is_not_filled_is_not_certified(measuring: CoordinatorService, tmp_path: Path) -> None:
    async def story(liar: Liar) -> DeviceStanding:
        await liar.answer(with_half_of_the_memory)
        half = await liar.standing()
        assert not half.units_milli_per_s and not half.memory_bytes, "speed alone is no certificate"
        await liar.answer(with_half_of_the_memory)
        assert [plan.kind for plan in liar.plans] == [ChallengeKind.SPEED, ChallengeKind.MEMORY]
        return await liar.standing()

    standing = await as_liar(measuring, tmp_path, story)
    assert not standing.memory_bytes and "was not mixed from those before it" in standing.reason


async def test_an_answer_to_an_old_challenge_is_worth_nothing(measuring: CoordinatorService, tmp_path: Path) -> None:
    async def first(liar: Liar) -> bytes:
        kept: list[bytes] = []

        def remember(plan: ChallengePlan) -> bytes:
            kept.append(honest(plan))
            return kept[0]

        await liar.answer(remember)
        await liar.standing()
        return kept[0]

    async def second(liar: Liar, old: bytes) -> DeviceStanding:
        await liar.answer(lambda _: old)
        return await liar.standing()

    old = await as_liar(measuring, tmp_path, first)
    standing = await as_liar(measuring, tmp_path, partial(second, old=old))
    assert not standing.units_milli_per_s and "wrong" in standing.reason


async def test_who_refuses_challenges_stays_unmeasured_and_connected(
    measuring: CoordinatorService, tmp_path: Path
) -> None:
    async def story(liar: Liar) -> DeviceStanding:
        lease = await liar.lease()
        await liar.session.send(
            LeaseReturned(lease.lease_id, lease.fence, Cause.OWNER_PREEMPT, "I would rather not"), sign=False
        )
        return await liar.standing()

    standing = await as_liar(measuring, tmp_path, story)
    assert not standing.units_milli_per_s and "rather not" in standing.reason


async def test_why_a_lease_was_given_back_counts_though_the_stream_broke_before_it_arrived(
    measuring: CoordinatorService, tmp_path: Path
) -> None:
    credentials = await joined(measuring.worker_join_line, tmp_path / "worker")
    async with raw_session(credentials) as session, blob_channel(credentials) as channel:
        first = Liar(session, BlobClient(channel))
        await first.open(CPU)
        lease = await first.lease()
        kinds = frozenset({TaskKind.MAP, TaskKind.CHALLENGE})
        again = await session.reopen_hello(
            capability=Capability(devices=(CPU,), sandbox_level=SandboxLevel.FULL, task_kinds=kinds),
            held_leases=(HeldLease(lease.lease_id, lease.fence, committed=False),),
        )
    async with raw_session(credentials) as session:
        welcome = await session.open(again)
        assert welcome.keep_lease_ids == (lease.lease_id,), "what a worker wants to give back by name is kept for it"
        returned = LeaseReturned(lease.lease_id, lease.fence, Cause.OWNER_PREEMPT, "my owner plays a game")
        await session.send(returned, sign=False)
        answer = await session.until(LeaseRevoked)
        assert isinstance(answer, LeaseRevoked) and answer.lease_id == lease.lease_id
        await session.send(returned, sign=False)
        refused = await session.until(Refused)
        assert isinstance(refused, Refused) and refused.reason == Reason.LEASE_ENDED.value, "twice is harmless"
    explained = measuring.cli("worker", "list")
    assert "plays a game" in str(explained), explained
