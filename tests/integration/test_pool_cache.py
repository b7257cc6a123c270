"""A pool's cache in its own network: one worker's bundle is the next one's, and a cache that lies is found out."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from integration.fault_rig import NARROW, PATIENCE_S, Rig, rig
from integration.harness import Service, spawn, wait_for, worker

pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """A coordinator without workers."""
    with rig(tmp_path_factory.mktemp("pool-cache")) as made:
        yield made


def status_of(folder: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        found: dict[str, Any] = json.loads((folder / "status.json").read_text())
        return found
    return {}


@contextlib.contextmanager
def managed(made: Rig, name: str, *arguments: str) -> Iterator[Path]:
    """A managed worker on a folder of its own while the block runs."""
    folder = made.folder / name
    line = made.service.new_token("--role", "worker", "--tier", "managed")
    options = ("--executor", "process", "--tasks", "map", *arguments)
    environment = {"TMPDIR": str(made.scratch)}
    with worker(made.service, folder, *options, join_line=line, environment=environment) as service:
        yield folder
        assert service.stop() == 0, service.tail()


@contextlib.contextmanager
def cache(made: Rig, name: str) -> Iterator[Path]:
    """`fallow-worker cache` on a folder of its own while the block runs."""
    folder = made.folder / name
    folder.mkdir()
    line = made.service.new_token("--role", "worker", "--tier", "managed")
    command = [sys.executable, "-m", "fallow_worker", "join", line, "--state", str(folder)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    log = folder / "cache.log"
    words = ["-m", "fallow_coordinator.attended", "fallow_worker", "cache", "--state", str(folder)]
    service = Service("cache", spawn([*words, "--listen", "127.0.0.1:0"], log, {"TMPDIR": str(made.scratch)}), log)
    try:
        wait_for(lambda: status_of(folder).get("session") == "online" or not service.running(), PATIENCE_S, "a cache")
        assert service.running(), service.tail()
        yield folder
        assert service.stop() == 0, service.tail()
    finally:
        service.discard()


def counts_after_a_job(made: Rig, name: str, seed: int) -> dict[str, int]:
    """What a worker with an empty folder counts once it has done a job of its own."""
    with managed(made, name) as folder:
        made.work(200, NARROW, seed=seed).check()
        wait_for(lambda: status_of(folder).get("counts", {}).get("settled"), PATIENCE_S, "a settled lease")
        counts: dict[str, int] = status_of(folder)["counts"]
        return counts


def test_a_bundle_is_fetched_once_for_a_network_and_a_poisoned_cache_is_refused(made: Rig) -> None:
    with cache(made, "pool-cache") as folder:
        first = counts_after_a_job(made, "first", seed=1)
        assert (first["pool_blobs_fetched"], first["pool_blobs_wrong"]) == (0, 0)
        wait_for(lambda: status_of(folder)["served"]["blobs_kept"], PATIENCE_S, "the first worker to leave the bundle")
        kept = [path for path in (folder / "cache").glob("??/*") if path.is_file()]
        assert len(kept) == 1 and kept[0].stat().st_size > 4 * 2**20

        second = counts_after_a_job(made, "second", seed=2)
        assert (second["pool_blobs_fetched"], second["pool_blobs_wrong"]) == (1, 0)
        assert second["pool_bytes_fetched"] == kept[0].stat().st_size
        assert status_of(folder)["served"]["blobs_served"] == 1

        # Somebody changes a byte on the cache's disk: the digest tells, and the blob service gives the right ones.
        with kept[0].open("r+b") as file:
            file.seek(1_000_000)
            byte = file.read(1)
            file.seek(1_000_000)
            file.write(bytes([byte[0] ^ 1]))
        third = counts_after_a_job(made, "third", seed=3)
        assert (third["pool_blobs_fetched"], third["pool_blobs_wrong"]) == (0, 1)
    # Without it everything goes on.
    fourth = counts_after_a_job(made, "fourth", seed=4)
    assert (fourth["pool_blobs_fetched"], fourth["pool_caches_failed"]) == (0, 0)


def test_a_managed_worker_serves_what_it_fetched_for_itself(made: Rig) -> None:
    with managed(made, "serving", "--serve-cache", "127.0.0.1:0") as folder:
        made.work(200, NARROW, seed=5).check()
        with managed(made, "reading") as reader:
            wait_for(lambda: status_of(reader).get("session") == "online", PATIENCE_S, "the reader to be online")
            # Who has the bundle comes first; with more work than that one takes, the reader gets some and needs it too.
            for work in [made.work(400, NARROW, seed=seed) for seed in range(6, 18)]:
                work.check()
            wait_for(lambda: status_of(reader)["counts"]["pool_blobs_fetched"], PATIENCE_S, "a bundle from next door")
        assert status_of(folder)["served"]["blobs_served"] == 1


def test_a_volunteer_is_told_that_it_may_not_serve_a_pool(made: Rig) -> None:
    folder = made.folder / "volunteer"
    command = [sys.executable, "-m", "fallow_worker"]
    join = [*command, "join", made.service.worker_join_line, "--state", str(folder)]
    subprocess.run(join, check=True, capture_output=True, timeout=60)
    done = subprocess.run(
        [*command, "cache", "--state", str(folder)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert "only managed and operators' workers serve a pool" in done.stderr and "Traceback" not in done.stderr
