"""Verified results with real processes: an honest fleet passes every draw, a cheating worker is caught and undone."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from engine_models import FEATURES, dense_model
from fallow.bundle_file import Bundle
from fallow.client.blocking import connect
from fallow.job import JobState
from fallow.machine_identity import MACHINE_VARIABLE
from integration.harness import CoordinatorService, Service, coordinator, spawn, wait_for, worker

pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.timeout(300)]

PATIENCE_S = 120
START = ("--executor", "process", "--cpus", "1", "--slots", "1")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CoordinatorService]:
    """A coordinator with an operator worker that inspects and referees."""
    with coordinator(tmp_path_factory.mktemp("verified"), "--heartbeat", "1s", operator_worker=True) as service:
        yield service


@contextlib.contextmanager
def cheating(place: CoordinatorService, folder: Path) -> Iterator[Service]:
    """A worker that has joined and alters every row, while the block runs."""
    folder.mkdir(parents=True)
    joined = subprocess.run(
        [sys.executable, "-m", "fallow_worker", "join", volunteer_line(place), "--state", str(folder)],
        capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    assert joined.returncode == 0, joined.stderr.decode()
    tests = str(Path(__file__).parent.parent)
    process = spawn(
        ["-m", "fallow_coordinator.attended", "integration.cheating_worker", "start", "--state", str(folder), *START],
        folder / "worker.log",
        {
            "PYTHONPATH": os.pathsep.join(filter(None, (tests, os.environ.get("PYTHONPATH", "")))),
            MACHINE_VARIABLE: folder.name,
        },
    )
    service = Service("cheating worker", process, folder / "worker.log")
    try:
        yield service
    finally:
        service.discard()


def volunteer(place: CoordinatorService, folder: Path) -> contextlib.AbstractContextManager[Service]:
    """A worker of an account, with a token and, as far as it tells, on a machine of its own."""
    elsewhere = {MACHINE_VARIABLE: folder.name}
    return worker(place, folder, *START, join_line=volunteer_line(place), environment=elsewhere)


def volunteer_line(place: CoordinatorService) -> str:
    """A join line of its own: who shares a token audits nobody of it."""
    return place.new_token("--role", "worker", "--tier", "volunteer")


def test_honest_fleet_passes_every_draw_and_a_cheating_worker_is_caught(
    place: CoordinatorService, tmp_path: Path
) -> None:
    model, rows, out = tmp_path / "model.onnx", tmp_path / "rows.npy", tmp_path / "out.parquet"
    model.write_bytes(dense_model(hidden=64))
    given = np.random.default_rng(7).random((300, FEATURES), np.float32)
    np.save(rows, given)
    login = place.facts["client_credentials"]
    with volunteer(place, tmp_path / "one"), volunteer(place, tmp_path / "two"), connect(login) as client:
        wait_for(lambda: connected(place) >= 3, PATIENCE_S, "the fleet to be there")
        done = subprocess.run(
            [sys.executable, "-m", "fallow.cli", "map", str(model), str(rows), "--data", "public",
             "--assurance", "standard", "-o", str(out), "--login", login, "--json"],
            capture_output=True, timeout=PATIENCE_S, check=False, text=True,
        )  # fmt: skip
        assert done.returncode == 0, f"{done.stderr}\n{place.tail()}"
        status = client.job(json.loads(done.stdout.splitlines()[-1])["job_id"]).status()
        assert (status.state, status.policy) == (JobState.SUCCEEDED, "assurance standard")
        checks = status.checks
        assert checks is not None
        assert (checks.rows_drawn, checks.rows_passed, checks.rows_wrong) == (300, 300, 0)
        assert 0 < checks.rows_by_referee < 300
        assert out.exists() and not distrusted(place)

    with cheating(place, tmp_path / "cheat") as cheat, connect(login) as client:
        job = client.map(Bundle.from_onnx(model), {"x": given}, data="public", assurance="standard")
        wait_for(lambda: job.status().progress.rows_done, PATIENCE_S, f"the cheating worker to answer\n{cheat.tail()}")
        assert job.status().state is JobState.VERIFYING
        with volunteer(place, tmp_path / "three"):
            finished, table = job.wait(), job.table()
    assert finished.state is JobState.SUCCEEDED
    expected = pq.read_table(out)
    for name in set(table.column_names) & set(expected.column_names):
        assert table.column(name).to_pylist() == expected.column(name).to_pylist(), cheat.tail()
    checks = finished.checks
    assert checks is not None and checks.rows_wrong > 0
    # All of them once, and those that it gave once more before it was proven wrong.
    assert checks.rows_withdrawn >= 300
    (why,) = distrusted(place)
    assert f"a row of job {job.id} is proven wrong" in why


def connected(place: CoordinatorService) -> int:
    return sum(bool(one.get("connected")) for one in place.cli("worker", "list")["workers"])


def distrusted(place: CoordinatorService) -> list[str]:
    workers = place.cli("worker", "list")["workers"]
    return [one["distrusted_reason"] for one in workers if one.get("distrusted_reason")]
