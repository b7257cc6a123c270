"""What is deleted and what stays: nobody who holds a receipt that still counts loses the blob, in whatever order."""

from __future__ import annotations

import asyncio

from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.ids import Digest, digest_of
from fallow_coordinator.blobs.deletion import DigestLocks, Touches, delete_blobs
from fallow_coordinator.blobs.storage import MemoryStorage

GRACE_MS = 100
RECEIPT_VALID_MS = GRACE_MS // 2
DATA = b"bytes"
DIGEST = digest_of(DATA)


class Service:
    """The blob service as far as receipts and deletion go, and the coordinator's view of one blob."""

    def __init__(self) -> None:
        self.storage = MemoryStorage()
        self.now_ms = 1_000
        self.receipts: list[int] = []
        """When each receipt was given out; any of them may be shown later."""
        self.decisions: list[int] = []
        """Deletions on their way to the service, by when they were decided."""
        self.recorded = False
        self.restart()

    def restart(self) -> None:
        self.touches = Touches(began_at_ms=self.now_ms, remembered_max=1)
        self.locks = DigestLocks()

    async def upload(self) -> None:
        self.touches.touch(DIGEST, self.now_ms)
        await self.storage.put_bytes(DIGEST, DATA)
        self.receipts.append(self.now_ms)

    async def ask(self) -> None:
        if await self.storage.size(DIGEST) is not None:
            self.touches.touch(DIGEST, self.now_ms)
            self.receipts.append(self.now_ms)

    def touch_another(self) -> None:
        self.touches.touch(Digest(b"o" * 32), self.now_ms)

    def record(self, newest: bool) -> None:
        if self.receipts:
            receipt = self.receipts[-1] if newest else self.receipts[0]
            if receipt >= self.now_ms - RECEIPT_VALID_MS:
                self.recorded = True

    def decide(self) -> None:
        """The collector finds the blob superfluous: nobody has it from now on."""
        self.recorded = False
        self.decisions.append(self.now_ms)

    async def delete(self) -> None:
        if self.decisions:
            decided = self.decisions.pop(0)
            await delete_blobs(
                self.storage,
                self.touches,
                self.locks,
                [DIGEST],
                untouched_since_ms=decided - GRACE_MS,
                packed_only=False,
            )


STEPS = st.lists(
    st.sampled_from(
        ["upload", "ask", "other", "record new", "record old", "decide", "delete", "restart", "wait", "wait long"]
    ),
    max_size=60,
)


@settings(max_examples=300, deadline=None)
@given(STEPS)
def test_whoever_recorded_a_receipt_has_the_blob_however_late_a_deletion_comes(steps: list[str]) -> None:
    async def run() -> None:
        service = Service()
        for step in steps:
            match step:
                case "upload":
                    await service.upload()
                case "ask":
                    await service.ask()
                case "other":
                    service.touch_another()
                case "record new" | "record old":
                    service.record(newest=step == "record new")
                case "decide":
                    service.decide()
                case "delete":
                    await service.delete()
                case "restart":
                    service.restart()
                case _:
                    service.now_ms += 20 if step == "wait" else GRACE_MS + 1
            there = await service.storage.size(DIGEST) is not None
            assert there or not service.recorded, "an account has a blob that is gone"

    asyncio.run(run())


async def test_an_old_blob_that_was_found_superfluous_goes() -> None:
    service = Service()
    await service.upload()
    service.now_ms += GRACE_MS + 1
    service.decide()
    await service.delete()
    assert await service.storage.size(DIGEST) is None


async def test_packed_inputs_go_at_once_unless_an_account_uploaded_the_same_bytes() -> None:
    service = Service()
    await service.storage.put_bytes(DIGEST, DATA)
    other = digest_of(b"noted")
    await service.storage.put_bytes(other, b"noted")
    await service.storage.put_note(other, "account", b"receipt")
    gone = await delete_blobs(
        service.storage, service.touches, service.locks, [DIGEST, other], untouched_since_ms=0, packed_only=True
    )
    assert gone == [DIGEST]
    assert await service.storage.size(DIGEST) is None
    assert await service.storage.size(other) == 5


async def test_deletion_waits_for_whoever_holds_the_blob() -> None:
    service = Service()
    await service.storage.put_bytes(DIGEST, DATA)
    async with service.locks.held(DIGEST):
        deleting = asyncio.create_task(
            delete_blobs(
                service.storage, service.touches, service.locks, [DIGEST], untouched_since_ms=5_000, packed_only=False
            )
        )
        await asyncio.sleep(0)
        service.touches.touch(DIGEST, 6_000)
    assert await deleting == []
    assert await service.storage.size(DIGEST) == len(DATA)
