"""What a locked-down child does: takes messages one by one, loads its bundle, runs blocks, answers."""

from __future__ import annotations

import importlib
import mmap
import os
import resource
import struct
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from fallow.errors import FallowError, Reason
from fallow.limits import BLOCK_BYTES_MAX, BLOCK_ROWS_MAX
from fallow.row_block import RowBlock
from fallow.session import Cause, Usage
from fallow_worker.engine import challenge, check, frames
from fallow_worker.engine.chain import Chain
from fallow_worker.engine.onnx_program import execution_class
from fallow_worker.engine.protocol import (
    PLACEMENT_ALIGNMENT_BYTES,
    PROGRESS_INTERVAL_MS,
    Answered,
    Challenge,
    Check,
    Checked,
    ChildArguments,
    ChildKind,
    Done,
    Failed,
    FilePlacement,
    FromChild,
    Inspect,
    Inspected,
    Load,
    Loaded,
    Placement,
    Progress,
    Referee,
    Refereed,
    Run,
    ToChild,
    lanes_of,
)

_FAULTS_OF_TASKS = frozenset({Reason.ROW_BLOCK_MALFORMED, Reason.SCHEMA_MISMATCH, Reason.FIELD_INVALID})
"""Reasons for which the program is not to blame: the block or the message was wrong."""


