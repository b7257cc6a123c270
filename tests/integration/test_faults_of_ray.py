"""A Ray that is not there or cannot live: words that a person can act on, at start-up and while work waits."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from fallow.limits import MIB
from integration.fault_rig import PATIENCE_S, Rig, a_worker, rig, small_disk
from integration.harness import wait_for

pytestmark = [pytest.mark.processes, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """A coordinator without workers."""
    with rig(tmp_path_factory.mktemp("ray")) as made:
        yield made


def closed_address() -> str:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{closed.getsockname()[1]}"


def test_a_cluster_that_does_not_answer_ends_the_worker_and_the_job_says_what_it_waits_for(made: Rig) -> None:
    address = closed_address()
    work = made.work(100)
    with a_worker(made, "unreachable", "--ray-address", address) as service:
        assert service.process.wait(30) == 1
        words = service.tail()
    assert f"no Ray cluster answers at {address}" in words and "ray start --head" in words
    assert "Traceback" not in words
    wait_for(lambda: "no worker is connected" in work.job.status().reason, PATIENCE_S, "the job's reason")
    with a_worker(made, "willing", "--executor", "process") as willing:
        work.check()
        assert willing.stop() == 0


def test_a_python_without_ray_says_how_to_install_it(made: Rig, tmp_path: Path) -> None:
    # A `ray` that cannot be found: the import system is told so before anything else runs.
    hide = (
        "import importlib.util as util",
        "find = util.find_spec",
        "util.find_spec = lambda name, package=None: None if name == 'ray' else find(name, package)",
    )
    (tmp_path / "sitecustomize.py").write_text("\n".join(hide))
    folder = tmp_path / "worker"
    command = [sys.executable, "-m", "fallow_worker"]
    subprocess.run([*command, "join", made.service.worker_join_line, "--state", str(folder)], check=True, timeout=60)
    done = subprocess.run(
        [*command, "start", "--state", str(folder), "--executor", "ray"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "pip install 'fallow[ray]'" in done.stderr and "--executor process" in done.stderr
    assert "Traceback" not in done.stderr


@contextlib.contextmanager
def own_mounts(script: str) -> Generator[list[str]]:
    """The start of a command that sees mounts of its own, made by `script`. Skips where there can be none."""
    start = ["unshare", "--mount", "--propagation", "private", "sh", "-c", f'{script} && exec "$@"', "sh"]
    if not shutil.which("unshare") or subprocess.run([*start, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no mounts of our own can be had here")
    yield start


def test_shared_memory_too_small_for_ray_costs_speed_and_no_rows(made: Rig, tmp_path: Path) -> None:
    """Ray puts its objects into files then."""
    folder = tmp_path / "worker"
    command = [sys.executable, "-m", "fallow_worker"]
    subprocess.run([*command, "join", made.service.worker_join_line, "--state", str(folder)], check=True, timeout=60)
    log = tmp_path / "worker.log"
    with own_mounts("mount -t tmpfs -o size=1m tmpfs /dev/shm") as start, log.open("wb") as output:
        service = subprocess.Popen(
            [*start, *command, "start", "--state", str(folder), "--executor", "ray"],
            stdout=output, stderr=output, env={**os.environ, "TMPDIR": str(made.scratch)},
        )  # fmt: skip
        try:
            made.work(300, seed=3).check()
        finally:
            service.terminate()
            assert service.wait(60) == 0
    assert "Traceback" not in log.read_text()


def test_a_temporary_folder_without_room_for_ray_is_told(made: Rig) -> None:
    with small_disk(made.scratch / "s", 64 * MIB) as full:
        (full / "ballast").write_bytes(b"\0")
        with a_worker(made, "cramped", "--executor", "ray", scratch=full) as cramped:
            work = made.work(100, seed=4)
            wait_for(lambda: "name another folder with TMPDIR" in work.job.status().reason, PATIENCE_S, "the reason")
            with a_worker(made, "willing-2", "--executor", "process") as willing:
                work.check()
                assert willing.stop() == 0
            assert cramped.running()
            assert cramped.stop() == 0
    (made.scratch / "s").rmdir()
