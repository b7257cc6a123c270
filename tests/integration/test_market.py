"""A market with real processes: asks, a budget that runs out, a top-up, pay that adds up; donation stays free."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine_models import FEATURES, dense_model
from fallow.bundle_file import Bundle
from fallow.client.account import Statement
from fallow.client.blocking import Client, connect
from fallow.errors import FallowError, Reason
from fallow.job import JobOptions, JobState, JobStatus
from integration.harness import CoordinatorService, coordinator, wait_for, worker

pytestmark = [pytest.mark.processes, pytest.mark.timeout(300)]

PATIENCE_S = 120
ROWS = {"x": np.random.default_rng(7).random((2_000, FEATURES), np.float32)}
START = ("--executor", "process", "--cpus", "1", "--slots", "1")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CoordinatorService]:
    """A coordinator with an operator worker that inspects and checks."""
    with coordinator(tmp_path_factory.mktemp("market"), "--heartbeat", "1s", operator_worker=True) as service:
        yield service


def said(module: str, *arguments: str) -> str:
    """What a command says on standard output. Fails the test when it fails."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], capture_output=True, timeout=60, check=False, text=True
    )
    assert done.returncode == 0, f"{arguments}: {done.stderr}"
    return done.stdout


def refused(place: CoordinatorService, *arguments: str) -> str:
    """What a refused operator's command says."""
    done = place.cli_raw(*arguments)
    assert done.returncode == 1, done.stdout
    return done.stderr.decode()


def settled(client: Client, job_id: str) -> JobStatus:
    """The job once it has ended or waits for its owner."""
    job = client.job(job_id)
    last = {JobState.PAUSED, JobState.SUCCEEDED, JobState.FAILED}
    wait_for(lambda: job.status().state in last, PATIENCE_S, f"job {job_id} to end or pause: {job.status()}")
    return job.status()


def viewed_statement(client: Client) -> Statement:
    """The statement once the views show the end of all work: nothing is held."""
    wait_for(lambda: client.statement().closing.get("held", 0) == 0, PATIENCE_S, "the views to show the job's end")
    return client.statement()


def earned(folder: Path) -> dict[str, Any]:
    """What `fallow-worker earnings --json` says."""
    found: dict[str, Any] = json.loads(said("fallow_worker", "earnings", "--state", str(folder), "--json"))
    return found


def test_donation_is_free_then_a_market_pays_pauses_and_adds_up(place: CoordinatorService, tmp_path: Path) -> None:
    account_id, login = place.operator.account_id, place.facts["client_credentials"]
    model = tmp_path / "model.onnx"
    model.write_bytes(dense_model(hidden=512))
    cheap, dear = tmp_path / "cheap", tmp_path / "dear"
    (pool,) = place.cli("pool", "list")["pools"]
    with (
        worker(place, cheap, *START, "--ask", "3600"),
        worker(place, dear, *START, "--ask", "7200"),
        connect(login) as client,
    ):
        bundle = Bundle.from_onnx(model)
        free = client.map(bundle, ROWS, data="public").wait()
        assert (pool["mode"], free.spent_microcredits, free.budget_microcredits) == ("donation", 0, 0)

        place.cli("pool", "set-mode", pool["pool_id"], "market")
        with pytest.raises(FallowError) as caught:
            client.map(bundle, ROWS, data="public", options=JobOptions(budget_microcredits=1_000))
        assert caught.value.reason is Reason.INSUFFICIENT_CREDITS
        for amount in ("nan", "1e99", "0", "0.0000001"):
            assert "allowed" in refused(place, "credits", "grant", account_id, amount)
        again = ("credits", "grant", account_id, "10", "--note", "a start", "--transfer-id", "ab" * 16)
        assert [place.cli(*again)["repeated"] for _ in range(2)] == [False, True]

        job = client.map(bundle, ROWS, data="public", options=JobOptions(budget_microcredits=50))
        paused = settled(client, job.id)
        assert (paused.state, paused.reason_code) == (JobState.PAUSED, "BUDGET_EXHAUSTED")
        assert f"fallow job topup {job.id}" in paused.reason
        assert client.balances().held_microcredits == 50
        said("fallow.cli", "job", "topup", job.id, "1", "--login", login)
        done = settled(client, job.id)
        assert (done.state, done.progress.rows_done) == (JobState.SUCCEEDED, len(ROWS["x"]))
        assert 0 < done.spent_microcredits <= done.budget_microcredits == 1_000_050

        statement, balances = viewed_statement(client), client.balances()
        assert balances.available_microcredits == 10_000_000 - done.spent_microcredits
        for book, total in statement.closing.items():
            assert sum(line.microcredits for line in statement.lines if line.book == book) == total
        assert statement.closing["available"] == balances.available_microcredits
        sheet = said("fallow.cli", "account", "statement", "--csv", "--login", login)
        rows = list(csv.DictReader(io.StringIO(sheet)))
        assert [row["what"] for row in rows][:3] == ["grant", "budget", "budget"]

        earnings = [earned(cheap), earned(dear)]
        assert sum(one["microcredits"] for one in earnings) == done.spent_microcredits
        assert sum(one["pending_microcredits"] for one in earnings) == done.spent_microcredits
        contributed = sum(one["contribution_microcredits"] for one in earnings)
        assert contributed == sum(one["worker_contribution_microcredits"] for one in earnings) > 0
        paid = next(one for one in earnings if one["microcredits"])
        released = place.cli("credits", "release", paid["account_id"], "--note", "looked right")
        assert int(released["released_microcredits"]) == paid["pending_microcredits"]
        (prices,) = place.cli("prices")["prices"]
        assert (prices["device_class"], prices["workers_asking"]) == ("cpu", 2)
        assert 1_000_000 <= int(prices["median_microcredits_per_unit"]) <= 2_000_000

        limited = client.map(
            bundle, ROWS, data="public", options=JobOptions(budget_microcredits=1_000, limit_microcredits_per_unit=10)
        )
        wait_for(lambda: limited.status().reason_code == "LIMIT_BELOW_ASKS", PATIENCE_S, "the asks to be told")
        assert "0.036" in limited.status().reason
        said("fallow_worker", "ask", "0.03", "--state", str(cheap))
        wait_for(lambda: limited.status().state is JobState.SUCCEEDED, PATIENCE_S, "the lower ask to be taken")
