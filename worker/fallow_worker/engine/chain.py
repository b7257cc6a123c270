"""A bundle ready to run: its stages one after the other over row blocks, in batches of exactly b rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, cast

import numpy as np
from numpy.typing import NDArray

from fallow.bundle import BundleManifest, BytesCodec, ProgramFormat, ProgramStage, SoftmaxHead, TopKHead
from fallow.errors import FallowError, Reason
from fallow.ids import Digest
from fallow.limits import BLOCK_BYTES_MAX, MIB, ROW_FAILURES_LISTED_PER_TASK_MAX
from fallow.row_block import RowBlock, block_bytes
from fallow.row_values import ColumnValues, numpy_dtype
from fallow.rows import DecodedRows, RowCodec
from fallow.schema import BytesColumn, TensorColumn
from fallow.session import Cause, RowFailure
from fallow_worker.engine import stages
from fallow_worker.engine.chain_types import (
    canonical_batch,
    check_output,
    check_types,
    content_column,
    file_of,
    fixed_batch_of,
    skippable_bytes,
)
from fallow_worker.engine.lanes import Answer, Lanes
from fallow_worker.engine.onnx_program import OnnxProgram
from fallow_worker.engine.protocol import (
    FAILING_ROWS_GIVEN_UP_AFTER,
    WARM_UP_BATCHES,
    Setting,
    Tuned,
    clipped_reason,
)
from fallow_worker.engine.synthetic import INTEGER_TOPS, synthetic_rows

Array = NDArray[Any]

CHUNK_BYTES: Final = 8 * MIB
"""Decoded values held at once, about: a block's rows may grow manyfold when a codec unfolds them."""
CHUNK_ROWS_MAX: Final = 4096

EMPTY_SLOT: Final = -1

Watch = Callable[[NDArray[np.int64], Mapping[str, Array]], None]
"""Sees every tensor of some batches: the row of the block in each place, or EMPTY_SLOT, and the values by name."""


@dataclass(frozen=True, slots=True)
class ChainResult:
    """The output block, and the rows that have none."""

    block: bytes
    rows: int
    failed_rows: int
    failures: tuple[RowFailure, ...]
    """The first ones in row order, as many as the protocol lists."""


@dataclass(slots=True)
class _Task:
    """One block on its way through the chain."""

    decoded: DecodedRows
    ordinal: NDArray[np.int64]
    """Where row i stands among the decoded ones; -1 when it does not."""
    columns: dict[str, ColumnValues]
    """The output columns, one value for each row of the block."""
    failures: dict[int, RowFailure]
    programs_failing: int = 0
    """Rows that failed alone, before any row or batch of this task went well."""
    any_went_well: bool = False
    rows_done: int = 0


@dataclass(slots=True)
class _Chunk:
    """Some batches of a task."""

    rows: NDArray[np.int64]
    """The row of the block in each place, or EMPTY_SLOT."""
    tensors: dict[str, Array]
    contents: dict[str, Sequence[bytes]]
    labels: dict[str, list[str]] = field(default_factory=dict[str, list[str]])


