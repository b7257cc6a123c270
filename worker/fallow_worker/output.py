"""From what an executor gave to what a worker is bound to: root, digest, signed words."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Final

from fallow.errors import FallowError, Reason
from fallow.ids import digest_of
from fallow.limits import (
    INLINE_PAYLOAD_BYTES_MAX,
    KIB,
    ROW_FAILURE_REASON_BYTES_MAX,
    ROW_FAILURES_LISTED_PER_TASK_MAX,
)
from fallow.row_block import RowBlock
from fallow.session import BlobReference, Cause, Checked, Commitment, Inspection, Lease, Refereed, RowFailure
from fallow_worker.executor import WorkFailed
from fallow_worker.ports import Outcome

_HASHED_ON_THE_SPOT_BYTES: Final = 64 * KIB
"""Smaller blocks are hashed faster than a thread is asked to."""


async def told(lease: Lease, outcome: Outcome) -> Commitment | Inspection | Checked | Refereed:
    """What to say of an outcome: a commitment over its output block, its report, verdict or findings.

    Raises WorkFailed.
    """
    if outcome.verdict is not None:
        verdict = replace(outcome.verdict, reason=clipped(outcome.verdict.reason))
        return Checked(lease.lease_id, lease.fence, verdict)
    if outcome.report is not None:
        return Inspection(lease.lease_id, lease.fence, outcome.report, outcome.usage)
    if len(outcome.output_block) <= _HASHED_ON_THE_SPOT_BYTES:
        bound = commitment(lease, outcome)
    else:
        bound = await asyncio.to_thread(commitment, lease, outcome)
    if not outcome.findings:
        return bound
    return Refereed(
        lease.lease_id, lease.fence, bound.output_root, outcome.findings, outcome.execution_class, outcome.usage
    )


def commitment(lease: Lease, outcome: Outcome) -> Commitment:
    """Binds the worker to every row of the output. Raises WorkFailed when the block is not what the lease asked for."""
    data = outcome.output_block
    try:
        block = RowBlock.parse(data)
    except FallowError as error:
        cause = Cause.PROGRAM if error.reason in {Reason.BLOCK_TOO_LARGE, Reason.ROW_TOO_LARGE} else Cause.PLATFORM
        raise WorkFailed(cause, clipped(f"the output is no row block: {error}")) from None
    if len(block) != lease.rows:
        raise WorkFailed(Cause.PLATFORM, f"the engine gave {len(block)} rows for {lease.rows}")
    if lease.output_bytes_max and len(data) > lease.output_bytes_max:
        raise WorkFailed(Cause.PROGRAM, f"an output of {len(data)} bytes; allowed: {lease.output_bytes_max} bytes")
    return Commitment(
        lease_id=lease.lease_id,
        fence=lease.fence,
        output_root=block.root(),
        rows=len(block),
        output=BlobReference(digest_of(data), len(data)),
        failures=tuple(
            RowFailure(failure.row, failure.cause, clipped(failure.reason))
            for failure in outcome.failures[:ROW_FAILURES_LISTED_PER_TASK_MAX]
        ),
        usage=outcome.usage,
        execution_class=outcome.execution_class,
        inline_output=data if len(data) <= INLINE_PAYLOAD_BYTES_MAX else b"",
    )


def clipped(text: str) -> str:
    """`text` on one line of at most `ROW_FAILURE_REASON_BYTES_MAX` bytes of UTF-8."""
    data = " ".join(text.split()).encode("utf-8", "replace")
    if len(data) <= ROW_FAILURE_REASON_BYTES_MAX:
        return data.decode()
    return data[: ROW_FAILURE_REASON_BYTES_MAX - 3].decode("utf-8", "ignore") + "…"
