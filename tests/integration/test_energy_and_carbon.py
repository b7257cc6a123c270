"""Energy and carbon over real processes: a job's energy on its receipt, and one that waits until the figures change."""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine_models import dense_model
from fallow.bundle_file import Bundle
from fallow.client.blocking import connect
from fallow.job import JobOptions, JobState, JobStatus, Objective
from integration.harness import coordinator, wait_for, worker

pytestmark = [pytest.mark.processes, pytest.mark.timeout(240)]

PATIENCE_S = 60.0


def table(path: Path, *, dirty_now: bool) -> None:
    """A day's figures, at once: 300 g/kWh in this hour and the next, 100 later; or 100 throughout."""
    hour = datetime.datetime.now(datetime.UTC).hour
    dirty = {hour, (hour + 1) % 24} if dirty_now else set()
    lines = [f"world,{number},{300 if number in dirty else 100}" for number in range(24)]
    fresh = path.with_suffix(".new")
    fresh.write_text("\n".join(("# a test", "region,hour_of_year,grams_per_kwh", *lines)) + "\n")
    fresh.replace(path)


def shown(job_id: str, login: str) -> dict[str, Any]:
    """What `fallow job show` says."""
    command = [sys.executable, "-m", "fallow.cli", "job", "show", job_id, "--login", login, "--json"]
    done = subprocess.run(command, capture_output=True, timeout=60, check=True)
    facts: dict[str, Any] = json.loads(done.stdout)
    return facts


def test_a_job_tells_its_energy_and_one_that_may_wait_waits_for_a_clean_hour(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    table(state / "carbon.csv", dirty_now=True)
    model = tmp_path / "model.onnx"
    model.write_bytes(dense_model(features=2))
    rows = {"x": np.arange(40, dtype=np.float32).reshape(20, 2)}
    with coordinator(state) as service:
        line = service.new_token("--role", "worker", "--tier", "operator")
        arguments = ("--tasks", "inspect,map", "--executor", "process", "--region", "here")
        login = service.facts["client_credentials"]
        with worker(service, tmp_path / "worker", *arguments, join_line=line), connect(login) as client:
            bundle = Bundle.from_onnx(model)
            soon = client.map(bundle, rows, data="public")
            assert soon.wait().state is JobState.SUCCEEDED
            energy = shown(soon.id, login)["energy"]
            assert energy["joules"] > 0 and energy["joules_per_1000_rows"] == pytest.approx(
                energy["joules"] / 20 * 1000
            )
            assert energy["grams_co2"] == pytest.approx(energy["joules"] / 3.6e6 * 300, abs=1e-6)
            assert 0 <= energy["share_measured"] <= 1

            in_ten_hours_ms = int((time.time() + 10 * 3_600) * 1_000)
            clean = client.map(
                bundle, rows, data="public", options=JobOptions(objective=Objective.CARBON, deadline_ms=in_ten_hours_ms)
            )

            def waiting() -> JobStatus | None:
                status = clean.status()
                return status if status.deferred_until_ms > time.time() * 1_000 else None

            waits = wait_for(waiting, PATIENCE_S, "the job to wait")
            assert waits.reason_code == "DEFERRED" and "100 g/kWh then, 300 g/kWh now" in waits.reason
            assert shown(clean.id, login)["deferred_until_ms"] == waits.deferred_until_ms

            table(state / "carbon.csv", dirty_now=False)
            assert clean.wait().state is JobState.SUCCEEDED
            assert clean.status().footprint.millijoules > 0


def test_a_bad_table_is_refused_at_the_start_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text("region,hour_of_year,grams_per_kwh\nde,0,100\nde,1,many\n")
    command = [sys.executable, "-m", "fallow_coordinator", "start", "--state", str(tmp_path / "state"), "--port", "0"]
    done = subprocess.run([*command, "--carbon", str(path)], capture_output=True, timeout=60, check=False)
    told = done.stderr.decode()
    assert done.returncode == 1 and "Traceback" not in told
    assert f"{path}, line 3: grams_per_kwh is 'many'" in told
