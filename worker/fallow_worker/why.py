"""`fallow-worker why`: why this machine has no work now, as far as it knows itself and as the coordinator sees it."""

from __future__ import annotations

import asyncio
from dataclasses import asdict, dataclass
from typing import Final

import grpc

from fallow.channel import control_channel
from fallow.credentials import Credentials
from fallow.errors import FallowError
from fallow.explanation import Obstacle, WorkerExplanation
from fallow.v1 import worker_service_pb2 as pb
from fallow.v1 import worker_service_pb2_grpc
from fallow.wire.errors import error_from_rpc
from fallow.wire.explanation import worker_explanation_from_message
from fallow_worker.state_folder import StateFolder, Status

ANSWER_WAIT_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class Why:
    """All that is known; reasons of this machine come before those of the coordinator."""

    worker_id: str
    coordinator: str
    running: bool
    session: str
    reasons: tuple[Obstacle, ...]
    explanation: WorkerExplanation | None
    """None: the coordinator could not be asked, and a reason says so."""


def why(folder: StateFolder, credentials: Credentials) -> Why:
    """Looks at the folder and asks the coordinator, for at most `ANSWER_WAIT_S`."""
    running = folder.running_pid() is not None
    status = folder.read_status()
    session = str(status.get("session", "offline")) if running else "not running"
    reasons = [*_local_reasons(running=running, session=session, status=status)]
    explanation: WorkerExplanation | None = None
    try:
        explanation = asyncio.run(_ask(credentials))
    except FallowError as error:
        words = f"the coordinator did not say: {error.message}"
        reasons.append(Obstacle(error.reason.value, 0, words, error.hint or "try again in a while"))
    if explanation is not None:
        # What this machine has said itself need not be said twice.
        known = {"away"} if reasons else set[str]()
        reasons += [reason for reason in explanation.reasons if reason.code not in known]
    return Why(credentials.party_id, credentials.control_endpoint, running, session, tuple(reasons), explanation)


def why_facts(found: Why) -> dict[str, object]:
    """For JSON."""
    return asdict(found)


def why_text(found: Why) -> str:
    """For people."""
    lines = [f"worker       {found.worker_id}", f"session      {found.session}"]
    told = found.explanation
    if told is not None:
        lines.append(f"leases       {told.leases} held, room for {told.room}, offered {told.window}")
        lines.append(f"jobs         {told.jobs_considered} unfinished, {told.jobs_fitting} fit this worker")
        lines += [f"  {reason.count:>6} × {reason.words}: {reason.advice}" for reason in told.fallen_out]
    for reason in found.reasons:
        lines.append(f"why          {reason.words}")
        lines += [f"  do         {reason.advice}"] if reason.advice else []
    return "\n".join(lines) + "\n"


def _local_reasons(*, running: bool, session: str, status: Status) -> list[Obstacle]:
    if not running:
        return [Obstacle("NOT_RUNNING", 0, "no worker runs on this folder", "start it with: fallow-worker start")]
    if session == "online":
        return []
    error = status.get("last_error")
    words = f": {error['message']}" if isinstance(error, dict) else ""
    return [Obstacle("OFFLINE", 0, f"the worker runs and is {session}{words}", "it tries again by itself")]


async def _ask(credentials: Credentials) -> WorkerExplanation:
    async with control_channel(credentials) as channel:
        stub = worker_service_pb2_grpc.WorkerServiceStub(channel)
        try:
            answer = await stub.GetWhy(pb.GetWhyRequest(), timeout=ANSWER_WAIT_S)
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from None
    return worker_explanation_from_message(answer.explanation)
