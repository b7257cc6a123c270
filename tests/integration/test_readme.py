"""The README is run as it stands: a newcomer's model, a newcomer's rows, in a fresh clone."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
SECTION = "## Run your own model over your own rows"
JOIN_LINE = re.compile(r"fallow1_[A-Za-z0-9_-]+")
PATIENCE_S = 60.0

pytestmark = pytest.mark.processes


def blocks(language: str) -> list[str]:
    """Fenced blocks of the README from the section on, in order."""
    text = (ROOT / "README.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text[text.index(SECTION) :], flags=re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh clone whose `.venv` runs the clone's own code and borrows this environment's dependencies."""
    folder = tmp_path_factory.mktemp("readme") / "fallow"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(folder)], check=True)
    # What is being worked on is what is tried.
    shutil.copy(ROOT / "README.md", folder / "README.md")
    for room in ("sdk", "coordinator", "worker"):
        shutil.rmtree(folder / room)
        shutil.copytree(ROOT / room, folder / room, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / ".venv")], check=True)
    paths = [str(folder / room) for room in ("sdk", "coordinator", "worker")] + [sysconfig.get_paths()["purelib"]]
    site = next((folder / ".venv/lib").glob("python3*/site-packages"))
    (site / "clone.pth").write_text("\n".join(paths))
    for name, module in (
        ("fallow", "fallow.cli.__main__"),
        ("fallow-worker", "fallow_worker.__main__"),
        ("fallow-coordinator", "fallow_coordinator.__main__"),
    ):
        script = folder / ".venv/bin" / name
        script.write_text(f"#!{folder}/.venv/bin/python\nimport sys\nfrom {module} import main\nsys.exit(main())\n")
        script.chmod(0o755)
    (folder / "scripts/environment").write_text("#!/bin/sh\n")  # its work is done above
    return folder


@contextmanager
def background(command: str, cwd: Path, environment: dict[str, str], log: Path) -> Generator[None, None, None]:
    with log.open("w") as output:
        process = subprocess.Popen(
            ["bash", "-ec", f"exec {command}"], cwd=cwd, env=environment, stdout=output, stderr=output
        )
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) in (0, -signal.SIGTERM, 143), log.read_text()


def wait_for_line(log: Path) -> str:
    """The first join line printed: the worker's."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        found = JOIN_LINE.search(log.read_text())
        if found:
            return found.group()
        time.sleep(0.05)
    raise AssertionError(f"no join line within {PATIENCE_S} s:\n{log.read_text()}")


def test_a_newcomer_gets_from_model_to_result(clone: Path, tmp_path: Path) -> None:
    make, start, lend, submit = blocks("sh")
    python, study = blocks("python")
    place = tmp_path / "try"
    environment = {
        "HOME": str(tmp_path / "home"),
        "PATH": f"{clone}/.venv/bin:{os.environ['PATH']}",
        "LANG": "C.UTF-8",
    }
    (tmp_path / "home").mkdir()

    def run(script: str, cwd: Path) -> None:
        done = subprocess.run(
            ["bash", "-ec", script], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"

    run(make.replace("/tmp/fallow-try", str(place)), clone)
    with ExitStack() as stack:
        log = tmp_path / "coordinator.log"
        stack.enter_context(background(f"{start.strip()} --port 0", place, environment, log))
        join, work = lend.strip().splitlines()
        run(join.replace("LINE", wait_for_line(log)), place)
        stack.enter_context(background(work, place, environment, tmp_path / "worker.log"))
        run(submit, place)
        (place / "rows.py").write_text(python)
        run("python rows.py", place)
    (place / "study.py").write_text(study)
    run("python study.py", place)

    rows, out = pq.read_table(place / "rows.parquet"), pq.read_table(place / "out.parquet")
    assert out.column("id").to_pylist() == rows.column("id").to_pylist()
    probabilities = np.stack(out.column("probabilities").to_numpy())
    weights = np.random.default_rng(7).normal(size=(4, 3)).astype(np.float32)
    logits = np.stack(rows.column("features").to_numpy()) @ weights
    expected = np.exp(logits - logits.max(axis=1, keepdims=True))
    expected /= expected.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(probabilities, expected, rtol=1e-4, atol=1e-6)
    assert pq.read_table(place / "again.parquet").equals(out)
