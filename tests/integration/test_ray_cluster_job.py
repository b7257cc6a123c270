"""A job on a worker that is its owner's Ray cluster of two nodes, one of which dies; and one of another version."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

import pytest

from executor_rig import ancestors_of, command_of, descendants, engine_children, looping_bundle, looping_rows, silent
from fallow.session import Cause
from fallow_worker.executor import WorkFailed
from fallow_worker.executor.on_ray import RayExecutor
from fallow_worker.executor.ray_settings import RaySettings
from integration.fault_rig import NARROW, rig
from integration.harness import wait_for, worker
from integration.test_ray_executor_cluster import OwnersCluster, cluster

__all__ = ["cluster"]

pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.timeout(300)]

PATIENCE_S = 90.0
ROWS = 20_000


def test_a_job_goes_on_when_a_node_of_the_cluster_dies(cluster: OwnersCluster, tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / ".ray").mkdir(parents=True)
    (home / ".ray" / "auth_token").write_bytes(cluster.token_path.read_bytes())
    with rig(tmp_path) as made:
        environment = {**os.environ, "HOME": str(home), "TMPDIR": str(made.scratch)}
        lab = worker(made.service, tmp_path / "lab", "--ray-address", cluster.address, environment=environment)
        with lab as service:
            work = made.work(ROWS, NARROW, steps=20)
            wait_for(lambda: len(raylets_at_work()) == 2, PATIENCE_S, "both nodes to work")
            work.begun(ROWS // 4)
            lost = max(raylets_at_work())
            kill_node(lost)
            work.check()
            shares = work.job.status().shares
            assert {share.node for share in shares} == {0, 1} and sum(share.rows for share in shares) == ROWS
            assert lost not in raylets_at_work()
            assert service.stop() == 0


def raylets_at_work() -> set[int]:
    """The nodes on which engine children run; the operator's own worker has none."""
    above = [ancestors_of(pid) for pid in engine_children()]
    return {pid for line in above for pid in line if "raylet/raylet" in command_of(pid)}


def kill_node(raylet: int) -> None:
    """`kill -9` of a raylet and of everything below it."""
    for pid in (raylet, *descendants(raylet)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


async def test_a_cluster_of_another_version_of_ray_is_named(
    cluster: OwnersCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text("import ray\nray.__version__ = '0.0.1'\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    executor = RayExecutor(RaySettings(address=cluster.address, token_path=str(cluster.token_path)))
    await executor.start()
    with pytest.raises(WorkFailed) as caught:
        await executor.run(looping_bundle(tmp_path).work(looping_rows(1)), silent)
    await executor.stop()
    assert caught.value.cause is Cause.PLATFORM
    assert "install ray==" in caught.value.reason and "Ray 0.0.1" in caught.value.reason, caught.value.reason
    assert not [pid for pid in descendants() if "ray_driver" in command_of(pid)]
