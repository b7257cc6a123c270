"""A coordinator as its operator starts it, and jobs of many small tasks: each row is dear by inspection, one a task."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import psutil
from scripts.benches.system import family, process_tail, running_process, tool

from fallow.bundle import (
    Binding,
    BundleFile,
    BundleManifest,
    InspectionReport,
    ProgramFormat,
    ProgramStage,
)
from fallow.bundle_file import Bundle
from fallow.client import AsyncClient, connect_async
from fallow.client.job import AsyncJob
from fallow.ids import Digest, digest_of
from fallow.job import JobOptions
from fallow.journal.v1 import journal_pb2
from fallow.schema import DType, Schema, TensorColumn
from fallow.session import Inspection, Lease, Settled, TaskKind, Usage
from fallow.v1 import admin_service_pb2
from fallow.wire.schema import encode_schema
from fallow_coordinator.admin_client import CALL_TIME_MAX_S, admin_stub
from fallow_coordinator.core.limits import TASK_UNITS_TARGET, UNIT_MICROS
from fallow_coordinator.store.journal_reader import JOURNAL_FILE, JournalReader

INPUT: Final = Schema((TensorColumn("x", DType.FLOAT32, (4,)),))
OUTPUT: Final = Schema((TensorColumn("y", DType.FLOAT32, (4,)),))
OUTPUT_DIGEST: Final = digest_of(encode_schema(OUTPUT))
ROWS_PER_JOB: Final = 3_000
"""As many rows of 16 bytes as travel inside a submission: nothing of these jobs goes through the blob service."""
START_PATIENCE_S: Final = 90.0
RECORDS_AT_ONCE: Final = 5_000
KILL_PATIENCE_S: Final = 20.0


@dataclass
class RunningCoordinator:
    """One coordinator and how to reach it; made by `running_coordinator`."""

    state: Path
    process: psutil.Process
    facts: dict[str, str]
    log: Path

    def cli(self, *arguments: str) -> dict[str, Any]:
        """What `fallow-coordinator ARGUMENTS --json` says."""
        command = [tool("fallow-coordinator"), *arguments, "--state", str(self.state), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert not done.returncode, f"{arguments}: {done.stderr}\n{process_tail(self.log)}"
        said: dict[str, Any] = json.loads(done.stdout)
        return said

    def join_line(self, tier: str, uses: int) -> str:
        """A fresh token for workers of this tier; some may have to try twice."""
        uses += uses // 10
        line: str = self.cli("token", "new", "--role", "worker", "--tier", tier, "--uses", str(uses))["join_line"]
        return line

    async def status(self) -> admin_service_pb2.GetStatusResponse:
        """The coordinator's own numbers."""
        async with admin_stub(self.state) as stub:
            return await stub.GetStatus(admin_service_pb2.GetStatusRequest(), timeout=CALL_TIME_MAX_S)

    def kill(self) -> None:
        """`kill -9` of the coordinator; what it started ends with it."""
        below = family(self.process)[1:]
        self.process.kill()
        psutil.wait_procs([self.process, *below], timeout=KILL_PATIENCE_S)

    def children(self) -> dict[str, psutil.Process]:
        """Its child processes, by the module that they run."""
        found: dict[str, psutil.Process] = {}
        for child in family(self.process)[1:]:
            with contextlib.suppress(psutil.Error):
                words = child.cmdline()
                modules = [word for word in words if word.startswith("fallow_") and not word.endswith("attended")]
                if modules:
                    found[modules[0]] = child
        return found

    def events(self) -> dict[str, int]:
        """How many events of each kind the journal holds, by their protobuf tags."""
        names = {field.number: field.name for field in journal_pb2.Event.DESCRIPTOR.fields}
        heads = Counter(event[:3] for event in self._events())
        found: Counter[str] = Counter()
        for head, count in heads.items():
            found[names[_field_number(head)]] += count
        return dict(found)

    def events_of(self, kind: str) -> list[journal_pb2.Event]:
        """All events of one kind, as the journal holds them."""
        tag = _tag(journal_pb2.Event.DESCRIPTOR.fields_by_name[kind].number)
        return [journal_pb2.Event.FromString(event) for event in self._events() if event.startswith(tag)]

    def _events(self) -> Iterator[bytes]:
        """The bytes of every event of the journal, wherever its records lie by now."""
        sequence = 0
        with JournalReader(self.state / "journal" / JOURNAL_FILE) as journal:
            while records := journal.stored(after_sequence=sequence, limit=RECORDS_AT_ONCE):
                yield from (record.event for record in records)
                sequence = records[-1].sequence


def _tag(number: int) -> bytes:
    """The tag of a length-delimited field."""
    value, tag = number << 3 | 2, bytearray()
    while value > 0x7F:
        tag.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*tag, value))


