"""A lease on the owner's own Ray cluster of two nodes, joined by address and token."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from executor_rig import (
    ancestors_of,
    busiest_child,
    command_of,
    descendants,
    engine_children,
    looping_bundle,
    looping_rows,
    named,
    silent,
)
from fallow_worker.executor.on_ray import RayExecutor
from fallow_worker.executor.ray_settings import RaySettings

pytestmark = [
    pytest.mark.processes,
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]


START_SECONDS_MAX = 240.0
"""Of a node: two cores may be shared with much else."""
STORE_BYTES = 80_000_000


class OwnersCluster:
    """A Ray of several nodes that runs without us."""

    def __init__(self, token_path: Path, **environment: str) -> None:
        self.token_path = token_path
        self._folder = tempfile.mkdtemp(prefix="fc-", dir="/tmp")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self.address = f"127.0.0.1:{self.port}"
        self._environment = {
            **os.environ,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token_path),
            "RAY_USAGE_STATS_ENABLED": "0",
            **environment,
        }
        self._nodes: list[subprocess.Popen[bytes]] = []

    def start_head(self) -> subprocess.Popen[bytes]:
        """Starts the first node; again on the same port when it has died."""
        return self._start("--head", f"--port={self.port}", "--include-dashboard=false", f"--temp-dir={self._folder}")

    def start_node(self) -> subprocess.Popen[bytes]:
        """Starts one more."""
        return self._start(f"--address={self.address}")

    def run(self, program: str) -> subprocess.Popen[str]:
        """Runs a program of the owner's that may join the cluster; it has begun when it has said a line."""
        words = [sys.executable, "-c", program, self.address]
        process = subprocess.Popen(
            words, env=self._environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline(), "the owner's program ended at once"
        return process

    @property
    def first(self) -> subprocess.Popen[bytes]:
        """The head that was started first."""
        return self._nodes[0]

    def end_all(self) -> None:
        """Ends every node."""
        for node in self._nodes:
            end(node)

    def stop(self) -> None:
        """Ends every node, and leaves nothing."""
        self.end_all()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self, *where: str) -> subprocess.Popen[bytes]:
        ray = str(Path(sys.executable).with_name("ray"))
        words = [ray, "start", "--block", "--num-cpus=1", f"--object-store-memory={STORE_BYTES}", *where]
        node = subprocess.Popen(words, env=self._environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self._nodes.append(node)
        deadline = time.monotonic() + START_SECONDS_MAX
        while not any("raylet/raylet" in command_of(pid) for pid in descendants(node.pid)):
            assert node.poll() is None and time.monotonic() < deadline, "a node of the cluster did not start"
            time.sleep(0.05)
        return node


def end(node: subprocess.Popen[bytes]) -> None:
    """`kill -9` of a node and of all that it has started."""
    for pid in (*descendants(node.pid), node.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    node.wait(timeout=30)


@contextlib.contextmanager
def two_nodes(folder: Path, **environment: str) -> Generator[OwnersCluster]:
    """A cluster of a head and one more node while the block runs."""
    token = folder / "token"
    token.write_text("0123456789abcdef" * 4)
    cluster = OwnersCluster(token, **environment)
    try:
        cluster.start_head()
        cluster.start_node()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[OwnersCluster]:
    with two_nodes(tmp_path) as cluster:
        yield cluster


async def test_a_lease_is_sharded_over_the_nodes_of_the_owners_cluster(cluster: OwnersCluster, tmp_path: Path) -> None:
    before = set(descendants())
    executor = RayExecutor(RaySettings(address=cluster.address, token_path=str(cluster.token_path)))
    await executor.start()
    bundle = looping_bundle(tmp_path)
    deadline = time.monotonic() + 60
    while len(raylets_with_children()) < 2:  # the second node may join after us
        assert time.monotonic() < deadline, "the lease stays on one node"
        outcome = await executor.run(bundle.work(looping_rows(*[2_000] * 60)), silent)
        assert len(bundle.decoded(outcome).positions) == 60
    runs = outcome.usage.nodes
    assert {run.node for run in runs} == {0, 1} and sum(run.rows for run in runs) == 60, "who did which rows is told"
    assert {device.cores for device in (await executor.capability()).devices} == {1}
    running = asyncio.create_task(executor.run(bundle.work(looping_rows(*[100_000] * 30)), silent))
    await busiest_child()
    os.kill(named("ray::NodeSupervisor")[0], signal.SIGKILL)
    assert len(bundle.decoded(await running).positions) == 30, "the lost node's rows are redone on the other"
    await executor.stop()
    assert not named("engine/child.py") and not named("executor.ray_driver")
    assert before <= set(descendants()), "the owner's cluster goes on"


def raylets_with_children() -> set[int]:
    """The nodes on which engine children run."""
    return {
        next(above for above in ancestors_of(pid) if "raylet/raylet" in command_of(above)) for pid in engine_children()
    }
