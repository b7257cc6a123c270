"""`fallow-worker` as a process: its folder, its signals, its size."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from fallow.explanation import Obstacle, WorkerExplanation
from fallow.ids import PartyId
from fallow_worker.testing import PATIENCE_S, Conversation, ScriptedCoordinator

pytestmark = pytest.mark.processes

RSS_BYTES_MAX = 100_000_000
HEAVY = ("numpy", "onnxruntime", "pyarrow", "/ray/", "rich")


class WorkerProcess:
    """One `fallow-worker start` on a folder that has joined the scripted coordinator."""

    def __init__(self, process: asyncio.subprocess.Process, folder: Path) -> None:
        self.process = process
        self.folder = folder

    async def ended(self) -> tuple[int, str]:
        async with asyncio.timeout(PATIENCE_S):
            _, errors = await self.process.communicate()
        assert self.process.returncode is not None
        return self.process.returncode, errors.decode()


async def run(*arguments: str) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "fallow_worker",
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(PATIENCE_S):
        output, errors = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode(), errors.decode()


@pytest.fixture
async def coordinator(tmp_path: Path) -> AsyncIterator[ScriptedCoordinator]:
    coordinator = ScriptedCoordinator(tmp_path)
    await coordinator.start()
    yield coordinator
    await coordinator.stop()


@contextlib.asynccontextmanager
async def worker(
    coordinator: ScriptedCoordinator, *arguments: str, pass_fds: tuple[int, ...] = ()
) -> AsyncIterator[WorkerProcess]:
    folder = coordinator.credentials().folder
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "fallow_worker", "start", "--executor", "process", "--state", str(folder), *arguments,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        pass_fds=pass_fds,
    )  # fmt: skip
    try:
        yield WorkerProcess(process, folder)
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


async def online(coordinator: ScriptedCoordinator) -> Conversation:
    return await coordinator.session()


async def test_a_folder_that_has_not_joined_says_the_command(tmp_path: Path) -> None:
    code, _, errors = await run("start", "--state", str(tmp_path))
    assert code == 1
    assert "fallow-worker join LINE" in errors
    code, output, _ = await run("status", "--state", str(tmp_path), "--json")
    assert code == 1
    assert json.loads(output)["error"]["reason"] == "UNAUTHENTICATED"


async def test_a_broken_join_line_is_named(tmp_path: Path) -> None:
    code, _, errors = await run("join", "fallow1_half-a-line", "--state", str(tmp_path))
    assert code == 1
    assert "copy the whole word" in errors


async def test_a_second_daemon_on_the_folder_is_refused_and_named(coordinator: ScriptedCoordinator) -> None:
    async with worker(coordinator) as first:
        await online(coordinator)
        code, _, errors = await run("start", "--state", str(first.folder))
        assert code == 1
        assert f"process {first.process.pid}" in errors
        assert first.process.returncode is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_an_idle_worker_cleanly(coordinator: ScriptedCoordinator, number: signal.Signals) -> None:
    async with worker(coordinator) as process:
        conversation = await online(coordinator)
        process.process.send_signal(number)
        await conversation.ends()
        code, errors = await process.ended()
        assert code == 0, errors
        assert "Traceback" not in errors
        assert "offers challenge, map on cpu" in errors


async def test_a_worker_ends_with_whoever_holds_its_life_descriptor(coordinator: ScriptedCoordinator) -> None:
    mine, theirs = os.pipe()[::-1]
    os.set_inheritable(theirs, True)
    async with worker(coordinator, "--life-fd", str(theirs), pass_fds=(theirs,)) as process:
        os.close(theirs)
        await online(coordinator)
        os.close(mine)
        code, errors = await process.ended()
        assert code == 0, errors


async def test_status_tells_a_running_worker_from_one_that_is_not(coordinator: ScriptedCoordinator) -> None:
    async with worker(coordinator) as process:
        conversation = await online(coordinator)
        state = ("--state", str(process.folder), "--json")

        async def told() -> dict[str, object]:
            code, output, errors = await run("status", *state)
            assert code == 0, errors
            status: dict[str, object] = json.loads(output)
            return status

        async with asyncio.timeout(PATIENCE_S):
            while (status := await told()).get("session") != "online":
                pass
        assert status["running"] is True
        assert status["pid"] == process.process.pid
        assert status["worker_id"] == "worker"
        process.process.terminate()
        await conversation.ends()
        await process.ended()
        status = await told()
        assert status["running"] is False


async def test_why_says_what_the_coordinator_sees_and_answers_without_it_too(coordinator: ScriptedCoordinator) -> None:
    busy = Obstacle("WORKING", 2, "it has as much work as it takes")
    coordinator.why = WorkerExplanation(PartyId("worker"), True, 2, 2, 2, 0, 5, 3, (), (busy,))

    async def told(folder: Path) -> dict[str, Any]:
        code, output, errors = await run("why", "--state", str(folder), "--json")
        assert code == 0, errors
        found: dict[str, Any] = json.loads(output)
        return found

    async with worker(coordinator) as process:
        conversation = await online(coordinator)
        async with asyncio.timeout(PATIENCE_S):
            while (found := await told(process.folder))["session"] != "online":
                pass
        assert found["explanation"]["jobs_fitting"] == 3
        assert [reason["code"] for reason in found["reasons"]] == ["WORKING"]
        process.process.terminate()
        await conversation.ends()
        await process.ended()
        await coordinator.stop()
        found = await told(process.folder)
        assert found["explanation"] is None
        assert [reason["code"] for reason in found["reasons"]] == ["NOT_RUNNING", "COORDINATOR_UNREACHABLE"]
        code, output, _ = await run("why", "--state", str(process.folder))
        assert code == 0
        assert "fallow-worker start" in output


async def test_the_daemon_at_rest_is_small_and_carries_no_runtime(coordinator: ScriptedCoordinator) -> None:
    async with worker(coordinator) as process:
        await online(coordinator)
        proc = Path(f"/proc/{process.process.pid}")
        mapped = (proc / "maps").read_text()
        assert [name for name in HEAVY if name in mapped] == []
        resident = int((proc / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        assert resident <= RSS_BYTES_MAX


async def test_the_daemon_imports_nothing_heavy() -> None:
    script = (
        "import sys, fallow_worker.start, fallow_worker.__main__, fallow_worker.executor.on_processes;"
        "print(sorted({m.partition('.')[0] for m in sys.modules} & "
        "{'numpy','onnxruntime','onnx','pyarrow','ray','rich','click','psutil','pandas'}))"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    output, errors = await process.communicate()
    assert output.decode().strip() == "[]", errors.decode()


async def test_the_probe_shows_levels_to_people_and_facts_to_programs() -> None:
    code, output, errors = await run("probe")
    assert code == 0, errors
    assert output.splitlines()[0].split() == ["device", "what", "present", "usable", "measured"]
    assert output.splitlines()[1].startswith("cpu-0 ")
    code, output, _ = await run("probe", "--json")
    assert code == 0
    report = json.loads(output)
    cpu = report["devices"][0]
    assert (cpu["level"], cpu["providers"], cpu["offered"]) == ("usable", ["CPUExecutionProvider"], True)
    assert report["sandbox_level"] == "full"


@pytest.mark.parametrize("region", ["", "x" * 65, "two\nlines"])
async def test_an_odd_region_is_refused(region: str, tmp_path: Path) -> None:
    code, _, errors = await run("start", "--state", str(tmp_path), "--region", region)
    assert code == 2
    assert "--region" in errors
