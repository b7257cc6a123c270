"""How long leases take to go out while a client moves blobs through the operator's blob service as fast as it can."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import tempfile
import time
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Any, Final

from scripts.benches.fleet import OUTPUT_DIGEST, running_coordinator, submitter
from scripts.benches.load_generator import Generators, Load
from scripts.benches.report import percentile, say

from fallow.client.blobs import BlobTransfers, Upload
from fallow.client.connection import Connection
from fallow.credentials import Credentials
from fallow.ids import digest_of
from fallow.limits import MIB
from fallow.session import BlobReference
from fallow.wire.blob import BlobKind
from fallow_coordinator.latency import quantile_ms

SESSIONS: Final = 50
TASK_MS: Final = 200.0
"""Fifty workers with tasks of a fifth of a second ask for 250 leases a second."""
ROWS_AHEAD: Final = 3_000
WARM_UP_S: Final = 2.0
START_PATIENCE_S: Final = 60.0


async def assigns_while_saturated(seconds: float, mebibytes: int) -> dict[str, Any]:
    """Leases' latencies and what was moved meanwhile; `mebibytes` is the size of each blob."""
    with tempfile.TemporaryDirectory(prefix="fallow-bench-") as name:
        folder = Path(name)
        async with running_coordinator(folder) as coordinator, submitter(coordinator, folder) as client:
            line = coordinator.join_line("volunteer", SESSIONS)
            generators = Generators([Load(folder / "workers", line, SESSIONS, 1, TASK_MS, OUTPUT_DIGEST)])
            mover = _Mover(coordinator.state / "client", mebibytes)
            try:
                await generators.enrolled()
                await client.submit()
                submitting = asyncio.create_task(client.keep_ahead(coordinator, ROWS_AHEAD))
                await generators.open()
                await mover.moving()
                say(f"{SESSIONS} workers, and blobs of {mebibytes} MiB both ways for {seconds:g} s …")
                await asyncio.sleep(WARM_UP_S)
                await generators.counts()
                before, moved_before = await coordinator.status(), await mover.moved()
                await asyncio.sleep(seconds)
                after, moved = await coordinator.status(), await mover.moved()
                _, turnarounds_ms = await generators.counts()
                submitting.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await submitting
            finally:
                mover.stop()
                generators.stop()
    assigns = [new - old for old, new in zip(before.assign_buckets, after.assign_buckets, strict=True)]
    return {
        "assign_p99_ms": round(quantile_ms(assigns, 0.99), 2),
        "turnaround_p99_ms": round(percentile(turnarounds_ms, 0.99), 1) if turnarounds_ms else None,
        "leases_sent": sum(assigns),
        "mib_moved_per_s": {
            side: round((moved[side] - moved_before[side]) / MIB / seconds, 1) for side in ("up", "down")
        },
    }


class _Mover:
    """A process that uploads and downloads blobs until it is stopped."""

    def __init__(self, credentials: Path, mebibytes: int) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._link, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_move, args=(theirs, credentials, mebibytes), daemon=True)
        self._process.start()

    async def moving(self) -> None:
        """Waits until the first blob is up."""
        deadline = time.monotonic() + START_PATIENCE_S
        while not (await self.moved())["down"]:
            assert time.monotonic() < deadline, "no blob was moved"
            await asyncio.sleep(0.1)

    async def moved(self) -> dict[str, int]:
        """Bytes moved so far, each way."""
        self._link.send("moved")
        moved: dict[str, int] = await asyncio.to_thread(self._link.recv)
        return moved

    def stop(self) -> None:
        """Ends the process."""
        self._process.terminate()
        self._process.join()


def _move(link: Pipe, credentials: Path, mebibytes: int) -> None:
    asyncio.run(_moving(link, credentials, mebibytes))


async def _moving(link: Pipe, credentials: Path, mebibytes: int) -> None:
    connection = Connection(Credentials.load(credentials), patience_s=START_PATIENCE_S)
    transfers = BlobTransfers(connection)
    moved = {"up": 0, "down": 0}
    first = asyncio.get_running_loop().create_future()

    async def upload() -> None:
        body, number = os.urandom(mebibytes * MIB - 8), 0
        while True:
            data = number.to_bytes(8, "big") + body
            blob = BlobReference(digest_of(data), len(data))
            await transfers.upload([Upload(blob, BlobKind.OPAQUE, data)])
            number += 1
            moved["up"] += len(data)
            if not first.done():
                first.set_result(blob)

    async def download() -> None:
        blob = await first
        while True:
            moved["down"] += len(await transfers.download(blob))

    moving = [asyncio.create_task(upload()), asyncio.create_task(download())]
    asking = asyncio.create_task(_answer(link, moved))
    await asyncio.wait((*moving, asking), return_when=asyncio.FIRST_COMPLETED)
    for task in (*moving, asking):
        if task.done():
            task.result()


async def _answer(link: Pipe, moved: dict[str, int]) -> None:
    while True:
        await asyncio.to_thread(link.recv)
        link.send(moved)