def _field_number(head: bytes) -> int:
    """The field number of the tag with which a message begins (a base-128 varint)."""
    value = 0
    for index, byte in enumerate(head):
        value |= (byte & 0x7F) << (7 * index)
        if not byte & 0x80:
            break
    return value >> 3


@contextlib.asynccontextmanager
async def running_coordinator(folder: Path, *arguments: str) -> AsyncGenerator[RunningCoordinator, None]:
    """`fallow-coordinator start` on a state folder in `folder`, without an operator worker of its own.

    The first start takes free ports, later ones the same.
    """
    state, log = folder / "coordinator", folder / "coordinator.log"
    ports = () if (state / "ports.json").exists() else ("--port", "0")
    with running_process(
        log,
        "fallow-coordinator", "start", "--state", state, *ports, "--json", "--no-operator-worker", *arguments,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        line = await asyncio.wait_for(asyncio.to_thread(process.stdout.readline), START_PATIENCE_S)
        assert line, f"the coordinator did not start:\n{process_tail(log)}"
        yield RunningCoordinator(state, psutil.Process(process.pid), json.loads(line), log)


def dear_bundle() -> Bundle:
    """A bundle whose program nobody runs: sixteen bytes in, sixteen bytes out."""
    program = secrets.token_bytes(500)
    manifest = BundleManifest(
        name="dear",
        files=(BundleFile("program.onnx", digest_of(program), len(program)),),
        stages=(ProgramStage(ProgramFormat.ONNX, "program.onnx", (Binding("x", "x"),), (Binding("y", "y"),)),),
        input_schema=INPUT,
        output_schema=OUTPUT,
    )
    return Bundle(manifest, {"program.onnx": program})


def dear_report(bundle_digest: Digest) -> InspectionReport:
    """What the stub inspector finds: one row fills the largest task that is cut, so every task is one row."""
    return InspectionReport(
        bundle_digest=bundle_digest,
        accepted=True,
        refusals=(),
        operators=(("ai.onnx.Add", 1),),
        canonical_batch_rows=1,
        slot_dependent=False,
        neighbour_dependent=False,
        unit_micros_per_row=TASK_UNITS_TARGET * UNIT_MICROS,
        unit_micros_per_kib=0,
        memory_bytes_peak=1_000_000,
        execution_class="bench",
        inspected_seconds=0.1,
    )


async def inspect_one(coordinator: RunningCoordinator, folder: Path) -> None:
    """Takes one inspection as an operator's worker and answers with `dear_report`."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "tests"))
    from integration.raw_session import hello, joined, raw_session

    credentials = await joined(coordinator.join_line("operator", 1), folder, "inspector")
    async with raw_session(credentials) as session:
        await session.open(hello(TaskKind.INSPECT, window=1))
        lease = await session.until(Lease)
        assert isinstance(lease, Lease)
        report = dear_report(lease.bundle_digest)
        await session.send(Inspection(lease.lease_id, lease.fence, report, Usage(cpu_microseconds=1)))
        await session.until(Settled)


@dataclass
class Submitter:
    """Keeps a coordinator in work, through the client that everybody uses."""

    client: AsyncClient
    bundle: Bundle
    rows_per_job: int = ROWS_PER_JOB
    options: JobOptions = field(default_factory=JobOptions)
    jobs: list[AsyncJob] = field(default_factory=list[AsyncJob])
    rows: int = 0

    async def submit(self) -> None:
        """One more job of fresh rows."""
        rows = np.random.default_rng(self.rows).standard_normal((self.rows_per_job, 4), dtype=np.float32)
        self.jobs.append(await self.client.map(self.bundle, {"x": rows}, data="public", options=self.options))
        self.rows += self.rows_per_job

    async def keep_ahead(self, coordinator: RunningCoordinator, rows_ahead: int) -> None:
        """Runs for ever: there are always so many rows that nobody has done yet."""
        while True:
            status = await coordinator.status()
            while self.rows - status.commitments < rows_ahead:
                await self.submit()
            await asyncio.sleep(0.2)


@contextlib.asynccontextmanager
async def submitter(coordinator: RunningCoordinator, folder: Path) -> AsyncGenerator[Submitter, None]:
    """A client of the operator's with an inspected bundle."""
    async with await connect_async(coordinator.state / "client") as client:
        bundle = dear_bundle()
        inspecting = asyncio.create_task(inspect_one(coordinator, folder / "inspector"))
        await client.register(bundle)
        await inspecting
        yield Submitter(client, bundle)


def spread(total: int, parts: int) -> Sequence[int]:
    """`total` in `parts` numbers that differ by at most one."""
    return [total // parts + (part < total % parts) for part in range(parts)]


def descriptors_needed(sessions: int) -> None:
    """Raises the limit on open files as far as this many connections need it."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(hard, max(soft, 2 * sessions + 512))
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
