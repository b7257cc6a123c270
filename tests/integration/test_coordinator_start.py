"""Starting, stopping, killing and starting again: what a person sees and what is left behind."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from fallow.credentials import Credentials
from fallow.join_line import parse_join_line
from fallow.places import local_client_folder
from fallow.roles import Role
from integration.harness import CoordinatorService, coordinator, start_coordinator, wait_for
from integration.raw_session import joined, raw_session

pytestmark = pytest.mark.processes

PATIENCE_S = 30.0


def refused_start(state: Path, *arguments: str) -> str:
    """What `start` tells on standard error when it can't."""
    command = [sys.executable, "-m", "fallow_coordinator", "start", "--state", str(state), "--no-operator-worker"]
    done = subprocess.run([*command, *arguments], capture_output=True, timeout=60, check=False)
    told = done.stderr.decode()
    assert done.returncode == 1, told
    assert "Traceback" not in told, told
    return told


def child(service: CoordinatorService, module: str) -> psutil.Process | None:
    """The live child that runs `module`."""
    for process in service.family()[1:]:
        try:
            if module in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                return process
        except psutil.NoSuchProcess:
            continue
    return None


def test_first_start_prints_one_line_each_and_keeps_secrets_to_its_user(tmp_path: Path) -> None:
    state = tmp_path / "state"
    with coordinator(state) as service:
        lines = {service.worker_join_line, service.client_join_line}
        assert len(lines) == 2
        for line in lines:
            parsed = parse_join_line(line)
            assert parsed.enrollment_endpoint == service.facts["enrollment_endpoint"]
            assert parsed.authority_fingerprint.hex() == service.facts["authority_fingerprint"]
        said = service.log.read_text()
        assert said.count(service.worker_join_line) == 1
        operator = Credentials.load(local_client_folder(state))
        assert operator.role is Role.OPERATOR
        for path in state.rglob("*"):
            mode = stat.S_IMODE(path.stat().st_mode)
            if path.suffix in (".pem", ".json") or path.name in ("lock",):
                assert not mode & 0o077, path
        for folder in ("authority", "blobs", "client", "journal"):
            assert not stat.S_IMODE((state / folder).stat().st_mode) & 0o077
        assert service.stop() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopping_leaves_no_process_behind(tmp_path: Path, number: int) -> None:
    with coordinator(tmp_path / "state", operator_worker=True) as service:
        wait_for(
            lambda: any(one["connected"] for one in service.cli("worker", "list")["workers"]),
            PATIENCE_S,
            "the operator's worker to connect",
        )
        modules = ("fallow_coordinator.blobs", "fallow_coordinator.follower", "fallow_worker")
        assert all(child(service, module) for module in modules)
        assert service.stop(number) == 0


async def test_killed_coordinator_starts_again_where_everybody_finds_it(tmp_path: Path) -> None:
    state = tmp_path / "state"
    service = start_coordinator(state)
    try:
        credentials = await joined(service.worker_join_line, tmp_path / "worker")
        client_line, endpoints = service.client_join_line, service.facts["control_endpoint"]
        family = service.family()[1:]
        service.kill()
        _, left = psutil.wait_procs(family, timeout=PATIENCE_S)
        assert not left, "children end with their coordinator"
    finally:
        service.discard()
    with coordinator(state) as again:
        assert again.facts["control_endpoint"] == endpoints
        async with raw_session(credentials) as session:
            await session.open()
        await joined(client_line, tmp_path / "client")
        assert again.cli("status")["epoch"] == "2"
        assert again.cli("check")["faults"] == []


def test_killed_children_are_started_again(tmp_path: Path) -> None:
    with coordinator(tmp_path / "state") as service:
        for module in ("fallow_coordinator.blobs", "fallow_coordinator.follower"):
            first = child(service, module)
            assert first is not None
            first.kill()

            def replaced(module: str = module, pid: int = first.pid) -> bool:
                now = child(service, module)
                return now is not None and now.pid != pid

            wait_for(replaced, PATIENCE_S, f"{module} to be started again")
        host, _, port = service.facts["blob_endpoint"].rpartition(":")

        def listens() -> bool:
            with socket.socket() as probe:
                return probe.connect_ex((host, int(port))) == 0

        wait_for(listens, PATIENCE_S, "the blob service to listen again")


def test_second_coordinator_on_the_same_state_is_refused(shared_coordinator: CoordinatorService) -> None:
    told = refused_start(shared_coordinator.state, "--port", "0")
    assert f"process {shared_coordinator.pid}" in told
    assert "another coordinator" in told


def test_taken_port_is_told_with_a_way_out(tmp_path: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen(1)
        port = holder.getsockname()[1]
        told = refused_start(tmp_path / "state", "--port", str(min(port, 65533)))
    assert f"port {port}" in told
    assert "--port" in told


def test_state_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    told = refused_start(tmp_path / "file" / "state", "--port", "0")
    assert str(tmp_path / "file") in told
    assert "--state" in told


def test_damaged_authority_is_told_and_not_made_anew(tmp_path: Path) -> None:
    state = tmp_path / "state"
    with coordinator(state) as service:
        service.stop()
    (state / "authority" / "key.pem").unlink()
    told = refused_start(state)
    assert "key.pem is missing" in told
    assert "backup" in told


def test_commands_without_a_coordinator_say_how_to_start_one(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fallow_coordinator", "status", "--state", str(tmp_path)],
        capture_output=True, timeout=60, check=False, env={**os.environ},
    )  # fmt: skip
    assert done.returncode == 1
    assert "fallow-coordinator start" in done.stderr.decode()
