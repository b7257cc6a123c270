"""Cheaters as real workers over the real protocol: each is found by rows it gave, and no such row reaches anybody."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from adversarial.cheating_daemon import CHEATS
from engine_models import FEATURES, dense_model
from fallow.bundle_file import Bundle
from fallow.certificate_check import authority_fingerprint, check_certificate
from fallow.client.blocking import connect
from fallow.identity import load_certificate
from fallow.job import JobState
from integration.harness import CoordinatorService, Service, coordinator, spawn, wait_for, worker

pytestmark = [pytest.mark.processes, pytest.mark.timeout(300)]

PATIENCE_S = 120
ROWS = {"x": np.random.default_rng(11).random((64, FEATURES), np.float32)}
START = ("--executor", "process", "--cpus", "1", "--slots", "1")
TESTS = Path(__file__).resolve().parent.parent
IN_THE_FAST_TIER = ("skips-50",)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[CoordinatorService, Path]]:
    """A coordinator whose operator worker inspects and referees, and a bundle of its own."""
    folder = tmp_path_factory.mktemp("cheaters")
    (folder / "model.onnx").write_bytes(dense_model())
    with coordinator(folder / "state", "--heartbeat", "1s", operator_worker=True) as service:
        yield service, folder
        assert "Traceback" not in service.log.read_text(errors="replace")


@contextmanager
def cheater(place: CoordinatorService, folder: Path, cheat: str) -> Iterator[Service]:
    """A daemon that cheats, joined with a token of its own."""
    folder.mkdir(parents=True)
    line = place.new_token("--role", "worker", "--tier", "volunteer")
    join = [sys.executable, "-m", "fallow_worker", "join", line, "--state", str(folder), "--name", f"cheat-{cheat}"]
    subprocess.run(join, capture_output=True, timeout=60, check=True)
    environment = {"PYTHONPATH": os.pathsep.join((str(TESTS), os.environ.get("PYTHONPATH", "")))}
    log = folder / "worker.log"
    process = spawn(
        ["-m", "fallow_coordinator.attended", "adversarial.cheating_daemon", cheat, "start", "--state", str(folder),
         *START], log, environment,
    )  # fmt: skip
    service = Service("cheater", process, log)
    try:
        yield service
    finally:
        service.discard()


@contextmanager
def honest(place: CoordinatorService, folder: Path) -> Iterator[Service]:
    line = place.new_token("--role", "worker", "--tier", "volunteer")
    with worker(place, folder, *START, join_line=line) as service:
        yield service


@pytest.mark.parametrize(
    "cheat", [pytest.param(name, marks=() if name in IN_THE_FAST_TIER else pytest.mark.slow) for name in CHEATS]
)
def test_cheater_is_found_and_its_rows_reach_nobody(
    place: tuple[CoordinatorService, Path], tmp_path: Path, cheat: str
) -> None:
    service, folder = place
    login = service.facts["client_credentials"]
    with connect(login) as client, cheater(service, tmp_path / "cheater", cheat):
        job = client.map(
            Bundle.from_onnx(folder / "model.onnx"), ROWS, data="public", title=cheat, assurance="standard"
        )
        wait_for(lambda: job.status().progress.rows_done, PATIENCE_S, f"the cheater to do rows: {job.status()}")
        with honest(service, tmp_path / "honest"):
            wait_for(lambda: job.status().state is JobState.SUCCEEDED, PATIENCE_S, f"the job to end: {job.explain()}")
            rows = np.array(job.table().column("y").to_pylist(), np.float32)
            certificate = job.certificate().facts
    authority = authority_fingerprint(load_certificate((Path(login) / "authority.pem").read_bytes()))
    checked = check_certificate(certificate, authority)
    verification: Any = certificate["verification"]
    wrong = {one["verdict"] for one in verification["verdicts"]}
    assert "proven-wrong" in wrong, verification
    assert checked.rows_withdrawn > 0
    assert len(verification["distrusted"]) == 1
    honest_rows = onnxruntime.InferenceSession(dense_model()).run(None, ROWS)[0]
    assert np.allclose(rows, honest_rows, rtol=1e-5, atol=1e-6), "half a percent of an fp16 row would show"
