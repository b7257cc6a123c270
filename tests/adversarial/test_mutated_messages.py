"""Mutated messages in every method: memory stays, honest calls are answered at once, nothing leaves by a wrong door.

`FALLOW_FUZZ_MESSAGES` says how many go to each method in the long tier, `FALLOW_FUZZ_SECONDS` how long that may take,
and `FALLOW_FUZZ_METHODS` (a regular expression over `Service.Method`) which methods.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from random import Random
from typing import IO

import grpc
import psutil
import pytest
from google.protobuf.descriptor import MethodDescriptor

from adversarial.flood import Plan, Way
from fallow.channel import control_channel
from fallow.credentials import Credentials
from fallow.identity import BLOBS_NAME, CONTROL_NAME, ENROLLMENT_NAME
from fallow.limits import MIB
from fallow.v1 import (
    admin_service_pb2,
    blob_service_pb2,
    certificate_service_pb2,
    enrollment_service_pb2,
    job_service_pb2,
    job_service_pb2_grpc,
    ledger_service_pb2,
    worker_service_pb2,
)
from integration.harness import CoordinatorService, coordinator
from integration.raw_session import joined

pytestmark = [pytest.mark.processes, pytest.mark.timeout(1_200)]

MEMORY_BYTES_MORE_MAX = 100 * MIB
HONEST_CALL_S_MAX = 0.1
HONEST_CALLS_TRIED = 5
SECONDS_FOR_A_METHOD_MAX = float(os.environ.get("FALLOW_FUZZ_SECONDS", "4"))
MESSAGES_FOR_A_METHOD = int(os.environ.get("FALLOW_FUZZ_MESSAGES", "100000"))
METHODS_WANTED = re.compile(os.environ.get("FALLOW_FUZZ_METHODS", ""))
FLOODS = 2
"""Processes that send."""
KEYS = 4
"""Of each process: each key's calls are counted by themselves, and several get more bytes past the door."""
SERVICES = {
    job_service_pb2: "JobService",
    admin_service_pb2: "AdminService",
    ledger_service_pb2: "LedgerService",
    enrollment_service_pb2: "EnrollmentService",
    worker_service_pb2: "WorkerService",
    blob_service_pb2: "BlobService",
    certificate_service_pb2: "CertificateService",
}
METHODS = [
    method
    for module, service in SERVICES.items()
    for method in module.DESCRIPTOR.services_by_name[service].methods
    if METHODS_WANTED.search(f"{service}.{method.name}")
]
ANSWERS = frozenset(
    str(code.value[0])
    for code in (
        grpc.StatusCode.OK,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.OUT_OF_RANGE,
        grpc.StatusCode.ALREADY_EXISTS,
        grpc.StatusCode.ABORTED,
        # Ours: a stream that answers nothing for so long.
        grpc.StatusCode.DEADLINE_EXCEEDED,
    )
)
"""What a call may be answered with. INTERNAL and UNKNOWN would be mistakes of ours."""


@pytest.fixture
def service(tmp_path: Path) -> Iterator[CoordinatorService]:
    with coordinator(tmp_path / "coordinator") as started:
        yield started


@pytest.fixture
async def attackers(service: CoordinatorService, tmp_path: Path) -> AsyncIterator[dict[str, list[Credentials]]]:
    """Parties by role; workers flood their own service."""
    lines = {
        "operator": service.new_token("--role", "operator", "--uses", str(KEYS * FLOODS)),
        "worker": service.new_token("--role", "worker", "--uses", str(KEYS * FLOODS)),
    }
    yield {
        role: [await joined(line, tmp_path / f"{role}-{number}") for number in range(KEYS * FLOODS)]
        for role, line in lines.items()
    }


class Flood:
    """A process that sends, and is asked by one line for each method."""

    def __init__(self) -> None:
        folders = [str(Path(__file__).parent.parent), *sys.path]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "adversarial.flood"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(folders)},
        )

    def begin(self, plan: Plan) -> None:
        """Starts to send."""
        _pipe(self._process.stdin).write(json.dumps(plan).encode() + b"\n")
        _pipe(self._process.stdin).flush()

    def answers(self) -> Counter[str]:
        """How the calls were answered, once all of them were: status numbers, and `cut` or `reset-N` without one."""
        return Counter(json.loads(_pipe(self._process.stdout).readline()))

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait(10)
        for pipe in (self._process.stdin, self._process.stdout):
            _pipe(pipe).close()


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None
    return pipe


