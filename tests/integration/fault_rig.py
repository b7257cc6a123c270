"""A whole installation to break: jobs with known answers, kills by name, and a look for leftovers."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyarrow carries no types.

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from fallow.bundle_file import Bundle
from fallow.client.blocking import Client, Job, connect
from fallow.job import JobState
from fallow_coordinator.core import events as ev
from fallow_coordinator.store.check import check_journal
from fallow_coordinator.store.journal_reader import JOURNAL_FILE, JournalReader
from integration.harness import CoordinatorService, Service, start_coordinator, wait_for, worker

HEARTBEAT_S = 1
ARGUMENTS = ("--heartbeat", f"{HEARTBEAT_S}s")
PATIENCE_S = 90.0
FEATURES = 1024
STEPS = 60
WIDE, NARROW = FEATURES, 8
"""Outputs of a row: 4 KiB, so that a task's output is uploaded; 32 bytes, so that it travels inline."""
BLOBS, FOLLOWER, OPERATOR = "fallow_coordinator.blobs", "fallow_coordinator.follower", "/operator-worker"
ENGINE_CHILD, RAYLET, ACTOR = "engine/child.py", "raylet/raylet", "ray::NodeSupervisor"
DRIVER = "executor.ray_driver"


def turning_bundle(folder: Path, outputs: int = WIDE, *, steps: int = STEPS) -> Bundle:
    """y = the first `outputs` features of x turned by `steps` places; 2 MFLOP a step and row, exact in float32."""
    turn = np.roll(np.eye(FEATURES, dtype=np.float32), 1, axis=1)
    names = ["x", *(f"turned-{step}" for step in range(1, steps + 1))]
    nodes = [helper.make_node("MatMul", [names[step], "turn"], [names[step + 1]]) for step in range(steps)]
    nodes.append(helper.make_node("Slice", [names[-1], "from", "to", "axis"], ["y"]))
    integers = {"from": 0, "to": outputs, "axis": 1}
    graph = helper.make_graph(
        nodes,
        "turning",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", FEATURES])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", outputs])],
        [numpy_helper.from_array(turn, "turn")]
        + [numpy_helper.from_array(np.array([value], np.int64), name) for name, value in integers.items()],
    )
    path = folder / f"turning-{outputs}-{steps}.onnx"
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    path.write_bytes(model.SerializeToString())
    return Bundle.from_onnx(path)


def rows_of(count: int, seed: int = 0) -> NDArray[np.float32]:
    """Rows that all differ, without zeros: a sum turns -0.0 into 0.0."""
    rows = np.random.default_rng((seed, count)).standard_normal((count, FEATURES), dtype=np.float32)
    return np.where(rows == 0, np.float32(1), rows)


@dataclass
class Work:
    """A job with its rows and the only right answer."""

    job: Job
    rows: NDArray[np.float32]
    outputs: int
    steps: int = STEPS

    def begun(self, rows_done: int = 1) -> None:
        """Returns once that many rows are done and others are not."""

        def enough() -> bool:
            status = self.job.status()
            assert status.state not in {JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED}, (
                f"the job ended before anything could go wrong: {status.state} {status.reason}"
            )
            return status.progress.rows_done >= rows_done

        wait_for(enough, PATIENCE_S, f"{rows_done} rows to be done")

    def check(self) -> None:
        """Waits for the end: the job has every row exactly once, bit for bit, live and saved alike."""
        status = self.job.wait()
        assert status.state is JobState.SUCCEEDED
        assert (status.progress.rows_done, status.progress.rows_failed) == (len(self.rows), 0)
        table = self.job.table()
        assert table.column("fallow.row").to_pylist() == list(range(len(self.rows)))
        got = table.column("y").combine_chunks().flatten().to_numpy().reshape(len(self.rows), -1)
        expected = np.roll(self.rows, self.steps, axis=1)[:, : self.outputs]
        assert got.tobytes() == expected.tobytes()
        live = Counter(position for batch in self.job.batches("any") for position in batch["fallow.row"].to_pylist())
        assert live == Counter(range(len(self.rows)))