class Chain:
    """The stages of one bundle, loaded and checked."""

    def __init__(
        self,
        manifest: BundleManifest,
        files: Mapping[str, bytes],
        *,
        input_schema_digest: Digest,
        output_schema_digest: Digest,
        batch_rows: int,
        slot_dependent: bool = False,
        neighbour_dependent: bool = False,
        threads: int = 1,
        lanes: int = 1,
        allow_spinning: bool = False,
        optimised: bool = True,
    ) -> None:
        """Loads every program. Raises BUNDLE_INVALID or PROGRAM_REFUSED naming what is wrong.

        `batch_rows` is b; 0 takes the programs' own fixed batch, else 1. `files` may be dropped afterwards.
        """
        self.manifest = manifest
        self._input = RowCodec(manifest.input_schema, input_schema_digest)
        self._output = RowCodec(manifest.output_schema, output_schema_digest)
        self._programs: dict[int, OnnxProgram] = {}
        self._labels: dict[int, list[str]] = {}
        for index, stage in enumerate(manifest.stages):
            if isinstance(stage, ProgramStage):
                if stage.format is not ProgramFormat.ONNX:
                    raise FallowError(
                        Reason.BUNDLE_INVALID,
                        f"programs of format {stage.format.value!r} do not run here",
                        field=f"stages[{index}].format",
                        limit=ProgramFormat.ONNX.value,
                    )
                model = file_of(files, stage.file, f"stages[{index}].file")
                self._programs[index] = OnnxProgram(
                    model, stage, threads=threads, lanes=lanes, allow_spinning=allow_spinning, optimised=optimised
                )
            elif isinstance(stage, TopKHead):
                content = file_of(files, stage.labels_file, f"stages[{index}].labels_file")
                self._labels[index] = stages.labels_of(content, name=stage.labels_file)
        check_types(manifest, self._programs, self._labels)
        self.fixed_batch = fixed_batch_of(self._programs)
        self.batch_rows = canonical_batch(batch_rows, self.fixed_batch, neighbour_dependent=neighbour_dependent)
        self.slot_dependent = slot_dependent
        self._short_bytes_max = skippable_bytes(manifest)
        self._zeros_failed: str | None = None
        self._lanes = Lanes(threads=threads, lanes=lanes)
        self._wide_has_other_bits = True
        """Until it was looked at."""

    # ---------------------------------------------------------------------------------------------------- running

    def warm_up(self) -> None:
        """Runs zeros through the whole chain. Raises BUNDLE_INVALID when outputs are not what the schema says.

        A program may well fail on zeros and still be sound; then it is warm enough.
        """
        if self._zeros_failure() is not None:
            return
        self._check_threads()
        zeros = self.zero_rows(self.batch_rows)
        started = time.perf_counter()
        for _ in range(WARM_UP_BATCHES):
            self.run_batch(zeros, wide=False)
        seconds = (time.perf_counter() - started) / WARM_UP_BATCHES
        self._lanes.warmed(seconds)

    def tune(self, setting: Setting | None, *, measures: bool) -> None:
        """Runs as was measured before, or measures on the next rows what is best. Neither changes a bit."""
        if self._zeros_failure() is None and len(self._programs) == 1:
            wide = not self._wide_has_other_bits and all(program.is_wide for program in self._programs.values())
            self._lanes.tune(setting, measures=measures, wide=wide)

    def newly_tuned(self) -> Tuned | None:
        """What measuring has found, told once."""
        return self._lanes.newly_tuned()

    def _check_threads(self) -> None:
        """Gives up running batches on several threads when that changes their bits: some kernels add up in pieces."""
        if self._lanes.count == 1:
            return
        for top in INTEGER_TOPS:
            rows = synthetic_rows(self.manifest, self.batch_rows, seed=0, integer_top=top)
            try:
                narrow, wide = (self.run_batch(rows, wide=wide) for wide in (False, True))
            except FallowError:
                raise
            except Exception:  # noqa: S112 - the runtime's, about rows that nobody asked for: try tamer ones
                continue
            if not all(_same_bits(narrow[name], wide[name]) for name in narrow):
                for program in self._programs.values():
                    program.only_narrow()
                return
            self._wide_has_other_bits = False
            return

    def run(
        self,
        block: RowBlock,
        *,
        nonce: bytes,
        slots: Sequence[int] | None = None,
        output_bytes_max: int = BLOCK_BYTES_MAX,
        progress: Callable[[int], None] = lambda _: None,
        watch: Watch | None = None,
    ) -> ChainResult:
        """The output block of `block`; `progress` hears the rows done after every batch, `watch` sees their tensors.

        Raises SCHEMA_MISMATCH (a block of another schema), BLOCK_TOO_LARGE (the output would be), FIELD_INVALID
        (slots), BUNDLE_INVALID or PROGRAM_REFUSED (every row fails, and zeros too).
        """
        count = len(block)
        output_bytes_max = min(output_bytes_max, BLOCK_BYTES_MAX)
        self._check_output_fits(count, output_bytes_max)
        decoded = self._input.decode(block)
        task = self._begun(decoded)
        for chunk_rows in self._chunks(self._places(task, count, slots)):
            self._run_chunk(task, chunk_rows, progress, watch)
        return self._finished(task, nonce, output_bytes_max)

    @property
    def heads(self) -> tuple[tuple[TopKHead, tuple[str, ...]], ...]:
        """The heads that choose labels, with their labels."""
        found = ((self.manifest.stages[index], labels) for index, labels in self._labels.items())
        return tuple((stage, tuple(labels)) for stage, labels in found if isinstance(stage, TopKHead))

    @property
    def takes_zeros(self) -> bool:
        """Whether rows of zeros pass the chain: only then can they fill a batch."""
        return self._zeros_failure() is None

    def run_batch(self, values: Mapping[str, ColumnValues], *, wide: bool = True) -> dict[str, ColumnValues]:
        """The output columns of exactly b rows given as input columns; what inspection measures. Raises anything."""
        chunk = self._chunk_of(np.arange(self.batch_rows, dtype=np.int64), dict(values))
        for index, stage in enumerate(self.manifest.stages):
            if isinstance(stage, ProgramStage):
                chunk.tensors |= self._programs[index].run(chunk.tensors, self.batch_rows, wide=wide)
            else:
                self._apply(index, stage, chunk)
        return {column.name: self._output_values(column.name, chunk) for column in self.manifest.output_schema.columns}

    def zero_rows(self, count: int) -> dict[str, ColumnValues]:
        """Input columns of `count` rows of zeros."""
        columns: dict[str, ColumnValues] = {}
        for column in self.manifest.input_schema.columns:
            if isinstance(column, TensorColumn):
                columns[column.name] = np.zeros((count, *column.shape), dtype=numpy_dtype(column.dtype))
            else:
                columns[column.name] = [b""] * count
        return columns

    def _begun(self, decoded: DecodedRows) -> _Task:
        count = decoded.row_count
        ordinal = np.full(count, -1, dtype=np.int64)
        ordinal[decoded.positions] = np.arange(len(decoded.positions), dtype=np.int64)
        failures = {row: RowFailure(row, Cause.ROW, clipped_reason(why)) for row, why in decoded.malformed.items()}
        for row in np.flatnonzero(ordinal < 0).tolist():
            failures.setdefault(row, RowFailure(row, Cause.ROW, "row has no bytes"))
        columns: dict[str, ColumnValues] = {}
        for column in self.manifest.output_schema.columns:
            if isinstance(column, TensorColumn):
                columns[column.name] = np.zeros((count, *column.shape), dtype=numpy_dtype(column.dtype))
            else:
                columns[column.name] = [""] * count
        task = _Task(decoded, ordinal, columns, failures)
        for stage in self.manifest.stages:
            if isinstance(stage, BytesCodec):
                limit = stages.content_bytes_max(stage)
                contents = cast("Sequence[bytes]", decoded.columns[stage.column])
                for place, content in enumerate(contents):
                    if len(content) > limit:
                        row = int(decoded.positions[place])
                        reason = f"column {stage.column!r} holds {len(content)} bytes where {limit} travel"
                        failures.setdefault(row, RowFailure(row, Cause.ROW, reason))
        return task

    def _places(self, task: _Task, count: int, slots: Sequence[int] | None) -> NDArray[np.int64]:
        """The row of the block in each place of the batches, batch after batch; EMPTY_SLOT where zeros run."""
        batch = self.batch_rows
        rows = np.arange(count, dtype=np.int64)
        if slots is not None and self.slot_dependent:
            if len(slots) != count or not all(0 <= slot < batch for slot in slots):
                raise FallowError(
                    Reason.FIELD_INVALID, "slots are not one for each row", field="slots", limit=f"0 to {batch - 1}"
                )
            taken = [0] * batch
            places = np.empty(count, dtype=np.int64)
            for row, slot in enumerate(slots):
                places[row] = taken[slot] * batch + slot
                taken[slot] += 1
            total = max(taken) * batch
        else:
            if not self.slot_dependent:
                # Rows that need no program, or cannot have one, leave their place to others.
                wanted = task.ordinal >= 0
                wanted &= ~self._answered_without_program(task, count)
                rows = rows[wanted]
            places = np.arange(len(rows), dtype=np.int64)
            total = -(-len(rows) // batch) * batch
        at = np.full(total, EMPTY_SLOT, dtype=np.int64)
        at[places] = rows
        return at

    def _answered_without_program(self, task: _Task, count: int) -> NDArray[np.bool_]:
        """Which rows are so short that every output column has its declared answer; they get it here."""
        answered = np.zeros(count, dtype=np.bool_)
        if self._short_bytes_max < 0:
            return answered
        contents = cast("Sequence[bytes]", task.decoded.columns[content_column(self.manifest)])
        lengths = np.fromiter(map(len, contents), dtype=np.int64, count=len(contents))
        for row in task.decoded.positions[lengths <= self._short_bytes_max].tolist():
            answered[row] = True
            for stage in self.manifest.stages:
                if isinstance(stage, TopKHead):
                    for rank, (label, score) in enumerate(stages.head_columns(stage)):
                        if label in task.columns:
                            cast("list[str]", task.columns[label])[row] = stage.short_label if rank == 0 else ""
                        if score in task.columns:
                            cast("Array", task.columns[score])[row] = 1.0 if rank == 0 else 0.0
        return answered

    def _chunks(self, places: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        row_bytes = 1
        for stage in self.manifest.stages:
            if isinstance(stage, BytesCodec):
                row_bytes += 4 * (stage.head_tokens + stage.tail_tokens)
        for column in self.manifest.input_schema.columns:
            if isinstance(column, TensorColumn):
                row_bytes += column.row_bytes
        batches = max(1, min(CHUNK_ROWS_MAX, CHUNK_BYTES // row_bytes) // self.batch_rows)
        size = batches * self.batch_rows
        return [places[start : start + size] for start in range(0, len(places), size)]

    def _run_chunk(
        self, task: _Task, rows: NDArray[np.int64], progress: Callable[[int], None], watch: Watch | None
    ) -> None:
        chunk = self._gathered(task, rows)
        for index, stage in enumerate(self.manifest.stages):
            if isinstance(stage, ProgramStage):
                is_last = index == max(self._programs)
                self._run_program(task, chunk, self._programs[index], progress if is_last else lambda _: None)
            else:
                self._apply(index, stage, chunk)
        if watch is not None:
            watch(rows, chunk.tensors)
        used = rows != EMPTY_SLOT
        where = rows[used]
        for name, column in task.columns.items():
            values = self._output_values(name, chunk)
            if isinstance(column, np.ndarray):
                check_output(self.manifest, name, cast("Array", values))
                if len(where) and len(where) == where[-1] - where[0] + 1 and used.all() and _rising(where):
                    column[where[0] : where[-1] + 1] = values
                else:
                    column[where] = cast("Array", values)[used]
            else:
                texts = cast("list[str]", column)
                for place in np.flatnonzero(used).tolist():
                    texts[int(rows[place])] = cast("list[str]", values)[place]

    def _gathered(self, task: _Task, rows: NDArray[np.int64]) -> _Chunk:
        """The input columns of these places, zeros in empty ones and for rows that could not be decoded."""
        ordinals = np.where(rows == EMPTY_SLOT, -1, task.ordinal[rows])
        if task.failures:
            failed = [place for place, row in enumerate(rows.tolist()) if row in task.failures]
            ordinals[failed] = -1
        whole = bool(len(ordinals)) and bool((ordinals >= 0).all()) and _rising(ordinals)
        columns: dict[str, ColumnValues] = {}
        for column in self.manifest.input_schema.columns:
            values = task.decoded.columns[column.name]
            if isinstance(values, np.ndarray):
                if whole:
                    columns[column.name] = values[ordinals[0] : ordinals[-1] + 1]
                else:
                    gathered = np.zeros((len(rows), *values.shape[1:]), dtype=values.dtype)
                    gathered[ordinals >= 0] = values[ordinals[ordinals >= 0]]
                    columns[column.name] = gathered
            elif isinstance(column, BytesColumn):
                contents = cast("Sequence[bytes]", values)
                columns[column.name] = [contents[place] if place >= 0 else b"" for place in ordinals.tolist()]
        return self._chunk_of(rows, columns)

    def _chunk_of(self, rows: NDArray[np.int64], columns: Mapping[str, ColumnValues]) -> _Chunk:
        tensors: dict[str, Array] = {}
        contents: dict[str, Sequence[bytes]] = {}
        for name, values in columns.items():
            if isinstance(values, np.ndarray):
                tensors[name] = values
            else:
                contents[name] = cast("Sequence[bytes]", values)
        return _Chunk(rows, tensors, contents)

    def _apply(self, index: int, stage: BytesCodec | SoftmaxHead | TopKHead, chunk: _Chunk) -> None:
        match stage:
            case BytesCodec():
                chunk.tensors[stage.output] = stages.bytes_tokens(stage, chunk.contents[stage.column])
            case SoftmaxHead():
                chunk.tensors[stage.output] = stages.softmax(chunk.tensors[stage.value])
            case TopKHead():
                self._label(stage, self._labels[index], chunk)

    def _label(self, stage: TopKHead, labels: list[str], chunk: _Chunk) -> None:
        values = chunk.tensors[stage.value]
        if values.ndim != 2 or values.shape[1] != len(labels) or values.shape[1] < stage.k:
            raise FallowError(
                Reason.BUNDLE_INVALID,
                f"head over {stage.value!r} has {len(labels)} labels for rows of shape {list(values.shape[1:])}",
                field=stage.labels_file,
                limit=f"one dimension with a label for each entry, at least {stage.k}",
            )
        best = stages.top_k(values, stage.k)
        short: list[int] = []
        if stage.short_label:
            contents = chunk.contents[content_column(self.manifest)]
            short = [place for place, content in enumerate(contents) if len(content) <= stage.short_bytes_max]
        for rank, (label_column, score_column) in enumerate(stages.head_columns(stage)):
            texts: list[str] = [labels[index] for index in best.indexes[:, rank].tolist()]
            scores = best.scores[:, rank].copy()
            for place in short:
                texts[place] = stage.short_label if rank == 0 else ""
                scores[place] = 1.0 if rank == 0 else 0.0
            chunk.labels[label_column] = texts
            chunk.tensors[score_column] = scores

    def _run_program(self, task: _Task, chunk: _Chunk, program: OnnxProgram, progress: Callable[[int], None]) -> None:
        batch = self.batch_rows
        total = len(chunk.rows)
        feeds = {binding.value: chunk.tensors[binding.value] for binding in program.stage.inputs}
        results: dict[str, Array] = {}
        for start, answer in self._answers(program, feeds, total):
            if isinstance(answer, Exception):
                part = {name: values[start : start + batch] for name, values in feeds.items()}
                outputs = self._run_alone(task, chunk, program, part, start, answer)
            else:
                outputs = answer
                task.any_went_well = True
            for name, array in outputs.items():
                whole = results.get(name)
                if whole is None:
                    if total == batch:
                        results[name] = array
                        continue
                    whole = results[name] = np.zeros((total, *array.shape[1:]), dtype=array.dtype)
                whole[start : start + batch] = _fitting(array, whole, name)
            task.rows_done += int(np.count_nonzero(chunk.rows[start : start + batch] != EMPTY_SLOT))
            progress(task.rows_done)
        for name, declared in program.output_types().items():
            if name not in results:
                # Every row of the chunk failed: zeros of the declared shape stand for what nobody will read.
                shape = tuple(dim or 1 for dim in declared.shape)
                results[name] = np.zeros((total, *shape), dtype=numpy_dtype(declared.dtype))
        chunk.tensors |= results

    def _answers(self, program: OnnxProgram, feeds: Mapping[str, Array], total: int) -> Iterator[tuple[int, Answer]]:
        """(start, outputs or what the runtime raised) of every batch, in order, the lanes kept busy."""
        batch = self.batch_rows

        def run(start: int, wide: bool) -> Answer:
            try:
                return program.run(
                    {name: values[start : start + batch] for name, values in feeds.items()}, batch, wide=wide
                )
            except FallowError:
                raise
            except Exception as error:  # the runtime's: the caller finds out which row it is about
                return error

        return self._lanes.answers(run, total, batch)

    def _run_alone(
        self,
        task: _Task,
        chunk: _Chunk,
        program: OnnxProgram,
        part: Mapping[str, Array],
        start: int,
        error: Exception,
    ) -> dict[str, Array]:
        """The outputs of a failed batch, each row run alone in its own slot with zeros around it.

        Raises when every row so far failed and the program fails on zeros too: it is the program's fault.
        """
        outputs: dict[str, Array] = {}
        for slot in range(self.batch_rows):
            row = int(chunk.rows[start + slot])
            if row == EMPTY_SLOT or row in task.failures:
                continue
            alone = {name: np.zeros_like(values) for name, values in part.items()}
            for name, values in part.items():
                alone[name][slot] = values[slot]
            try:
                mine = program.run(alone, self.batch_rows)
            except FallowError:
                raise
            except Exception as alone_error:  # as above
                self._blame(task, row, alone_error if self.batch_rows > 1 else error)
                continue
            task.any_went_well = True
            for name, array in mine.items():
                whole = outputs.setdefault(name, np.zeros_like(array))
                whole[slot] = _fitting(array, whole, name)[slot]
        return outputs

    def _blame(self, task: _Task, row: int, error: Exception) -> None:
        reason = clipped_reason(str(error))
        zeros = self._zeros_failure() if not task.any_went_well else None
        task.failures[row] = RowFailure(row, Cause.PROGRAM if zeros is not None else Cause.ROW, reason)
        task.programs_failing += 1
        if zeros is not None and task.programs_failing >= FAILING_ROWS_GIVEN_UP_AFTER:
            raise FallowError(
                Reason.PROGRAM_REFUSED,
                f"the program fails on the first {task.programs_failing} rows one by one, and on zeros: {reason}",
                hint="run it on your own machine first",
            )

    def _zeros_failure(self) -> str | None:
        """Why zeros cannot pass the chain, or None when they do; a bundle that contradicts itself raises."""
        if self._zeros_failed is None:
            try:
                columns = self.run_batch(self.zero_rows(self.batch_rows))
            except FallowError:
                raise
            except Exception as error:  # the runtime's
                self._zeros_failed = clipped_reason(str(error)) or "unknown"
                return self._zeros_failed
            for name, values in columns.items():
                if isinstance(values, np.ndarray):
                    check_output(self.manifest, name, values)
            self._zeros_failed = ""
        return self._zeros_failed or None

    def _finished(self, task: _Task, nonce: bytes, output_bytes_max: int) -> ChainResult:
        count = task.decoded.row_count
        failed = sorted(task.failures)
        columns = task.columns
        positions: NDArray[np.int64] | None = None
        if failed:
            keep = np.ones(count, dtype=np.bool_)
            keep[failed] = False
            positions = np.flatnonzero(keep).astype(np.int64)
            kept = positions.tolist()
            columns = {name: _kept(values, kept) for name, values in columns.items()}
        block = self._output.encode(columns, nonce=nonce, positions=positions, row_count=count)
        if len(block) > output_bytes_max:
            raise _too_large(len(block), output_bytes_max)
        listed = failed[:ROW_FAILURES_LISTED_PER_TASK_MAX]
        return ChainResult(block, count, len(failed), tuple(task.failures[row] for row in listed))

    def _output_values(self, name: str, chunk: _Chunk) -> ColumnValues:
        return chunk.labels[name] if name in chunk.labels else chunk.tensors[name]

    def _check_output_fits(self, count: int, output_bytes_max: int) -> None:
        schema = self.manifest.output_schema
        least = sum(column.row_bytes if isinstance(column, TensorColumn) else 4 for column in schema.columns)
        total = block_bytes(row_count=count, feature_count=len(schema.size_features), body_bytes=least * count)
        if schema.fixed_row_bytes is not None and total > output_bytes_max:
            raise _too_large(total, output_bytes_max)


def _kept(values: ColumnValues, rows: Sequence[int]) -> ColumnValues:
    if isinstance(values, np.ndarray):
        return values[rows]
    return [cast("list[str]", values)[row] for row in rows]


def _rising(values: NDArray[np.int64]) -> bool:
    """Whether the values are consecutive integers."""
    return int(values[-1]) - int(values[0]) + 1 == len(values) and bool((values[1:] > values[:-1]).all())


def _same_bits(one: ColumnValues, other: ColumnValues) -> bool:
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return one.tobytes() == other.tobytes()
    return one == other


def _fitting(array: Array, whole: Array, name: str) -> Array:
    if array.shape[1:] != whole.shape[1:] or array.dtype != whole.dtype:
        raise FallowError(
            Reason.BUNDLE_INVALID,
            f"output {name!r} changes its shape between batches: {list(whole.shape[1:])}, {list(array.shape[1:])}",
            field=name,
        )
    return array


def _too_large(size: int, limit: int) -> FallowError:
    return FallowError(
        Reason.BLOCK_TOO_LARGE, f"the output block takes {size} bytes", field="output", limit=f"{limit} bytes"
    )
