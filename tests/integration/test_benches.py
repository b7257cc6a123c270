"""The benches run, count what they measured, and say when a run does not count."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent

pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.assets, pytest.mark.timeout(600)]


def bench(*arguments: str) -> tuple[int, dict[str, Any]]:
    """The exit status and what stands on stdout."""
    command = [sys.executable, "-m", "scripts.benches", *arguments, "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    assert done.stdout.count("\n") == 1, f"not one object: {done.stdout!r}\n{done.stderr}"
    found: dict[str, Any] = json.loads(done.stdout)
    return done.returncode, found


def test_inference_compares_with_raw_and_counts_its_work() -> None:
    status, found = bench("inference", "--pairs", "1", "--rows", "256")
    (pair,) = found["pairs"]
    for name in ("bytes_fetched", "roots_hashed", "commits", "commitments"):
        assert pair[name] > 0, name
    assert pair["labels_differing"] == 0
    assert found["ratio_to_raw"] > 0.2
    assert found["raw_setting"]["batch_rows"] in {1, 2, 4, 8, 16, 32}
    assert (status, found["void"]) == (1, ["1 pairs, fewer than 7"])
    assert not found["holds"]


def test_latency_measures_one_row_jobs() -> None:
    status, found = bench("latency", "--jobs", "20", "--executor", "process")
    assert (status, found["void"]) == (0, [])
    assert 0 < found["min_ms"] <= found["p50_ms"] <= found["p99_ms"] <= found["max_ms"]
    assert found["commitments"] >= 20


def test_footprint_reads_a_worker_before_and_after_its_job() -> None:
    status, found = bench("footprint", "--idle-seconds", "3")
    assert (status, found["void"]) == (0, [])
    assert found["processes_below_worker_during_job"] > 1
    assert 0 < found["worker_idle_rss_before_mb"] <= found["worker_idle_rss_mb"]
    assert found["coordinator_rss_mb"] > 0


def test_control_plane_counts_the_same_on_both_sides() -> None:
    status, found = bench("control-plane", "--quick")
    assert (status, found["void"]) == (0, [])
    assert found["settled_in_journal"] == found["settled_told"] + 1, "the inspection, and every task"
    assert found["events"]["commitment_recorded"] == found["settled_told"]
    assert 0 < found["commits"] <= found["settled"]
    assert found["signatures_checked"] > 0 and found["leases_sent"] > 0


def test_recovery_loses_no_settlement_and_no_job_that_was_told() -> None:
    status, found = bench("recovery", "--quick")
    assert (status, found["void"]) == (0, [])
    assert (found["acks_lost"], found["settled_twice"], found["kills"]) == (0, 0, 3)
    assert found["settlements_told"] > 300 and found["jobs_told"] > 0
    assert found["live_tasks"] == found["live_tasks_after"] >= 1_000
    assert found["leases"] == found["leases_after"] > 0


def test_blobs_compares_with_a_bare_stream() -> None:
    status, found = bench("blobs", "--quick")
    assert (status, found["void"]) == (0, [])
    assert found["leases_sent"] > 0 and min(found["mib_moved_per_s"].values()) > 0
    assert found["blob_mib_per_s"]["up"] > 0
    assert found["blob_over_transport"]["down"] > 0


def test_carbon_compares_objectives_at_equal_deadlines() -> None:
    status, found = bench(
        "carbon", "--regions", "de,gb", "--alone", "", "--workers", "2", "--seasons", "summer", "--load", "0.2"
    )
    assert (status, found["void"]) == (0, [])
    assert found["energy_equal"] and found["cost"]["jobs"] == found["carbon"]["jobs"] > 0
    assert found["carbon"]["deadlines_missed"] <= found["cost"]["deadlines_missed"]
    assert found["grams_saved_percent"] > 10
    assert any("synthetic" in line for line in found["synthetic"])
