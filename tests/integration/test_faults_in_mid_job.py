"""Whatever is killed in mid-job: rows are redone, results are the same bytes, each row comes once, nothing is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from fallow.client.blocking import connect
from integration.fault_rig import (
    ACTOR,
    BLOBS,
    DRIVER,
    ENGINE_CHILD,
    FOLLOWER,
    NARROW,
    OPERATOR,
    PATIENCE_S,
    RAYLET,
    Rig,
    a_worker,
    lives,
    patiently,
    rig,
)
from integration.harness import Service, wait_for

pytestmark = [pytest.mark.processes, pytest.mark.timeout(200)]

ROWS = 1_500
"""Three seconds or so for two workers of one core each."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """One worker on processes and one on Ray."""
    folder = tmp_path_factory.mktemp("faults")
    with rig(folder, plain="--executor process --cpus 1", ray="--executor ray --cpus 1") as made:
        yield made


def status_lines(pid: int, *names: str) -> list[dict[str, str]]:
    """Those lines of the kernel's status of each thread."""
    found: list[dict[str, str]] = []
    for thread in Path(f"/proc/{pid}/task").iterdir():
        lines = dict(line.split(":\t", 1) for line in (thread / "status").read_text().splitlines() if ":\t" in line)
        found.append({name: lines[name] for name in names})
    return found


def test_every_thread_of_every_engine_child_is_locked_in_and_rays_are_below_ray(made: Rig) -> None:
    work = made.work(ROWS)
    work.begun()
    for name in ("plain", "ray"):
        service = made.workers[name]

        def busy(service: Service = service) -> list[psutil.Process]:
            found = made.find(ENGINE_CHILD, service)
            return [child for child in found if child.num_threads() > 1 and child.cpu_times().user > 0.3]

        for child in wait_for(busy, PATIENCE_S, f"engine children of {name}"):
            locked = status_lines(child.pid, "Seccomp", "NoNewPrivs")
            assert locked and all(one == {"Seccomp": "2", "NoNewPrivs": "1"} for one in locked), locked
            above = [" ".join(parent.cmdline()) for parent in child.parents()]
            assert any(ACTOR in command for command in above) is (name == "ray"), above
    work.check()


def test_an_engine_child_that_is_killed_costs_its_shard_alone(made: Rig) -> None:
    work = made.work(2 * ROWS, seed=1)
    work.begun()
    plain = made.workers["plain"]
    for _ in range(8):  # a kill may fall between two leases, when no shard is at work
        wait_for(
            lambda: any(child.status() == "running" for child in made.find(ENGINE_CHILD, plain)), PATIENCE_S, "work"
        )
        made.kill(ENGINE_CHILD, plain)
        deadline = time.monotonic() + 1
        while time.monotonic() < deadline and "engine.shard_again" not in plain.tail(10**6):
            time.sleep(0.02)
        if "engine.shard_again" in plain.tail(10**6):
            break
    work.check()
    assert "engine.shard_again" in plain.tail(10**6), "it was at work when it was killed"


def test_inline_outputs_survive_a_killed_engine_child_below_ray(made: Rig) -> None:
    work = made.work(ROWS, NARROW, seed=2)
    work.begun()
    made.kill(ENGINE_CHILD, made.workers["ray"])
    work.check()


@pytest.mark.parametrize("word", [RAYLET, *(pytest.param(word, marks=pytest.mark.slow) for word in (ACTOR, DRIVER))])
def test_work_below_a_killed_ray_is_redone_and_ray_comes_back(made: Rig, word: str) -> None:
    work = made.work(2 * ROWS, seed=3)
    work.begun()
    ray = made.workers["ray"]
    wait_for(lambda: made.find(ENGINE_CHILD, ray), PATIENCE_S, "Ray at work")
    victims = made.kill(word, ray)
    made.restarted(word, victims, ray)
    work.check()
    assert "ray.lost" in ray.tail(10**6) or word == ACTOR


@pytest.mark.parametrize("word", [BLOBS, FOLLOWER])
def test_a_killed_child_of_the_coordinator_comes_back_and_the_job_goes_on(made: Rig, word: str) -> None:
    work = made.work(ROWS, seed=5)
    work.begun()
    victims = made.kill(word, made.service)
    assert made.restarted(word, victims, made.service) < 5
    work.check()


def test_an_operator_worker_killed_in_mid_inspection_inspects_again(made: Rig) -> None:
    bundle = made.bundle(NARROW, steps=50)
    work = made.work(100, NARROW, steps=50)

    def inspecting() -> list[psutil.Process]:
        [*operators] = made.find(OPERATOR, made.service)
        children = [child for operator in operators for child in operator.children(recursive=True)]
        return [child for child in children if '"kind":"inspect"' in " ".join(child.cmdline())]

    children = wait_for(inspecting, PATIENCE_S, "an inspection")
    victims = made.kill(OPERATOR, made.service)
    wait_for(lambda: not any(lives(child) for child in children), 10, "the end of what inspected")
    assert made.restarted(OPERATOR, victims, made.service) < 5
    work.check()
    state = made.client.bundle_state(bundle.digest)
    assert state is not None and state.state == "accepted"


