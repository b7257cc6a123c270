"""One volunteer that skips rows, caught: real processes over mTLS, and the evidence that convicts it."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from fallow.client import Bundle, FallowError, Job, JobState, connect

ROOT = Path(__file__).resolve().parent.parent.parent
TESTS = ROOT / "tests"
sys.path[:0] = [str(ROOT), str(TESTS)]

from scripts.demos.main_job import START_SECONDS_MAX, child, console, join, start_coordinator, tool  # noqa: E402

from engine_models import FEATURES, dense_model  # noqa: E402 - beside the tests
from fallow.machine_identity import MACHINE_VARIABLE  # noqa: E402

ROWS = 64
CHEAT = "skips-50"
PATIENCE_S = 100.0
START = ("--executor", "process", "--cpus", "1", "--slots", "1")


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/demo --cheater", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    parser.add_argument("--certificate", type=Path, default=Path("out/cheater.json"), help="where the evidence goes")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    try:
        with ExitStack() as stack:
            state = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fallow-cheater-")))
            facts = run(options.certificate, state, stack)
    except FallowError as error:
        console.print(f"[red]demo failed[/]: {error}")
        return 1
    except KeyboardInterrupt:
        console.print("stopped")
        return 130
    if options.json:
        print(json.dumps(facts))
    else:
        show(facts)
    return 0 if facts["caught"] else 1


def run(certificate: Path, state: Path, stack: ExitStack) -> dict[str, Any]:
    """Starts everything, lets the cheater work first, then an honest volunteer, and takes the certificate."""
    begun = time.monotonic()
    console.print("starting a coordinator and its operator worker …")
    start_coordinator(state, stack)
    model = state / "model.onnx"
    model.write_bytes(dense_model())
    rows = {"x": np.random.default_rng().random((ROWS, FEATURES), np.float32)}
    # The daemon is the real one; its owner changes what the engine gave before it is committed to.
    os.environ["PYTHONPATH"] = os.pathsep.join((str(TESTS), os.environ.get("PYTHONPATH", "")))
    cheat = [sys.executable, "-m", "adversarial.cheating_daemon", CHEAT]
    cheater = join_and_start(state, "cheater", cheat, stack)
    client = stack.enter_context(connect(state / "coordinator" / "client"))
    job = client.map(Bundle.from_onnx(model), rows, data="public", title="caught", assurance="standard")
    console.print(f"a volunteer that makes up half of its answers takes job {job.id} …")
    wait(lambda: job.status().progress.rows_done > 0)
    console.print(
        "an honest one joins; rows are drawn for other workers and for the referee, and nobody is told which …"
    )
    join_and_start(state, "honest", [tool("fallow-worker")], stack)
    wait(lambda: job.status().state is JobState.SUCCEEDED)
    evidence = job.certificate()
    certificate.parent.mkdir(parents=True, exist_ok=True)
    evidence.save(certificate)
    return told(job, evidence.facts, cheater, certificate, time.monotonic() - begun)


def join_and_start(state: Path, name: str, command: list[str], stack: ExitStack) -> str:
    """A volunteer with an account and, as far as anybody can tell, a machine of its own; its id."""
    token = [tool("fallow-coordinator"), "token", "new", "--role", "worker", "--tier", "volunteer", "--json"]
    token += ["--state", str(state / "coordinator")]
    made = subprocess.run(token, capture_output=True, text=True, timeout=START_SECONDS_MAX, check=True)
    os.environ[MACHINE_VARIABLE] = name
    worker_id = join(state, name, json.loads(made.stdout)["join_line"])
    start = [*command, "start", "--state", str(state / name), *START]
    stack.enter_context(child([Path(start[0]).name, *start[1:]], state / f"{name}.log"))
    return worker_id


def wait(condition: Callable[[], bool]) -> None:
    """Returns when it is so. Raises SystemExit when that takes too long."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"waited {PATIENCE_S:.0f} s in vain")
        time.sleep(0.1)


def told(job: Job, certificate: Mapping[str, Any], cheater: str, path: Path, seconds: float) -> dict[str, Any]:
    """What the certificate says of it."""
    verification = certificate["verification"]
    verdicts = [one for one in verification["verdicts"] if one["verdict"] == "proven-wrong"]
    corrections = [span for one in verification["corrections"] for span in one["positions"]]
    return {
        "caught": [one["worker_id"] for one in verification["distrusted"]] == [cheater],
        "cheater": cheater,
        "job_id": job.id,
        "rows": certificate["job"]["rows"],
        "rows_withdrawn": sum(end - start for start, end in corrections),
        "audits": len(verification["audits"]),
        "referee_reports": len(verification["referee_reports"]),
        "proven_wrong": verdicts,
        "reason": verification["distrusted"][0]["reason"] if verification["distrusted"] else "",
        "bounds": verification["bounds"],
        "certificate": str(path),
        "seconds": round(seconds, 1),
    }


def show(facts: Mapping[str, Any]) -> None:
    """The evidence for people."""
    print(f"{facts['cheater']} was {'caught' if facts['caught'] else 'NOT caught'} within {facts['seconds']} s")
    print(f"  {facts['audits']} audits, {facts['referee_reports']} reports of the referee; {facts['reason']}")
    for verdict in facts["proven_wrong"][:8]:
        print(f"  row {verdict['row']} of lease {verdict['lease_id']}: {verdict['verdict']}, as journal record "
              f"{verdict['record']} says")  # fmt: skip
    print(f"  {facts['rows_withdrawn']} of its rows were withdrawn and done again; all {facts['rows']} rows are there")
    print(f"evidence: {facts['certificate']}; `fallow verify` checks it against the authority of its coordinator")


if __name__ == "__main__":
    sys.exit(main())
