"""Workers that die, freeze, drain or lose their coordinator in mid-job: every row comes once, and is right."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from numpy.typing import NDArray

from fallow.bundle_file import Bundle
from fallow.client.blocking import Client, Job, connect
from fallow.job import JobState
from integration.harness import CoordinatorService, Service, coordinator, start_coordinator, wait_for, worker
from integration.slow_bundle import expected, rows_of, slow_bundle

pytestmark = [pytest.mark.processes, pytest.mark.timeout(240)]

ROWS = 1_500
PATIENCE_S = 90.0
HEARTBEAT = ("--heartbeat", "1s")


@contextlib.contextmanager
def a_client(service: CoordinatorService) -> Iterator[Client]:
    with connect(service.facts["client_credentials"]) as client:
        yield client


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CoordinatorService]:
    """One coordinator with its operator worker for the tests that do it no harm: it inspects the bundle once."""
    with coordinator(tmp_path_factory.mktemp("coordinator"), *HEARTBEAT, operator_worker=True) as service:
        yield service


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return slow_bundle(tmp_path_factory.mktemp("bundle"))


def status_of(folder: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "fallow_worker", "status", "--state", str(folder), "--json"],
        capture_output=True, timeout=60, check=True,
    )  # fmt: skip
    status: dict[str, Any] = json.loads(done.stdout)
    return status


def counted(folder: Path, name: str) -> int:
    """A count of the worker's own status file, read without a process of its own."""
    with contextlib.suppress(OSError, ValueError):
        return int(json.loads((folder / "status.json").read_text())["counts"][name])
    return 0


def in_mid_job(job: Job, *folders: Path) -> None:
    """Returns when every named worker holds a lease of a job that is neither fresh nor done."""

    def begun() -> bool:
        state = job.status().state
        assert state not in {JobState.SUCCEEDED, JobState.FAILED}, "the job ended before anything could go wrong"
        return all(counted(folder, "leases") > 0 for folder in folders)

    wait_for(begun, PATIENCE_S, "work to begin")


def not_done(job: Job) -> None:
    """The fault came in time to matter."""
    assert job.progress().rows_done < ROWS


def check(job: Job, rows: NDArray[np.float32]) -> None:
    """The job has every row exactly once, bit for bit."""
    status = job.wait()
    assert status.state is JobState.SUCCEEDED
    assert status.progress.rows_done == len(rows)
    table = job.table()
    assert table.num_rows == len(rows)
    assert table.column("fallow.row").to_pylist() == list(range(len(rows)))
    got = table.column("y").combine_chunks().flatten().to_numpy().reshape(len(rows), -1)
    assert np.array_equal(got, expected(rows))


@pytest.mark.slow
def test_rows_of_a_killed_worker_are_redone_by_another(
    service: CoordinatorService, bundle: Bundle, tmp_path: Path
) -> None:
    first, second = tmp_path / "w1", tmp_path / "w2"
    with (
        worker(service, first) as doomed,
        worker(service, second),
        a_client(service) as client,
    ):
        rows = rows_of(ROWS)
        job = client.map(bundle, {"x": rows}, data="public")
        in_mid_job(job, first)
        family = doomed.family()
        doomed.kill()
        not_done(job)
        check(job, rows)
        _, left = psutil.wait_procs(family, timeout=10)
        assert not left, "engine children end with their daemon"


@pytest.mark.slow
@pytest.mark.slow
def test_a_frozen_worker_loses_its_leases_and_comes_back_clean(
    service: CoordinatorService, bundle: Bundle, tmp_path: Path
) -> None:
    first, second = tmp_path / "w1", tmp_path / "w2"
    with (
        worker(service, first) as frozen,
        worker(service, second),
        a_client(service) as client,
    ):
        rows = rows_of(ROWS)
        job = client.map(bundle, {"x": rows}, data="public")
        in_mid_job(job, first)
        for process in frozen.family():
            process.suspend()
        try:
            not_done(job)
            check(job, rows)
        finally:
            for process in frozen.family():
                process.resume()
        wait_for(
            lambda: status_of(first)["session"] == "online" and not status_of(first)["leases"],
            PATIENCE_S,
            "the woken worker to be back with nothing in its hands",
        )
        assert frozen.running()
        again = rows_of(ROWS // 4)
        check(client.map(bundle, {"x": again}, data="public"), again)


def test_a_worker_told_to_stop_delivers_what_runs_and_loses_nothing(
    service: CoordinatorService, bundle: Bundle, tmp_path: Path
) -> None:
    first, second = tmp_path / "w1", tmp_path / "w2"
    with (
        worker(service, first) as leaving,
        worker(service, second),
        a_client(service) as client,
    ):
        rows = rows_of(ROWS)
        job = client.map(bundle, {"x": rows}, data="public")
        in_mid_job(job, first)
        not_done(job)
        assert leaving.stop(signal.SIGTERM) == 0
        counts = status_of(first)["counts"]
        assert counts["settled"] == counts["roots"] == counts["commitments"], "what ran was delivered and settled"
        check(job, rows)


@pytest.mark.slow
def test_a_killed_coordinator_comes_back_and_the_job_goes_on(bundle: Bundle, tmp_path: Path) -> None:
    folder = tmp_path / "w1"
    with contextlib.ExitStack() as stack:
        service = start_coordinator(tmp_path / "c", *HEARTBEAT, operator_worker=True)
        stack.callback(lambda: service.discard())  # noqa: PLW0108 - whichever is the last
        daemon = stack.enter_context(worker(service, folder))
        client = stack.enter_context(a_client(service))
        rows = rows_of(ROWS)
        job = client.map(bundle, {"x": rows}, data="public")
        in_mid_job(job, folder)
        not_done(job)
        service.kill()
        service = start_coordinator(tmp_path / "c", *HEARTBEAT, operator_worker=True)
        check(job, rows)
        assert daemon.running()
        wait_for(lambda: not status_of(folder)["leases"], PATIENCE_S, "the last settlement to be told")
        counts = status_of(folder)["counts"]
        assert counts["sessions"] == 2
        assert counts["leases"] == counts["roots"] == counts["settled"], "what was held was kept: nothing was redone"


@pytest.mark.slow
@pytest.mark.slow
def test_a_killed_blob_service_is_waited_for(service: CoordinatorService, bundle: Bundle, tmp_path: Path) -> None:
    folder = tmp_path / "w1"
    with (
        worker(service, folder),
        a_client(service) as client,
    ):
        rows = rows_of(ROWS)
        job = client.map(bundle, {"x": rows}, data="public")
        in_mid_job(job, folder)
        kill(service, "fallow_coordinator.blobs")
        not_done(job)
        check(job, rows)


@pytest.mark.slow
@pytest.mark.slow
def test_a_killed_engine_child_costs_a_retry_and_no_more(
    service: CoordinatorService, bundle: Bundle, tmp_path: Path
) -> None:
    folder = tmp_path / "w1"
    with (
        worker(service, folder) as daemon,
        a_client(service) as client,
    ):
        rows = rows_of(ROWS)
        job = client.map(bundle, {"x": rows}, data="public")
        in_mid_job(job, folder)
        kill(daemon, "engine/child.py")
        not_done(job)
        check(job, rows)
        assert daemon.running()


def kill(service: Service, command_part: str) -> None:
    """`kill -9` of the processes below a service whose command line has this part."""

    def found() -> list[psutil.Process]:
        return [process for process in service.family() if command_part in " ".join(process.cmdline())]

    victims = wait_for(found, PATIENCE_S, command_part)
    for process in victims:
        os.kill(process.pid, signal.SIGKILL)