class Worker:
    """A locked-down child at work."""

    def __init__(self, arguments: ChildArguments, machine_class: str) -> None:
        self._arguments = arguments
        self._machine_class = machine_class
        self._chain: Chain | None = None

    def send(self, message: FromChild) -> None:
        """Sends one message. Raises BrokenPipeError when the supervisor is gone."""
        view = memoryview(frames.encode_frame(message))
        while view:
            view = view[os.write(self._arguments.control_fd, view) :]

    def serve(self) -> None:
        """Answers messages until the supervisor closes the socket. Raises FrameError for what is no message."""
        while (message := self._receive()) is not None:
            task = message.task if isinstance(message, Run) else ""
            try:
                answer = self._answer(message)
            except FallowError as error:
                answer = _failed(task, error)
            except MemoryError:
                answer = _out_of_memory(task)
            self.send(answer)

    def _answer(self, message: ToChild) -> FromChild:
        match message:
            case Load():
                return self._load(message)
            case Run():
                return self._run(message)
            case Inspect():
                return self._inspect(message)
            case Challenge():
                return self._challenge(message)
            case Check():
                return self._check(message)
            case Referee():
                return self._referee(message)

    def _receive(self) -> ToChild | None:
        header = self._read(frames.LENGTH_BYTES)
        if header is None:
            return None
        body = self._read(frames.frame_length(header))
        return None if body is None else frames.decode_to_child(body)

    def _read(self, length: int) -> bytes | None:
        data = b""
        while len(data) < length:
            piece = os.read(self._arguments.control_fd, length - len(data))
            if not piece:
                return None
            data += piece
        return data

    # --------------------------------------------------------------------------------------------------- messages

    def _load(self, message: Load) -> Loaded:
        if self._chain is not None or self._arguments.options.kind is not ChildKind.RUN:
            raise frames.FrameError("Load comes once, to a child that runs")
        started = time.monotonic()
        options = self._arguments.options
        chain = Chain(
            message.manifest,
            self.files(message.files),
            input_schema_digest=message.input_schema_digest,
            output_schema_digest=message.output_schema_digest,
            batch_rows=message.canonical_batch_rows,
            slot_dependent=message.slot_dependent,
            neighbour_dependent=message.neighbour_dependent,
            threads=options.threads,
            lanes=lanes_of(options),
            allow_spinning=options.allow_spinning,
        )
        chain.warm_up()
        chain.tune(message.setting, measures=message.measures)
        self._chain = chain
        return Loaded(
            canonical_batch_rows=chain.batch_rows,
            execution_class=execution_class(
                self._machine_class, precision=message.manifest.precision.value, batch_rows=chain.batch_rows
            ),
            load_ms=int((time.monotonic() - started) * 1000),
            memory_bytes=memory_bytes_peak(),
        )

    def _run(self, message: Run) -> Done:
        if self._chain is None:
            raise frames.FrameError("Run comes after Loaded")
        clock = UsageClock()
        with _Mapped(self._arguments.input_fd, message.input, BLOCK_BYTES_MAX) as view:
            slots = self._slots(message.slots)
            result = self._chain.run(
                RowBlock.parse(view),
                nonce=message.nonce,
                slots=slots,
                output_bytes_max=message.output.length_bytes,
                progress=self._told_at_times(message.task),
            )
        self._write(message.output.offset_bytes, result.block)
        return Done(
            task=message.task,
            output_bytes=len(result.block),
            rows=result.rows,
            failed_rows=result.failed_rows,
            failures=result.failures,
            usage=clock.usage(),
            tuned=self._chain.newly_tuned(),
        )

    def _inspect(self, message: Inspect) -> Inspected:
        if self._arguments.options.kind is not ChildKind.INSPECT:
            raise frames.FrameError("Inspect goes to a child that was spawned for it")
        clock = UsageClock()
        inspection: Any = importlib.import_module("fallow_worker.engine.inspection")
        sample: RowBlock | None = None
        if message.sample is not None:
            sample = RowBlock.parse(self._bytes(message.sample, BLOCK_BYTES_MAX))
        report = inspection.inspect(
            message,
            self.files(message.files),
            sample=sample,
            options=self._arguments.options,
            machine_class=self._machine_class,
            progress=self._inspected_so_far,
        )
        return Inspected(report, clock.usage())

    def _challenge(self, message: Challenge) -> Answered:
        self._check_fresh()
        clock = UsageClock()
        options = self._arguments.options
        block = challenge.answer(
            message.plan,
            threads=message.threads,
            allow_spinning=options.allow_spinning,
            nonce=message.nonce,
            progress=self._told_at_times(""),
        )
        self._write(0, block)
        return Answered(len(block), clock.usage(), self._machine_class)

    def _check(self, message: Check) -> Checked:
        self._check_fresh()
        clock = UsageClock()
        block = RowBlock.parse(self._bytes(message.answer, BLOCK_BYTES_MAX))
        return Checked(check.verdict(message.plan, block, message.entropy), clock.usage())

    def _referee(self, message: Referee) -> Refereed:
        if self._arguments.options.kind is not ChildKind.INSPECT:
            raise frames.FrameError("Referee goes to a child that can take programs apart")
        clock = UsageClock()
        referee: Any = importlib.import_module("fallow_worker.engine.referee")
        found = referee.compare(
            message,
            files=self.files(message.files),
            blocks=referee.Blocks(
                input=RowBlock.parse(self._bytes(message.input, BLOCK_BYTES_MAX)),
                own=RowBlock.parse(self._bytes(message.own, BLOCK_BYTES_MAX)),
                candidates=tuple(RowBlock.parse(self._bytes(one.block, BLOCK_BYTES_MAX)) for one in message.candidates),
                slots=self._slots(message.slots),
            ),
            progress=self._told_at_times(""),
        )
        return Refereed(found.rows, found.spread, clock.usage())

    def _check_fresh(self) -> None:
        if self._chain is not None or self._arguments.options.kind is not ChildKind.RUN:
            raise frames.FrameError("measuring is for a child of its own")

    def _told_at_times(self, task: str) -> Callable[[int], None]:
        """Tells of rows or steps done, however many there are, no oftener than each `PROGRESS_INTERVAL_MS`."""
        reported = time.monotonic()

        def progress(done: int) -> None:
            nonlocal reported
            now = time.monotonic()
            if (now - reported) * 1000 >= PROGRESS_INTERVAL_MS:
                reported = now
                self.send(Progress(task, done))

        return progress

    def _inspected_so_far(self, steps: int) -> None:
        self.send(Progress("", steps))

    # ----------------------------------------------------------------------------------------------------- memory

    def files(self, placements: Sequence[FilePlacement]) -> dict[str, bytes]:
        """The bundle's files by name, copied out of the input memory."""
        return {file.name: self._bytes(file.place, sys.maxsize) for file in placements}

    def _bytes(self, place: Placement, limit: int) -> bytes:
        _check_place(place, limit)
        pieces: list[bytes] = []
        got = 0
        while got < place.length_bytes:
            piece = os.pread(self._arguments.input_fd, place.length_bytes - got, place.offset_bytes + got)
            if not piece:
                raise frames.FrameError(f"the input memory ends before {place.offset_bytes + place.length_bytes}")
            pieces.append(piece)
            got += len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _slots(self, place: Placement | None) -> Sequence[int] | None:
        if place is None:
            return None
        data = self._bytes(place, 4 * BLOCK_ROWS_MAX)
        return struct.unpack(f"<{len(data) // 4}I", data[: len(data) // 4 * 4])

    def _write(self, offset: int, data: bytes) -> None:
        view = memoryview(data)
        while view:
            written = os.pwrite(self._arguments.output_fd, view, offset)
            view = view[written:]
            offset += written


class UsageClock:
    """Wall time and CPU time of all threads since it was made."""

    def __init__(self) -> None:
        self._wall_ns = time.monotonic_ns()
        self._cpu_ns = time.process_time_ns()

    def usage(self) -> Usage:
        """What was used so far."""
        return Usage(
            wall_microseconds=(time.monotonic_ns() - self._wall_ns) // 1000,
            cpu_microseconds=(time.process_time_ns() - self._cpu_ns) // 1000,
            memory_bytes_peak=memory_bytes_peak(),
        )


def memory_bytes_peak() -> int:
    """The largest resident size of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class _Mapped:
    """A place of the input memory as a read-only view, unmapped at the end."""

    def __init__(self, descriptor: int, place: Placement, limit: int) -> None:
        _check_place(place, limit)
        self._map = mmap.mmap(
            descriptor, place.length_bytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ, offset=place.offset_bytes
        )

    def __enter__(self) -> memoryview:
        return memoryview(self._map)

    def __exit__(self, *_: object) -> None:
        # Views into the map may outlive an exception's traceback; the map then goes with the last of them.
        try:
            self._map.close()
        except BufferError:
            return


def _check_place(place: Placement, limit: int) -> None:
    if not 0 < place.length_bytes <= limit or place.offset_bytes < 0:
        raise frames.FrameError(f"a placement of {place.length_bytes} bytes at {place.offset_bytes}")
    if place.offset_bytes % PLACEMENT_ALIGNMENT_BYTES:
        raise frames.FrameError(f"a placement at {place.offset_bytes}, no multiple of {PLACEMENT_ALIGNMENT_BYTES}")


def _failed(task: str, error: FallowError) -> Failed:
    cause = Cause.PLATFORM if error.reason in _FAULTS_OF_TASKS else Cause.PROGRAM
    return Failed(task, cause, error.reason, error.message, error.field, error.limit, error.hint)


def _out_of_memory(task: str) -> Failed:
    return Failed(
        task,
        Cause.PROGRAM,
        Reason.LIMIT_EXCEEDED,
        "the program needs more memory than it was given",
        field="memory",
        hint="a smaller batch or a smaller model",
    )
