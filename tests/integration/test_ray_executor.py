"""Ray below an executor is killed in every way: what ran fails as the platform's, nothing is left, it starts again."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from executor_rig import (
    busiest_child,
    dense_bundle,
    dense_rows,
    descendants,
    looping_bundle,
    looping_rows,
    named,
    silent,
    state_of,
    until,
)
from fallow.errors import FallowError, Reason
from fallow.row_block import RowBlock
from fallow.session import Cause
from fallow_worker.executor import WorkFailed
from fallow_worker.executor.on_ray import RayExecutor
from fallow_worker.executor.ray_settings import RaySettings
from fallow_worker.executor.supervisor import SupervisorSettings

pytestmark = [
    pytest.mark.processes,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]

SETTINGS = RaySettings(supervisor=SupervisorSettings(cores=2))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def executor() -> AsyncIterator[RayExecutor]:
    # Another file's coordinator may be running below the same test process.
    before = set(descendants())
    made = RayExecutor(SETTINGS)
    await made.start()
    yield made
    await made.stop()
    assert set(descendants()) <= before


def listening_addresses(pids: set[int]) -> set[str]:
    """Local addresses, in the kernel's hexadecimal, of the TCP ports that those processes listen on."""
    inodes: set[str] = set()
    for pid in pids:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            try:
                target = str(entry.readlink())
            except OSError:
                continue
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    found: set[str] = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                found.add(fields[1].rpartition(":")[0])
    return found


async def test_ray_listens_on_the_loopback_interface_alone(executor: RayExecutor, tmp_path: Path) -> None:
    await executor.run(dense_bundle(tmp_path).work(dense_rows(4)), silent)
    loopback = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
    addresses = listening_addresses(set(descendants()))
    assert addresses and addresses <= loopback


async def test_rays_token_is_private_and_its_helpers_stay_out(executor: RayExecutor, tmp_path: Path) -> None:
    await executor.run(dense_bundle(tmp_path).work(dense_rows(4)), silent)
    [raylet] = named("raylet/raylet")
    environment = dict(
        entry.split("=", 1) for entry in Path(f"/proc/{raylet}/environ").read_text().split("\0") if "=" in entry
    )
    token = Path(environment["RAY_AUTH_TOKEN_PATH"])
    assert environment["RAY_AUTH_MODE"] == "token"
    assert token.stat().st_mode & 0o077 == 0 and token.parent.stat().st_mode & 0o077 == 0
    assert len(token.read_text()) == 64
    assert not named("log_monitor") and not named("autoscaler") and not named("dashboard/dashboard.py")


@pytest.mark.parametrize(
    "victim",
    [
        "ray::NodeSupervisor",
        "raylet/raylet",
        pytest.param("gcs/gcs_server", marks=pytest.mark.slow),
        pytest.param("executor.ray_driver", marks=pytest.mark.slow),
    ],
)
async def test_work_on_a_killed_ray_is_the_platforms_failure_and_the_next_run_is_fine(
    executor: RayExecutor, tmp_path: Path, victim: str
) -> None:
    bundle = looping_bundle(tmp_path)
    running = asyncio.create_task(executor.run(bundle.work(looping_rows(10**11)), silent))
    child = await busiest_child()
    [pid] = named(victim)
    begun = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(WorkFailed) as caught:
        await running
    assert caught.value.cause is Cause.PLATFORM
    assert time.monotonic() - begun < 10
    await until(lambda: state_of(child) in {"", "Z"}, "the end of the killed Ray's engine child")
    outcome = await executor.run(bundle.work(looping_rows(1, 2)), silent)
    assert len(RowBlock.parse(outcome.output_block)) == 2


async def test_a_killed_host_takes_ray_and_every_child_with_it(tmp_path: Path) -> None:
    host = subprocess.Popen(  # noqa: ASYNC220 - returns at once
        [sys.executable, str(Path(__file__).parents[1] / "ray_host.py"), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )
    try:
        await busiest_child(host.pid)
        everyone = descendants(host.pid)
        assert len(everyone) >= 5
    finally:
        host.kill()
        host.wait()
    await until(lambda: all(state_of(pid) in {"", "Z"} for pid in everyone), "the end of all of Ray")


async def test_an_address_where_nobody_listens_is_refused_with_what_to_check() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        with pytest.raises(FallowError) as caught:
            await RayExecutor(RaySettings(address=address)).start()
    assert caught.value.reason is Reason.EXECUTOR_UNAVAILABLE
    assert caught.value.field == "ray_address" and "ray start" in caught.value.hint


async def test_a_listener_that_is_no_ray_is_told_at_once() -> None:
    server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    stranger = RayExecutor(RaySettings(address=f"127.0.0.1:{port}", up_seconds_max=4))
    before = set(descendants())
    try:
        with pytest.raises(FallowError) as caught:
            await stranger.start()
    finally:
        await stranger.stop()
        server.close()
        await server.wait_closed()
    assert caught.value.reason is Reason.EXECUTOR_UNAVAILABLE and f"127.0.0.1:{port}" in caught.value.message
    assert set(descendants()) <= before


@pytest.mark.parametrize("address", ["", "nohost", "host:port", ":6379"])
async def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(FallowError) as caught:
        await RayExecutor(RaySettings(address=address)).start()
    assert caught.value.reason is Reason.EXECUTOR_UNAVAILABLE and caught.value.field == "ray_address"


async def test_a_python_without_ray_is_told_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FallowError) as caught:
        await RayExecutor(SETTINGS).start()
    assert caught.value.reason is Reason.EXECUTOR_UNAVAILABLE and "fallow[ray]" in caught.value.hint
