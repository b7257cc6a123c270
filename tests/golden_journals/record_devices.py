"""Records the golden journal of measured devices: `python record_devices.py NAME`. See `record.py`."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from fallow.session import Cause  # noqa: E402
from fallow_coordinator.core import commands as c  # noqa: E402
from fallow_coordinator.store.journal_reader import StoredRecord, decode_records  # noqa: E402
from fallow_coordinator.store.memory import MemoryDisk, MemoryStore  # noqa: E402
from fallow_coordinator.store.segment import encode_segment  # noqa: E402
from golden_journals.facts import facts_of  # noqa: E402
from journal_world import DAY_MS, World  # noqa: E402
from measuring_world import Measuring  # noqa: E402


async def record() -> list[StoredRecord]:
    """A life in which devices are measured, fail, change and expire."""
    disk = MemoryDisk()
    m = Measuring(World(store=MemoryStore(disk)))
    await m.begin()
    await m.pass_ms(60_000)
    lease = m.lease()
    await m.world.tell(
        c.ReturnLease(
            m.worker.session_id, m.worker.worker_id, lease.lease_id, lease.fence, Cause.OWNER_PREEMPT, "in use"
        )
    )
    await m.measure()
    await m.pass_ms(8 * DAY_MS)
    await m.pass_ms(60_000)
    await m.answer()
    await m.pass_ms(1_000)
    await m.verdict("row 3 of product 7 is not the product")
    await m.pass_ms(DAY_MS)
    await m.answer()
    await m.world.engine.stop()
    return disk.records


def main() -> None:
    target = HERE / f"{sys.argv[1]}.journal"
    assert not target.exists(), f"{target} is recorded; choose a new name"
    stored = asyncio.run(record())
    target.write_bytes(encode_segment(stored))
    facts = facts_of(decode_records(stored, 0, target))
    target.with_suffix(".json").write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