def plan_of(service: CoordinatorService, method: MethodDescriptor, parties: list[Credentials]) -> Plan:
    """A plan against one method, for these parties."""
    kind = method.containing_service.name
    endpoint, server_name = {
        "EnrollmentService": (service.facts["enrollment_endpoint"], ENROLLMENT_NAME),
        "BlobService": (service.facts["blob_endpoint"], BLOBS_NAME),
    }.get(kind, (service.facts["control_endpoint"], CONTROL_NAME))
    stranger = kind == "EnrollmentService"

    def file(party: Credentials, name: str) -> str:
        return "" if stranger and name != "authority.pem" else str(party.folder / name)

    return {
        "endpoint": endpoint,
        "server_name": server_name,
        "path": f"/{method.containing_service.full_name}/{method.name}",
        "module": Path(method.input_type.file.name).stem + "_pb2",
        "message": method.input_type.name,
        # What watches goes on until its time is over.
        "timeout": "2S" if method.server_streaming else "60S",
        "ways": [
            Way(
                authority=file(each, "authority.pem"),
                certificate=file(each, "certificate.pem"),
                key=file(each, "key.pem"),
            )
            for each in parties
        ],
        "count": 0,
        "seconds": SECONDS_FOR_A_METHOD_MAX,
        "seed": 0,
    }


async def honest_call_s(service: CoordinatorService) -> float:
    """The best of a few honest calls: this machine has other things to do as well."""
    request = job_service_pb2.ListJobsRequest(page_size=1)
    best = float("inf")
    async with control_channel(service.operator) as channel:
        stub = job_service_pb2_grpc.JobServiceStub(channel)
        await stub.ListJobs(request, timeout=30)
        for _ in range(HONEST_CALLS_TRIED):
            began = time.monotonic()
            await stub.ListJobs(request, timeout=30)
            best = min(best, time.monotonic() - began)
    return best


def memory_bytes(service: CoordinatorService) -> dict[str, int]:
    """Resident bytes of the coordinator and of each of its children."""
    found: dict[str, int] = {}
    for process in service.family():
        with contextlib.suppress(psutil.NoSuchProcess):
            found[" ".join(process.cmdline()[:4])] = process.memory_info().rss
    return found


async def attacked(
    service: CoordinatorService, attackers: dict[str, list[Credentials]], messages: int
) -> dict[str, Counter[str]]:
    answers: dict[str, Counter[str]] = {}
    with contextlib.ExitStack() as stack:
        floods = [Flood() for _ in range(FLOODS)]
        for flood in floods:
            stack.callback(flood.close)
        chance = Random(1)

        def send(method: MethodDescriptor, count: int) -> Counter[str]:
            parties = attackers["worker" if method.containing_service.name == "WorkerService" else "operator"]
            for number, flood in enumerate(floods):
                plan = plan_of(service, method, parties[number::FLOODS])
                flood.begin({**plan, "count": count // FLOODS, "seed": chance.getrandbits(32)})
            return sum((flood.answers() for flood in floods), Counter())

        send(METHODS[0], 50 * FLOODS)
        before = memory_bytes(service)
        for method in METHODS:
            counts = answers[method.full_name] = send(method, messages)
            took_s = await honest_call_s(service)
            assert took_s <= HONEST_CALL_S_MAX, f"{method.full_name}: an honest call took {took_s:.3f} s"
            for name, grown_bytes in memory_bytes(service).items():
                more = grown_bytes - before.get(name, 0)
                assert more <= MEMORY_BYTES_MORE_MAX, f"{method.full_name}: {more // MIB} MiB more of {name}"
            # Whose own time is over is cut off by the transport, without a word: gRPC's reset 8.
            assert set(counts) <= ANSWERS | ({"reset-8"} if method.server_streaming else set()), (
                method.full_name,
                counts,
            )
            print(method.full_name, sum(counts.values()), dict(counts), f"{took_s * 1000:.1f} ms", flush=True)
    assert service.running()
    log = service.log.read_text(errors="replace")
    assert "Traceback" not in log, log[-4_000:]
    return answers


async def test_mutated_messages_leave_memory_and_honest_calls_alone(
    service: CoordinatorService, attackers: dict[str, list[Credentials]]
) -> None:
    await attacked(service, attackers, 200)


@pytest.mark.slow
@pytest.mark.timeout(7_200)
async def test_very_many_mutated_messages_a_method_change_nothing(
    service: CoordinatorService, attackers: dict[str, list[Credentials]]
) -> None:
    answers = await attacked(service, attackers, MESSAGES_FOR_A_METHOD)
    counts = {name: sum(each.values()) for name, each in answers.items()}
    print("fewest:", min(counts, key=lambda name: counts[name]), min(counts.values()), "in all:", sum(counts.values()))
