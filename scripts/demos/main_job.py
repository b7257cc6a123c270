"""The demo: real processes over mTLS label every file of a folder, and nothing is left running."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fallow.client import Bundle, Client, FallowError, FolderSource, Job, Saved, connect

ROOT = Path(__file__).resolve().parent.parent.parent
VOLUNTEERS = 2
START_SECONDS_MAX = 60.0
STOP_SECONDS_MAX = 30.0
LABELS_SHOWN = 8

console = Console(stderr=True, highlight=False)


@dataclass(frozen=True)
class Summary:
    """What the demo found out."""

    folder: str
    rows: int
    failed_rows: int
    seconds: float
    rows_per_s: float
    shares: list[dict[str, Any]]
    labels: dict[str, int]
    policy: str
    price_microcredits: int
    state: str
    output: str


def main() -> int:
    options = parse_options()
    # SIGTERM takes the same way out as Ctrl-C, so that nothing stays behind either way.
    signal.signal(signal.SIGTERM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    try:
        with ExitStack() as stack:
            state = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fallow-demo-")))
            summary = run(options, state, stack)
    except FallowError as error:
        console.print(f"[red]demo failed[/]: {error}")
        return 1
    except KeyboardInterrupt:
        console.print("stopped")
        return 130
    if options.json:
        print(json.dumps(summary.__dict__))
    else:
        show(summary)
    return 0


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/demo", description=__doc__)
    parser.add_argument("--folder", type=Path, help="files to label (default: Python's standard library)")
    parser.add_argument("--output", type=Path, default=ROOT / "out" / "demo.parquet", help="where the result goes")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    return parser.parse_args()


def run(options: argparse.Namespace, state: Path, stack: ExitStack) -> Summary:
    """Starts everything, submits the job, and waits for its result."""
    folder = options.folder or Path(sysconfig.get_paths()["stdlib"])
    source = FolderSource(folder, exclude=() if options.folder else ("site-packages",))
    begun = time.monotonic()
    console.print("starting a coordinator, its operator worker, and two volunteers on Ray …")
    lines = start_coordinator(state, stack)
    with ThreadPoolExecutor(VOLUNTEERS) as pool:
        names = [f"volunteer-{number + 1}" for number in range(VOLUNTEERS)]
        workers = list(pool.map(lambda name: join(state, name, lines["worker"]), names))
    for name in names:
        start_worker(state, name, stack)
    client = stack.enter_context(connect(state / "coordinator" / "client"))
    console.print(f"labelling the files of {folder}")
    submitted = time.monotonic()
    job = client.map(Bundle.magika(), source, data="public", keep=["size_bytes"], title=f"label {folder}")
    saved = follow(client, job, options.output)
    seconds = time.monotonic() - submitted
    console.print(f"everything took {time.monotonic() - begun:.1f} s")
    return summarise(folder, job, saved, seconds, dict(zip(workers, names, strict=True)))


def start_coordinator(state: Path, stack: ExitStack) -> dict[str, str]:
    """Join lines by role, once the coordinator is ready."""
    command = ["fallow-coordinator", "start", "--state", str(state / "coordinator"), "--port", "0", "--json"]
    process = stack.enter_context(child(command, state / "coordinator.log", stdout=subprocess.PIPE))
    assert process.stdout is not None
    ready = process.stdout.readline()
    if not ready:
        raise SystemExit(f"the coordinator did not start:\n{(state / 'coordinator.log').read_text()}")
    facts = json.loads(ready)
    return {"worker": facts["worker_join_line"], "client": facts["client_join_line"]}


def join(state: Path, name: str, line: str) -> str:
    """Enrols a volunteer; its id."""
    command = [tool("fallow-worker"), "join", line, "--state", str(state / name), "--name", name, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=START_SECONDS_MAX, check=False)
    if done.returncode:
        raise SystemExit(f"{name} could not join:\n{done.stderr}")
    return str(json.loads(done.stdout)["worker_id"])


def start_worker(state: Path, name: str, stack: ExitStack) -> None:
    """A volunteer with its share of this machine's cores."""
    cores = max(1, len(os.sched_getaffinity(0)) // VOLUNTEERS)
    command = ["fallow-worker", "start", "--state", str(state / name), "--executor", "ray", "--cpus", str(cores)]
    stack.enter_context(child(command, state / f"{name}.log"))


def follow(client: Client, job: Job, output: Path) -> Saved:
    """Shows a progress bar until the job has ended, then saves its result."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("rows"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=False) as progress:
        bar = progress.add_task("waiting for work to start", total=None)
        for status in job.statuses():
            rows = status.progress
            said = status.reason or status.state.value
            progress.update(bar, total=rows.rows_total, completed=rows.rows_done, description=said)
    job.wait()
    output.parent.mkdir(parents=True, exist_ok=True)
    return job.save(output)


def summarise(folder: Path, job: Job, saved: Saved, seconds: float, names: dict[str, str]) -> Summary:
    """The figures, counted from what was saved."""
    status = job.status()
    table = pq.read_table(saved.path, columns=["label"])
    labels = Counter(label for label in table.column("label").to_pylist() if label is not None)
    shares = [
        {"worker": names.get(share.worker_id, share.worker_id), "node": share.node, "rows": share.rows}
        for share in saved.shares
    ]
    return Summary(
        folder=str(folder),
        rows=saved.rows,
        failed_rows=saved.failed_rows,
        seconds=round(seconds, 2),
        rows_per_s=round(saved.rows / seconds, 1),
        shares=shares,
        labels=dict(labels.most_common()),
        policy=status.policy,
        price_microcredits=status.price_microcredits,
        state=status.state.value,
        output=str(saved.path),
    )


def show(summary: Summary) -> None:
    """The summary for people."""
    print(f"{summary.rows} files labelled in {summary.seconds} s: {summary.rows_per_s} rows/s")
    if summary.failed_rows:
        print(f"{summary.failed_rows} files failed; see the side file next to the result")
    for share in summary.shares:
        print(f"  {share['worker']}, node {share['node']}: {share['rows']} rows")
    shown = list(summary.labels.items())[:LABELS_SHOWN]
    more = len(summary.labels) - len(shown)
    print(
        "labels: "
        + ", ".join(f"{label} {count}" for label, count in shown)
        + (f", and {more} more" if more > 0 else "")
    )
    print(f"policy {summary.policy}, price {summary.price_microcredits / 1_000_000:g} credits")
    print(f"result: {summary.output}")


def tool(name: str) -> str:
    """Our console script beside this interpreter."""
    return str(Path(sys.executable).parent / name)


@contextmanager
def child(command: list[str], log: Path, stdout: int | None = None) -> Iterator[subprocess.Popen[str]]:
    """A process that is stopped on the way out, and whose log is shown when it ended by itself."""
    with log.open("w") as errors:
        process = subprocess.Popen(
            [tool(command[0]), *command[1:]],
            stdin=subprocess.DEVNULL,
            stdout=stdout if stdout is not None else errors,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        if process.poll() is not None:
            console.print(f"{' '.join(command[:2])} ended early with {process.returncode}:\n{log.read_text()[-2000:]}")
        process.terminate()
        try:
            process.wait(STOP_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            console.print(f"{command[0]} did not stop within {STOP_SECONDS_MAX:.0f} s and was killed")
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


if __name__ == "__main__":
    sys.exit(main())
