"""A coordinator killed again and again in mid-job, and workers that stand still: nothing acknowledged is lost."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest

from fallow.client.blocking import Job, connect
from fallow.errors import FallowError, Reason
from fallow_coordinator.core import events as ev
from integration.fault_rig import HEARTBEAT_S, NARROW, PATIENCE_S, a_worker, lives, patiently, rig
from integration.harness import wait_for

pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.timeout(400)]

ROWS = 12_000
KILLS = 4
NOTICED_S_MAX = 3 * HEARTBEAT_S + 1.0
SEEDS = [int(seed) for seed in os.environ.get("FALLOW_FAULT_SEEDS", "1,2,3").split(",")]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_coordinator_killed_at_random_moments_loses_nothing_that_it_acknowledged(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    with rig(tmp_path, plain="--executor process --cpus 1", ray="--executor ray --cpus 1") as made:
        wide, narrow = made.work(ROWS, seed=seed), made.work(ROWS // 2, NARROW, seed=seed)
        acknowledged = {wide.job.id, narrow.job.id}
        seen: set[int] = set()
        watching = threading.Thread(target=_watch, args=(narrow.job, seen), daemon=True)
        watching.start()
        wide.begun()
        settled = 0
        for number in range(KILLS):
            submitted = made.work(40, NARROW, seed=number)
            acknowledged.add(submitted.job.id)
            # A fast job may be done before the last kills; they come all the same.
            target = min(ROWS, settled + chance.randrange(1, ROWS // 10))
            wait_for(lambda least=target: wide.job.progress().rows_done >= least, PATIENCE_S, "the next moment")
            settled = wide.job.progress().rows_done
            made.kill_coordinator()
            seconds = made.restart_coordinator()
            back = patiently(lambda: made.online() == 2, "both workers to be back")
            print(
                f"seed {seed}: kill {number + 1} at {settled} rows, ready after {seconds:.2f} s, workers {back:.2f} s"
            )
            assert wide.job.progress().rows_done >= settled, "what was settled stays settled"
        wide.check()
        narrow.check()
        assert acknowledged <= {status.job_id for status in made.client.jobs()}
        watching.join(PATIENCE_S)
        assert seen == set(range(len(narrow.rows))), "the watching client came back by itself and missed no row"


def _watch(job: Job, seen: set[int]) -> None:
    for row in job.results(order="any"):
        assert row.position not in seen
        seen.add(row.position)


def test_a_worker_that_stands_still_is_noticed_and_its_rows_go_elsewhere(tmp_path: Path) -> None:
    with (
        rig(tmp_path, plain="--executor process --cpus 1") as made,
        a_worker(made, "frozen", "--executor", "process", "--cpus", "1") as frozen,
    ):
        wait_for(lambda: made.online() == 2, PATIENCE_S, "both workers")
        work = made.work(ROWS)
        work.begun()
        wait_for(lambda: len(frozen.family()) > 1, PATIENCE_S, "work on the worker that will freeze")
        family = [process for process in frozen.family() if lives(process)]
        began = time.monotonic()
        for process in family:
            process.send_signal(signal.SIGSTOP)
        try:
            wait_for(lambda: made.online() == 1, PATIENCE_S, "the coordinator to notice")
            noticed_s = time.monotonic() - began
            work.check()
            print(f"noticed after {noticed_s:.1f} s, job done after {time.monotonic() - began:.1f} s")
        finally:
            for process in family:
                process.send_signal(signal.SIGCONT)
        # `worker list` itself takes half a second or so.
        assert noticed_s < NOTICED_S_MAX + 2
        before = [event for event in made.events() if isinstance(event, ev.TaskSettled)]
        wait_for(lambda: made.online() == 2, PATIENCE_S, "the worker to come back")
        again = made.work(ROWS // 4, seed=1)
        again.check()
        lost = {event.lease_id for event in made.events() if isinstance(event, ev.LeaseEnded)}
        assert lost, "its leases were taken away"
        late = {event.lease_id for event in made.events() if isinstance(event, ev.TaskSettled)}
        assert not lost & late, "a stale fence changes nothing"
        assert {event.task_id for event in before} <= {
            event.task_id for event in made.events() if isinstance(event, ev.TaskSettled)
        }
        work.check()
        assert frozen.stop() == 0


def test_a_client_whose_coordinator_stays_away_is_told_when_its_patience_ends(tmp_path: Path) -> None:
    with rig(tmp_path) as made, connect(made.service.facts["client_credentials"], patience_s=3) as client:
        made.kill_coordinator()
        with pytest.raises(FallowError) as caught:
            client.jobs()
        assert caught.value.reason is Reason.COORDINATOR_UNREACHABLE
        # Somebody has looked: the port is known, and nobody is there.
        assert "is it running" in caught.value.hint and "goes on without this client" in caught.value.hint
        made.restart_coordinator()
