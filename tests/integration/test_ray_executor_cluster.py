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
from collections.abc import Iterator
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class OwnersCluster:
    """A Ray of two nodes that runs without us."""

    address: str
    token_path: Path


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[OwnersCluster]:
    token = tmp_path / "token"
    token.write_text("0123456789abcdef" * 4)
    folder = tempfile.mkdtemp(prefix="fc-", dir="/tmp")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    ray_command = [
        str(Path(sys.executable).with_name("ray")),
        "start",
        "--block",
        "--num-cpus=1",
        "--object-store-memory=100000000",
    ]
    address = f"127.0.0.1:{port}"
    nodes: list[subprocess.Popen[bytes]] = []
    try:
        for where in (
            ["--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={folder}"],
            [f"--address={address}"],
        ):
            nodes.append(
                subprocess.Popen(
                    [*ray_command, *where], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
                )
            )
            wait_for_raylets(nodes)
        yield OwnersCluster(address, token)
    finally:
        for pid in [pid for node in nodes for pid in (*descendants(node.pid), node.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for node in nodes:
            node.wait(timeout=30)
        shutil.rmtree(folder, ignore_errors=True)


def wait_for_raylets(nodes: list[subprocess.Popen[bytes]]) -> None:
    deadline = time.monotonic() + 60
    for node in nodes:
        while not any("raylet/raylet" in command_of(pid) for pid in descendants(node.pid)):
            assert node.poll() is None and time.monotonic() < deadline, "a node of the cluster did not start"
            time.sleep(0.05)


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
