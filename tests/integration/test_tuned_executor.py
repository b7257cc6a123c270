"""Threads and batches in flight, measured by real engine children: remembered, measured anew, and never a loss."""

from __future__ import annotations

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
