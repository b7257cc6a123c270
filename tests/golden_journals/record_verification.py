"""Records the golden journal of verified results: `python record_verification.py NAME`. See `record.py`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from fallow.credits import PoolMode  # noqa: E402
from fallow.roles import Tier  # noqa: E402
from fallow.session import TaskKind  # noqa: E402
from fallow_coordinator.core import commands as c  # noqa: E402
from fallow_coordinator.ports import Record  # noqa: E402
from fallow_coordinator.store.encoding import encode_event, leaf_of  # noqa: E402
from fallow_coordinator.store.journal_reader import StoredRecord  # noqa: E402
from fallow_coordinator.store.segment import encode_segment  # noqa: E402
from golden_journals.facts import facts_of  # noqa: E402
from simulation.verification import Zoo, junk, withholding  # noqa: E402


def live() -> Zoo:
    """A life in which rows are audited, refereed, upheld, withdrawn and taken as they are."""
    zoo = Zoo(23)
    zoo.begin()
    referee = zoo.operator_worker(TaskKind.REFEREE)
    zoo.operator_worker(TaskKind.MAP, window=1)
    honest, other = zoo.volunteer(), zoo.volunteer(execution_class="gpu")
    zoo.submit(20, "basic", blocks=2)
    zoo.run()
    lazy = zoo.volunteer(withholding)
    for actor in (honest, other):
        zoo.disconnect(actor)
    zoo.submit(4, "standard")
    zoo.run()
    zoo.disconnect(lazy)
    for actor in (honest, other):
        zoo.reconnect(actor)
    cheat = zoo.volunteer(junk)
    zoo.submit(30, "standard,rate=0.1", blocks=3)
    zoo.run()
    zoo.tell(c.ReleaseWorker(cheat.worker_id))
    zoo.volunteer(tier=Tier.MANAGED)
    zoo.submit(10, "strict")
    zoo.run()
    for actor in zoo.actors.values():
        if actor not in (honest, other, referee) and zoo.state.workers[actor.worker_id].session_id is not None:
            zoo.disconnect(actor)
    zoo.disconnect(other)
    zoo.submit(4, "standard")
    zoo.run()
    zoo.disconnect(referee)
    job_id = zoo.submit(4, "standard")
    zoo.run()
    zoo.tell(c.AcceptAssurance(zoo.operator_id, job_id))
    _market(zoo)
    return zoo


def small() -> Zoo:
    """A life in which rows of another class teach a tolerance."""
    zoo = Zoo(24)
    zoo.begin()
    zoo.operator_worker(TaskKind.REFEREE)
    for execution_class in ("cpu", "gpu"):
        zoo.volunteer(execution_class=execution_class)
    zoo.submit(30, "standard")
    zoo.run()
    return zoo


def _market(zoo: Zoo) -> None:
    """What a lie forfeits returns to the job."""
    zoo.tell(c.SetPoolMode(zoo.state.default_pool_id, PoolMode.MARKET))
    zoo.tell(c.GrantCredits(zoo.operator_id, 1_000_000_000, "a start", bytes(16)))
    zoo.operator_worker(TaskKind.REFEREE)
    zoo.volunteer(ask=1_000)
    zoo.volunteer(junk, ask=500)
    zoo.volunteer(ask=2_000)
    zoo.measure_all()
    zoo.submit(40, "standard", blocks=4, budget_microcredits=100_000_000)
    zoo.run()


def stored(zoo: Zoo) -> list[StoredRecord]:
    """Its records, with salts that are the same in every run."""
    made: list[StoredRecord] = []
    for sequence, (at_ms, event) in enumerate(zoo.events, 1):
        salt, data = sequence.to_bytes(16, "big"), encode_event(event)
        leaf = leaf_of(salt=salt, sequence=sequence, at_ms=at_ms, epoch=1, event=data)
        made.append(StoredRecord(sequence, at_ms, 1, data, salt, leaf))
    return made


def main() -> None:
    target = HERE / f"{sys.argv[1]}.journal"
    assert not target.exists(), f"{target} is recorded; choose a new name"
    zoo = small() if sys.argv[1] == "tolerances" else live()
    target.write_bytes(encode_segment(stored(zoo)))
    records = [Record(number, at_ms, event) for number, (at_ms, event) in enumerate(zoo.events, 1)]
    target.with_suffix(".json").write_text(json.dumps(facts_of(records), indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