@pytest.mark.slow
def test_rows_of_a_killed_worker_are_redone_by_the_others(made: Rig) -> None:
    with a_worker(made, "doomed", "--executor", "process", "--cpus", "1") as doomed:
        wait_for(lambda: made.online() == 3, PATIENCE_S, "a third worker")
        work = made.work(ROWS, seed=6)
        wait_for(lambda: made.find(ENGINE_CHILD, doomed), PATIENCE_S, "work on the third worker")
        family = doomed.family()
        made.seen.update(family)
        doomed.kill()
        wait_for(lambda: not any(lives(process) for process in family), 10, "the end of what was below it")
    work.check()


def test_a_killed_coordinator_comes_back_and_nobody_notices_but_the_clock(made: Rig) -> None:
    wide, narrow = made.work(ROWS, seed=7), made.work(ROWS // 2, NARROW, seed=8)
    wide.begun()
    settled = wide.job.status().progress.rows_done
    made.kill_coordinator()
    made.restart_coordinator()
    assert wide.job.status().progress.rows_done >= settled, "what was settled stays settled"
    patiently(lambda: made.online() == 2, "both workers to be back")
    wide.check()
    narrow.check()


SUBMIT = """
import sys
from pathlib import Path
from fallow.client.blocking import connect
from integration.fault_rig import rows_of, turning_bundle
credentials, folder, key = sys.argv[1:]
folder = Path(folder)
folder.mkdir()
with connect(credentials) as client:
    bundle = turning_bundle(folder, 8)
    print("ready", flush=True)
    sys.stdin.readline()
    print(client.map(bundle, {"x": rows_of(60)}, data="public", idempotency_key=key).id, flush=True)
"""


def client_process(script: str, *arguments: str) -> subprocess.Popen[str]:
    """A Python process with the tests' modules at hand."""
    tests = Path(__file__).parents[1]
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tests)},
    )


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_two_processes_that_submit_the_same_at_once_get_one_job(made: Rig, tmp_path: Path) -> None:
    credentials = made.service.facts["client_credentials"]
    clients = [client_process(SUBMIT, credentials, str(tmp_path / str(n)), "twice-the-same-key") for n in range(2)]
    try:
        assert [line_of(client) for client in clients] == ["ready", "ready"]
        for client in clients:
            assert client.stdin is not None
            client.stdin.write("\n")
            client.stdin.flush()
        ids = [line_of(client) for client in clients]
    finally:
        for client in clients:
            client.communicate(timeout=60)
    assert ids[0] and ids[0] == ids[1]
    assert made.client.job(ids[0]).wait().progress.rows_done == 60


UPLOAD = """
import sys
from pathlib import Path
import numpy as np
from fallow.client.blocking import connect
from integration.fault_rig import FEATURES, turning_bundle
credentials, folder = sys.argv[1:]
folder = Path(folder)
folder.mkdir()
with connect(credentials) as client:
    rows = np.ones((150_000, FEATURES), np.float32)
    rows[:, 0] = np.arange(len(rows))
    client.map(turning_bundle(folder, 8), {"x": rows}, data="public", on_rows=lambda n: print(n, flush=True))
"""
WATCH = """
import sys
from fallow.client.blocking import connect
with connect(sys.argv[1]) as client:
    for row in client.job(sys.argv[2]).results(order="any"):
        print(row.position, flush=True)
"""


def test_a_client_killed_in_mid_upload_leaves_no_job_and_hurts_nobody(made: Rig, tmp_path: Path) -> None:
    before = {job.job_id for job in made.client.jobs()}
    client = client_process(UPLOAD, made.service.facts["client_credentials"], str(tmp_path / "up"))
    assert int(line_of(client)) > 0, "some blocks are there and others are not"
    client.kill()
    client.communicate(timeout=60)
    assert {job.job_id for job in made.client.jobs()} == before
    made.work(60, NARROW).check()


def test_a_client_killed_in_mid_watch_loses_nothing(made: Rig) -> None:
    work = made.work(ROWS, NARROW, seed=9)
    client = client_process(WATCH, made.service.facts["client_credentials"], work.job.id)
    assert line_of(client).isdigit()
    client.send_signal(signal.SIGKILL)
    client.communicate(timeout=60)
    with connect(made.service.facts["client_credentials"]) as another:
        work.job = another.job(work.job.id)
        work.check()
