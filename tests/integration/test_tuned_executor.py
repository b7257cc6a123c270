"""Threads and batches in flight, measured by real engine children: remembered, measured anew, and never a loss."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import pytest

from executor_rig import BundleOnDisk, dense_bundle, dense_rows, silent
from fallow.ids import digest_of
from fallow_worker.executor.on_processes import ProcessExecutor
from fallow_worker.executor.supervisor import SupervisorSettings
from fallow_worker.executor.tunings import read_tunings

pytestmark = [pytest.mark.processes]

ROWS = 60_000
NOT_WORSE = 0.93
"""Of the fixed setting's rows a second: what chance takes of medians on a machine shared with others."""
PAIRS = 7


def executor_with(tuning: Path | None) -> ProcessExecutor:
    return ProcessExecutor(SupervisorSettings(cores=2, spares=0, tuning_path=str(tuning) if tuning else ""))


async def outputs_until_tuned(executor: ProcessExecutor, bundle: BundleOnDisk, path: Path) -> set[bytes]:
    """Digests of the outputs of leases of the same rows, until the bundle's setting is remembered."""
    rows = dense_rows(ROWS)
    seen: set[bytes] = set()
    for _ in range(40):
        seen.add(digest_of((await executor.run(bundle.work(rows), silent)).output_block))
        if read_tunings(path):
            return seen
    raise AssertionError("nothing was measured")


async def test_a_setting_is_measured_once_and_anew_when_the_machine_changes(tmp_path: Path) -> None:
    path = tmp_path / "tuning.json"
    bundle = dense_bundle(tmp_path, hidden=256)
    executor = executor_with(path)
    classes = {(await executor.run(bundle.work(dense_rows(10)), silent)).execution_class}
    seen = await outputs_until_tuned(executor, bundle, path)
    await executor.stop()
    first: dict[str, Any] = read_tunings(path)[bundle.loaded.bundle_digest.hex()]
    assert len(first["trials"]) >= 2, "more than the fixed setting was tried"

    # The next worker on this folder knows it; neither bits nor class tell which setting ran.
    executor = executor_with(path)
    for _ in range(3):
        outcome = await executor.run(bundle.work(dense_rows(ROWS)), silent)
        seen.add(digest_of(outcome.output_block))
        classes.add(outcome.execution_class)
    await executor.stop()
    assert read_tunings(path) == {bundle.loaded.bundle_digest.hex(): first}
    assert len(seen) == len(classes) == 1

    # Another runtime, or this folder on another machine: what was found does not hold.
    path.write_text(path.read_text().replace(first["identity"], "of another machine"))
    executor = executor_with(path)
    for _ in range(40):
        await executor.run(bundle.work(dense_rows(ROWS)), silent)
        found = read_tunings(path)[bundle.loaded.bundle_digest.hex()]
        if found["identity"] == first["identity"]:
            break
    else:
        raise AssertionError("it was not measured anew")
    await executor.stop()


@pytest.mark.slow
@pytest.mark.parametrize("hidden", [32, 1024])
async def test_the_tuned_setting_does_not_lose_against_the_fixed_one(tmp_path: Path, hidden: int) -> None:
    bundle = dense_bundle(tmp_path, hidden=hidden, batch_rows=8)
    work = bundle.work(dense_rows(ROWS))
    tuned, fixed = executor_with(tmp_path / "tuning.json"), executor_with(None)
    await outputs_until_tuned(tuned, bundle, tmp_path / "tuning.json")
    # A file that says the fixed setting is the fixed executor's.
    fixed_path = tmp_path / "fixed.json"
    told = (tmp_path / "tuning.json").read_text()
    entry = read_tunings(tmp_path / "tuning.json")[bundle.loaded.bundle_digest.hex()]
    chosen = f'"in_flight": {entry["setting"]["in_flight"]}, "threads": {entry["setting"]["threads"]}'
    fixed_path.write_text(
        told.replace(f'"setting": {{{chosen}}}, "trials"', '"setting": {"in_flight": 2, "threads": 1}, "trials"')
    )
    await fixed.stop()
    fixed = executor_with(fixed_path)
    ratios: list[float] = []
    for pair in range(PAIRS + 1):
        seconds: dict[int, float] = {}
        for executor in (tuned, fixed) if pair % 2 else (fixed, tuned):
            began = time.perf_counter()
            await executor.run(work, silent)
            seconds[id(executor)] = time.perf_counter() - began
        if pair:  # the first one loads
            ratios.append(seconds[id(fixed)] / seconds[id(tuned)])
    await tuned.stop()
    await fixed.stop()
    print(f"tuned over fixed: {statistics.median(ratios):.3f}, chosen {entry['setting']}, of {entry['trials']}")
    assert statistics.median(ratios) >= NOT_WORSE, ratios