@dataclass
class Rig:
    """A coordinator with its children, and the workers and the client that the tests share."""

    folder: Path
    service: CoordinatorService
    client: Client
    scratch: Path
    """The workers' TMPDIR: whatever is left there is theirs."""
    workers: dict[str, Service] = field(default_factory=dict[str, Service])
    seen: set[psutil.Process] = field(default_factory=set[psutil.Process])
    """Every process below us that was ever looked at."""
    bundles: dict[tuple[int, int], Bundle] = field(default_factory=dict[tuple[int, int], Bundle])

    def work(self, rows: int, outputs: int = WIDE, *, steps: int = STEPS, seed: int = 0, **options: Any) -> Work:
        """Submits a job."""
        data = rows_of(rows, seed)
        bundle = self.bundle(outputs, steps)
        return Work(self.client.map(bundle, {"x": data}, data="public", **options), data, outputs, steps)

    def bundle(self, outputs: int = WIDE, steps: int = STEPS) -> Bundle:
        """The bundle, made once."""
        key = (outputs, steps)
        if key not in self.bundles:
            self.bundles[key] = turning_bundle(self.folder, outputs, steps=steps)
        return self.bundles[key]

    def look(self) -> list[psutil.Process]:
        """Everything that lives below the coordinator and the workers."""
        found = [process for service in (self.service, *self.workers.values()) for process in service.family()]
        self.seen.update(found)
        return found

    def find(self, word: str, below: Service | None = None) -> list[psutil.Process]:
        """Our processes with that word in their command line or title."""
        everyone = self.look() if below is None else below.family()
        return [process for process in everyone if word in _command(process)]

    def kill(self, word: str, below: Service | None = None, number: int = signal.SIGKILL) -> list[psutil.Process]:
        """`kill -9` of the processes of that name; waits until there is one and until they are gone."""
        self.look()
        victims: list[psutil.Process] = wait_for(lambda: self.find(word, below), PATIENCE_S, f"a process {word}")
        for process in victims:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        wait_for(lambda: not any(lives(process) for process in victims), PATIENCE_S, f"the end of {word}")
        return victims

    def restarted(self, word: str, victims: list[psutil.Process], below: Service | None = None) -> float:
        """Waits until others of that name live; how many seconds it took."""
        began = time.monotonic()
        wait_for(lambda: set(self.find(word, below)) - set(victims), PATIENCE_S, f"another {word}")
        return time.monotonic() - began

    def kill_coordinator(self) -> None:
        """`kill -9` of the coordinator alone."""
        self.look()
        self.service.kill()

    def restart_coordinator(self) -> float:
        """Starts it on the same state; seconds until it is ready."""
        began = time.monotonic()
        self.service = start_coordinator(self.service.state, *ARGUMENTS, operator_worker=True)
        self.look()
        return time.monotonic() - began

    def online(self) -> int:
        """Workers that are connected now, the operator's own not counted."""
        found: list[dict[str, Any]] = self.service.cli("worker", "list").get("workers", [])
        return sum(bool(one["connected"]) and one["tier"] != "TIER_OPERATOR" for one in found)

    def events(self) -> list[ev.Event]:
        """The whole journal."""
        with JournalReader(self.service.state / "journal" / JOURNAL_FILE) as journal:
            return [record.event for record in journal.read(after_sequence=0, limit=10**9)]


@contextlib.contextmanager
def rig(folder: Path, **workers: str) -> Generator[Rig]:
    """An installation while the block runs, with a worker for each `name="arguments of fallow-worker start"`.

    At the end everything is stopped as its owner would, and nothing of it may be left: no process, no temporary file,
    no fault in the journal.
    """
    scratch = Path(tempfile.mkdtemp(prefix="ft-", dir="/tmp"))
    made: Rig | None = None
    try:
        with contextlib.ExitStack() as stack:
            service = start_coordinator(folder / "coordinator", *ARGUMENTS, operator_worker=True)
            stack.callback(lambda: made.service.discard() if made is not None else service.discard())
            client = stack.enter_context(connect(service.facts["client_credentials"]))
            made = Rig(folder, service, client, scratch)
            for name, options in workers.items():
                made.workers[name] = stack.enter_context(a_worker(made, name, *options.split()))
            wait_for(lambda: made.online() == len(workers) or _ended(made), PATIENCE_S, "the workers")
            assert not _ended(made), _ended(made)
            yield made
            made.look()
            for one in made.workers.values():
                assert one.stop() == 0, one.tail()
            assert made.service.stop() == 0, made.service.tail()
        assert_nothing_left(made, scratch)
        report = check_journal(made.service.state / "journal")
        assert not report.faults, report.faults
        assert_settled_once(made.events())
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def a_worker(
    made: Rig, name: str, *arguments: str, scratch: Path | None = None
) -> contextlib.AbstractContextManager[Service]:
    """A worker of its own folder whose temporary files are the rig's, or lie in `scratch`."""
    return worker(made.service, made.folder / name, *arguments, environment={"TMPDIR": str(scratch or made.scratch)})


