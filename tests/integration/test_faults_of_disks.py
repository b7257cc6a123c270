"""Disks that fill up in mid-job: words that a person can act on, and everything goes on once there is room."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from fallow.errors import FallowError, Reason
from fallow.job import JobState
from fallow.limits import GIB, MIB
from fallow_coordinator.config import EXIT_STORAGE_FAILED
from integration.fault_rig import PATIENCE_S, a_worker, filled, rig, small_disk
from integration.harness import spawn, wait_for

pytestmark = [pytest.mark.processes, pytest.mark.timeout(240)]

ROWS = 3_000


@pytest.mark.slow
def test_a_full_journal_ends_the_coordinator_with_words_and_it_goes_on_with_room(tmp_path: Path) -> None:
    with (
        small_disk(tmp_path / "coordinator" / "journal", 8 * MIB) as disk,
        rig(tmp_path, plain="--executor process") as made,
    ):
        work = made.work(ROWS)
        work.begun()
        with filled(disk):
            # The write-ahead log's own room is used up first.
            with contextlib.suppress(FallowError):
                for number in range(400):
                    made.service.cli_raw("account", "create", f"account-{number}")
                    if not made.service.running():
                        break
            wait_for(lambda: not made.service.running(), PATIENCE_S, "the coordinator to give up")
            assert made.service.process.returncode == EXIT_STORAGE_FAILED
            assert "the disk is full; free space there and start again" in made.service.tail()
            again = spawn(
                ["-m", "fallow_coordinator", "start", "--state", str(made.service.state), "--no-operator-worker"],
                tmp_path / "again.log",
            )
            assert again.wait(30) != 0
            words = (tmp_path / "again.log").read_text()
            assert "disk is full" in words and "Traceback" not in words, words
        made.restart_coordinator()
        work.check()


@pytest.mark.slow
def test_a_full_blob_disk_is_told_and_work_goes_on_with_room(tmp_path: Path) -> None:
    with (
        small_disk(tmp_path / "coordinator" / "blobs", GIB + 256 * MIB) as disk,
        rig(tmp_path, plain="--executor process") as made,
    ):
        work = made.work(ROWS)
        work.begun()
        with filled(disk, leave_bytes=GIB) as ballast:
            with pytest.raises(FallowError) as caught:
                made.work(ROWS, seed=1)
            assert caught.value.reason is Reason.STORAGE_FULL
            assert "free or add disk space" in caught.value.hint
            wait_for(lambda: "storage is full" in work.job.status().reason, PATIENCE_S, "the job to tell why it waits")
            assert work.job.status().state is JobState.RUNNING
            ballast.unlink()
            work.check()


@pytest.mark.slow
def test_a_worker_without_room_for_bundles_says_so_and_leaves_the_work_to_others(tmp_path: Path) -> None:
    with (
        rig(tmp_path) as made,
        small_disk(tmp_path / "cramped" / "cache", 32 * MIB),
        a_worker(made, "cramped", "--executor", "process") as cramped,
    ):
        wait_for(lambda: made.online() == 1, PATIENCE_S, "the cramped worker")
        work = made.work(ROWS // 3)
        wait_for(lambda: "has no room for" in work.job.status().reason, PATIENCE_S, "the job to tell why it waits")
        words = cramped.tail(10**6)
        assert "start the worker with --state on another disk" in words and "Traceback" not in words
        # Each try waits longer than the one before: no crash loop.
        assert words.count("fetch.failed") < 20
        with a_worker(made, "roomy", "--executor", "process") as roomy:
            work.check()
            assert roomy.stop() == 0
        assert cramped.stop() == 0


@pytest.mark.slow
def test_a_worker_whose_own_folder_is_full_says_so_and_goes_on_with_room(tmp_path: Path) -> None:
    """Each session's resume token is kept on disk before the session is used."""
    with (
        rig(tmp_path, plain="--executor process") as made,
        small_disk(tmp_path / "cramped", 4 * MIB) as disk,
        a_worker(made, "cramped", "--executor", "process") as cramped,
    ):
        wait_for(lambda: made.online() == 2, PATIENCE_S, "both workers")
        with filled(disk):
            made.kill_coordinator()
            made.restart_coordinator()
            wait_for(lambda: "No space left on device" in cramped.tail(10**6), PATIENCE_S, "the words")
            words = cramped.tail(10**6)
            assert "start the worker with --state on another disk" in words and "it is a defect" not in words
            assert cramped.running()
        wait_for(lambda: made.online() == 2, PATIENCE_S, "both workers again")
        assert cramped.stop() == 0
