"""A worker daemon that alters every row it gives: `python -m integration.cheating_worker start …`."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from fallow.row_block import RowBlock, pack
from fallow.session import Lease, TaskKind
from fallow_worker import daemon
from fallow_worker.__main__ import main
from fallow_worker.output import told
from fallow_worker.ports import Outcome


def altered(block: bytes) -> bytes:
    """The block with other bytes in each row: no number stays what it was by more than rounding."""
    parsed = RowBlock.parse(block)
    rows = [bytes(byte ^ 0x40 for byte in bytes(row)) for row in parsed]
    return pack(parsed.schema_digest, rows, [parsed.row_size_features(row) for row in range(len(rows))], bytes(16))


async def lie(lease: Lease, outcome: Outcome) -> Any:
    """What an honest worker says, of altered rows."""
    if lease.kind is TaskKind.MAP and outcome.output_block:
        outcome = replace(outcome, output_block=await asyncio.to_thread(altered, outcome.output_block))
    return await told(lease, outcome)


if __name__ == "__main__":
    daemon.told = lie  # type: ignore[attr-defined]  # imported there by name
    main()