def assert_nothing_left(made: Rig, scratch: Path) -> None:
    """No process that was ever seen lives, none works in our temporary folder, and that is empty."""
    _, left = psutil.wait_procs([process for process in made.seen if lives(process)], timeout=10)
    left += [process for process in psutil.process_iter() if _works_in(process, str(scratch))]
    assert not left, f"left behind: {[_command(process)[:200] for process in left]}"
    assert not list(scratch.iterdir()), f"left behind: {list(scratch.iterdir())}"


def assert_settled_once(events: list[ev.Event]) -> None:
    """Every task is settled at most once, by a live lease of its own that committed; fences only grow."""
    settled = Counter(event.task_id for event in events if isinstance(event, ev.TaskSettled))
    assert not settled or max(settled.values()) == 1
    granted = {event.lease_id: event for event in events if isinstance(event, ev.LeaseGranted)}
    committed = {event.lease_id for event in events if isinstance(event, ev.CommitmentRecorded)}
    mapped = {event.task_id for event in events if isinstance(event, ev.TaskCreated) and event.job_id is not None}
    fences: dict[str, int] = {}
    ended: set[str] = set()
    for event in events:
        match event:
            case ev.LeaseGranted():
                assert event.fence > fences.get(event.task_id, 0)
                fences[event.task_id] = event.fence
            case ev.TaskSettled():
                assert event.lease_id in committed or event.task_id not in mapped, "inspections answer with a report"
                assert granted[event.lease_id].task_id == event.task_id
                assert event.lease_id not in ended
            case ev.LeaseEnded():
                ended.add(event.lease_id)
            case _:
                pass


def lives(process: psutil.Process) -> bool:
    """It runs, sleeps or is stopped; not a zombie."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def patiently(condition: Callable[[], Any], what: str, patience_s: float = PATIENCE_S) -> float:
    """Seconds until `condition()` was true."""
    began = time.monotonic()
    wait_for(condition, patience_s, what)
    return time.monotonic() - began


def _ended(made: Rig) -> list[str]:
    """The last words of workers that ended at once."""
    return [service.tail() for service in made.workers.values() if not service.running()]


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()) if lives(process) else ""
    except psutil.Error:
        return ""


def _works_in(process: psutil.Process, folder: str) -> bool:
    try:
        if process.pid == os.getpid() or not lives(process):
            return False
        return folder in process.environ().get("TMPDIR", "") or folder in process.cwd()
    except psutil.Error:
        return False


@contextlib.contextmanager
def small_disk(folder: Path, size_bytes: int) -> Generator[Path]:
    """A file system of its own at `folder` while the block runs. Skips the test where none can be mounted."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes},mode=0700", "tmpfs", str(folder)]
    if os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("only root can mount a small file system")
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no small file system can be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@contextlib.contextmanager
def filled(folder: Path, *, leave_bytes: int = 0) -> Generator[Path]:
    """The file system of `folder` has only so much room while the block runs; remove the file to give it back early."""
    ballast = folder / "ballast"
    with ballast.open("wb") as file:
        status = os.statvfs(folder)
        size = status.f_bavail * status.f_frsize - leave_bytes
        os.posix_fallocate(file.fileno(), 0, size)
    try:
        yield ballast
    finally:
        ballast.unlink(missing_ok=True)
