"""Quotes and variants over real processes: what is told before a job, and what forms of a program give on a worker."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from engine_models import dense_model
from fallow.bundle import VariantForm
from fallow.bundle_file import Bundle
from fallow.client.blocking import Client, connect
from integration.harness import CoordinatorService, worker

pytestmark = [pytest.mark.processes, pytest.mark.timeout(240)]

FEATURES = 64
ROWS = 200


@pytest.fixture(scope="module")
def client(shared_coordinator: CoordinatorService, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A client whose jobs one worker inspects and runs."""
    line = shared_coordinator.new_token("--role", "worker", "--tier", "operator")
    arguments = ("--tasks", "inspect,map", "--executor", "process")
    with (
        worker(shared_coordinator, tmp_path_factory.mktemp("worker"), *arguments, join_line=line),
        connect(shared_coordinator.facts["client_credentials"]) as client,
    ):
        yield client


def test_forms_of_a_program_are_quoted_chosen_and_run(client: Client, tmp_path: Path) -> None:
    model = tmp_path / "dense.onnx"
    model.write_bytes(dense_model(features=FEATURES, hidden=256, outputs=8))
    rows = np.random.default_rng(3).standard_normal((ROWS, FEATURES), dtype=np.float32)
    bundle = Bundle.from_onnx(model).optimized("fp16", "int8", "int8-fixed", samples=rows, fixed_rows=4)
    quote = client.quote(bundle, rows, data="public", accept=["fp16", "int8", "int8-fixed"])
    forms = {quote.form, *(other.form for other in quote.alternatives)}
    assert forms == {"fp32", "fp16", "int8", "int8-fixed"}, quote.warnings
    for each in (quote, *quote.alternatives):
        assert (each.rows, each.pool_mode, each.price_microcredits, each.policy) == (ROWS, "donation", 0, "unverified")
        assert each.workers_fitting == 1
        assert 0 < each.unit_micros < ROWS * 10_000
        assert each.end_at_ms > 0 and each.run_ms > 0 and each.millijoules > 0
    exact = client.map(bundle, rows, data="public").table().column("y").to_pylist()
    for form in (VariantForm.FP16, VariantForm.INT8, VariantForm.INT8_FIXED):
        found = next(v.agreement for v in bundle.manifest.variants if v.form is form)
        given = client.map(bundle.variants[form], rows, data="public").table().column("y").to_pylist()
        apart = np.abs(np.array(exact) - np.array(given)).max()
        assert 0 < apart <= 1.05 * found.error_max, f"{form}: {apart}, {found}"


def test_the_command_tells_who_could_do_it(
    shared_coordinator: CoordinatorService, client: Client, tmp_path: Path
) -> None:
    (tmp_path / "dense.onnx").write_bytes(dense_model(features=FEATURES))
    np.save(tmp_path / "rows.npy", np.zeros((ROWS, FEATURES), np.float32))
    login = ("--login", shared_coordinator.facts["client_credentials"])

    def quoted(*words: str) -> subprocess.CompletedProcess[bytes]:
        command = [sys.executable, "-m", "fallow.cli", "job", "quote", "dense.onnx", "rows.npy", "--data", "public"]
        return subprocess.run([*command, *login, *words], cwd=tmp_path, check=False, capture_output=True, timeout=120)

    done = quoted()
    assert done.returncode == 0, done.stderr.decode()
    assert "price     nothing: workers of this pool donate" in done.stdout.decode()
    assert "0 % more work" in done.stdout.decode()
    done = quoted("--device", "gpu", "--deadline", "24h", "--json")
    facts = json.loads(done.stdout)
    assert facts["workers_fitting"] == 0
    assert {short["code"] for short in facts["fallen_out"]} >= {"device-kind"}
    assert "no worker can take this job now" in facts["warnings"][0]
