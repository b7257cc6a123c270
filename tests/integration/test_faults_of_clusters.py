"""An owner's Ray cluster that cannot be used: each reason in words, in bounded time, and over when it is mended."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from executor_rig import looping_bundle, looping_rows, silent
from fallow.errors import FallowError, Reason
from fallow.session import Cause
from fallow_worker.executor import WorkFailed
from fallow_worker.executor.on_ray import RayExecutor
from fallow_worker.executor.ray_settings import RaySettings
from fallow_worker.ports import Work
from integration.fault_rig import NARROW, rig
from integration.harness import wait_for, worker
from integration.test_ray_executor_cluster import OwnersCluster, end, two_nodes

pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.timeout(600)]

PATIENCE_S = 180.0
TOLD_SECONDS_MAX = 40.0
"""Twelve of silence, and what a busy machine adds; Ray by itself took 64 on the same."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OwnersCluster]:
    """A head and one more node."""
    with two_nodes(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


def settings_of(cluster: OwnersCluster) -> RaySettings:
    return RaySettings(address=cluster.address, token_path=str(cluster.token_path))


async def failure(executor: RayExecutor, work: Work, within_s: float = TOLD_SECONDS_MAX) -> str:
    """Why a lease fails."""
    async with asyncio.timeout(within_s):
        with pytest.raises(WorkFailed) as caught:
            await executor.run(work, silent)
    assert caught.value.cause is Cause.PLATFORM
    return caught.value.reason


async def test_a_wrong_token_and_none_are_told_apart_from_a_head_that_is_away(
    cluster: OwnersCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    wrong = tmp_path / "wrong"
    wrong.write_text("f" * 64)
    for token, words in ((str(wrong), f"the token in {wrong} is not the one"), ("", "this worker has no token")):
        executor = RayExecutor(RaySettings(address=cluster.address, token_path=token))
        began = time.monotonic()
        with pytest.raises(FallowError) as caught:
            await executor.start()
        assert caught.value.reason is Reason.EXECUTOR_UNAVAILABLE
        assert words in str(caught.value) and cluster.address in str(caught.value)
        assert "~/.ray/auth_token" in caught.value.hint
        assert time.monotonic() - began < TOLD_SECONDS_MAX
        # Later, when the owner has changed it under a running worker, the lease says so too.
        reason = await failure(executor, looping_bundle(tmp_path).work(looping_rows(1)))
        assert words in reason
        await executor.stop()


async def test_another_python_is_named_with_what_to_install(
    cluster: OwnersCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = "import ray._private.utils as utils\nfound = utils.compute_version_info\n"
    other += "utils.compute_version_info = lambda: (found()[0], '3.9.1')\n"
    (tmp_path / "sitecustomize.py").write_text(other)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    executor = RayExecutor(settings_of(cluster))
    await executor.start()
    reason = await failure(executor, looping_bundle(tmp_path).work(looping_rows(1)))
    assert "on Python 3.9.1" in reason and "install ray==" in reason and cluster.address in reason
    await executor.stop()


def test_a_head_that_dies_in_mid_job_is_told_and_the_job_ends_well_when_it_is_back(tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / ".ray").mkdir(parents=True)
    with two_nodes(tmp_path) as cluster, rig(tmp_path) as made:
        (home / ".ray" / "auth_token").write_bytes(cluster.token_path.read_bytes())
        head = cluster.first
        environment = {**os.environ, "HOME": str(home), "TMPDIR": str(made.scratch)}
        lab = worker(made.service, tmp_path / "lab", "--ray-address", cluster.address, environment=environment)
        with lab as service:
            work = made.work(6_000, NARROW, steps=20)
            work.begun(100)
            began = time.monotonic()
            end(head)
            words = f"no Ray cluster answers at {cluster.address}"
            wait_for(lambda: words in service.log.read_text(), PATIENCE_S, "the worker's word")
            assert time.monotonic() - began < TOLD_SECONDS_MAX
            assert service.running()
            # Its owner starts the cluster again, at the same address.
            cluster.end_all()
            cluster.start_head()
            cluster.start_node()
            work.check()
            assert service.stop() == 0
