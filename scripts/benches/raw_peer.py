"""The peer: ONNX Runtime alone in child processes, with the same codec and labels, at its best batch and threads."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import statistics
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from scripts.benches.report import say

from fallow.bundle import BundleManifest, BytesCodec, ProgramStage, TopKHead
from fallow.bundle_file import Bundle

BATCHES = (1, 2, 4, 8, 16, 32)
CHUNK_ROWS = 64
"""Rows that a child takes at a time; few enough that all children end together."""
TRIAL_ROWS = 256
FINAL_ROWS = 768
FINALISTS = 3
FINAL_ROUNDS = 3

Labelled = tuple[str, float]


@dataclass(frozen=True, slots=True)
class Setting:
    """How raw ONNX Runtime is run."""

    processes: int
    threads: int
    batch_rows: int

    def __str__(self) -> str:
        return f"{self.processes} x {self.threads} threads, batch {self.batch_rows}"


@dataclass(frozen=True, slots=True)
class _Run:
    """To a child: work on the rows it has until none is left."""

    setting: Setting


class RawPeer:
    """Child processes with loaded sessions; one run at a time."""

    def __init__(self, connections: Sequence[Connection], next_row: Any, cores: int) -> None:
        """Call `raw_peer`."""
        self._connections = connections
        self._next_row = next_row
        self._cores = cores

    def load(self, rows: Sequence[bytes]) -> None:
        """Puts rows into every child's memory; outside of what is timed."""
        for connection in self._connections:
            connection.send(list(rows))
        for connection in self._connections:
            connection.recv()

    def run(self, setting: Setting) -> tuple[float, list[Labelled]]:
        """Seconds for all loaded rows, and their labels and scores in order."""
        self._next_row.value = 0
        at_work = self._connections[: setting.processes]
        began = time.perf_counter()
        for connection in at_work:
            connection.send(_Run(setting))
        pieces: dict[int, list[Labelled]] = {}
        for connection in at_work:
            pieces |= connection.recv()
        labelled = [one for start in sorted(pieces) for one in pieces[start]]
        return time.perf_counter() - began, labelled

    def best_setting(self, contents: Sequence[bytes]) -> Setting:
        """The fastest of all batches, with one process of all threads or a process for each core."""
        shapes = {(1, self._cores), (self._cores, 1)}
        settings = [Setting(processes, threads, batch) for processes, threads in sorted(shapes) for batch in BATCHES]
        self.load(contents[:TRIAL_ROWS])
        trials = {setting: self.run(setting)[0] for setting in settings for _ in range(2)}
        finalists = sorted(settings, key=lambda setting: trials[setting])[:FINALISTS]
        self.load(contents[:FINAL_ROWS])
        rounds: dict[Setting, list[float]] = {setting: [] for setting in finalists}
        for _ in range(FINAL_ROUNDS):
            for setting in finalists:
                rounds[setting].append(self.run(setting)[0])
        best = min(finalists, key=lambda setting: statistics.median(rounds[setting]))
        rows_per_s = min(FINAL_ROWS, len(contents)) / statistics.median(rounds[best])
        say(f"raw ONNX Runtime is fastest with {best}: {rows_per_s:.0f} rows/s")
        return best


@contextlib.contextmanager
def raw_peer(bundle: Bundle) -> Generator[RawPeer, None, None]:
    """The peer while the block runs, with as many processes as there are cores."""
    cores = len(os.sched_getaffinity(0))
    spawn = multiprocessing.get_context("spawn")
    next_row = spawn.Value("q", 0)
    files = {name: _content(bundle, name) for name in bundle.files}
    children: list[Any] = []
    connections: list[Connection] = []
    try:
        for _ in range(cores):
            ours, theirs = spawn.Pipe()
            child = spawn.Process(target=_serve, args=(theirs, next_row, bundle.manifest, files, cores), daemon=True)
            child.start()
            theirs.close()
            children.append(child)
            connections.append(ours)
        for connection in connections:
            connection.recv()
        yield RawPeer(connections, next_row, cores)
    finally:
        for connection in connections:
            connection.close()
        for child in children:
            child.join(10)
            if child.is_alive():
                child.kill()
                child.join()


def _content(bundle: Bundle, name: str) -> bytes:
    source = bundle.files[name]
    return source if isinstance(source, bytes) else source.read_bytes()


def _serve(
    connection: Connection, next_row: Any, manifest: BundleManifest, files: dict[str, bytes], cores: int
) -> None:
    """A child's life: takes rows, runs them, says what they are."""
    program = _Program(manifest, files, cores)
    connection.send("ready")
    rows: list[bytes] = []
    while True:
        try:
            message = connection.recv()
        except EOFError:
            return
        if isinstance(message, _Run):
            connection.send(_labelled(program, rows, next_row, message.setting))
        else:
            rows = message
            connection.send("loaded")


def _labelled(program: _Program, rows: list[bytes], next_row: Any, setting: Setting) -> dict[int, list[Labelled]]:
    found: dict[int, list[Labelled]] = {}
    step = max(CHUNK_ROWS // setting.batch_rows, 1) * setting.batch_rows
    while True:
        with next_row.get_lock():
            start = next_row.value
            next_row.value = start + step
        if start >= len(rows):
            return found
        found[start] = program.labels(rows[start : start + step], setting)


class _Program:
    """The bundle's three stages without anything around them."""

    def __init__(self, manifest: BundleManifest, files: dict[str, bytes], cores: int) -> None:
        import onnxruntime

        from fallow_worker.engine import stages

        codec, program, head = manifest.stages
        assert isinstance(codec, BytesCodec) and isinstance(program, ProgramStage) and isinstance(head, TopKHead)
        self._stages = stages
        self._codec = codec
        self._names = stages.labels_of(files[head.labels_file], name=head.labels_file)
        self._input = program.inputs[0].tensor
        self._output = program.outputs[0].tensor
        self._sessions: dict[int, Any] = {}
        for threads in {1, cores}:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads
            options.inter_op_num_threads = 1
            self._sessions[threads] = onnxruntime.InferenceSession(
                files[program.file], options, providers=["CPUExecutionProvider"]
            )

    def labels(self, rows: list[bytes], setting: Setting) -> list[Labelled]:
        """Label and score of each row."""
        session = self._sessions[setting.threads]
        tokens = self._stages.bytes_tokens(self._codec, rows)
        found: list[Labelled] = []
        for start in range(0, len(rows), setting.batch_rows):
            (scores,) = session.run([self._output], {self._input: tokens[start : start + setting.batch_rows]})
            best = self._stages.top_k(scores, 1)
            found += zip(
                (self._names[index] for index in best.indexes[:, 0].tolist()), best.scores[:, 0].tolist(), strict=True
            )
        return found
