"""Taking a bundle apart in a locked-down child: is it allowed, in which batches does it run, on what do its bits
depend, what does it cost.
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Final, cast

import numpy as np

from fallow.bundle import InspectionReport, ProgramStage
from fallow.cost import CostCurve
from fallow.errors import FallowError, Reason
from fallow.limits import KIB
from fallow.row_block import RowBlock
from fallow.row_values import ColumnValues
from fallow.rows import RowCodec
from fallow.schema import BytesColumn, SizeFeature
from fallow_worker.engine import canary, onnx_graph
from fallow_worker.engine.chain import Chain
from fallow_worker.engine.cost_fit import REFERENCE_FLOPS, Measured, fitted, undisturbed
from fallow_worker.engine.onnx_program import execution_class
from fallow_worker.engine.protocol import Inspect, SpawnOptions, clipped_reason, lanes_of
from fallow_worker.engine.synthetic import INTEGER_TOPS, content_bytes, sized_rows, synthetic_rows

BATCHES: Final = (1, 2, 4, 8, 16, 32)
BATCH_TOLERANCE: Final = 0.03
"""b is the smallest batch whose rows a second come within this of the best."""
ROUNDS_MAX: Final = 9
ROUNDS_MIN: Final = 3
TIMED_SECONDS_MAX: Final = 12.0
"""How long batches are measured, all together."""
TIMED_SECONDS_MIN: Final = 0.01
"""A measurement repeats a batch for about this long."""
GEMM_SIZE: Final = 512
GEMM_ROUNDS: Final = 3
"""Matrix products before each measurement of cost, and after the last: they tell how large a unit is just then."""
COST_ROUNDS: Final = (3, 100)
"""Repeats of each size, at least and at most."""
COST_ROUNDS_ENOUGH: Final = 9
COST_SECONDS: Final = 1.5
"""CPU time for measuring cost when there are `COST_ROUNDS_ENOUGH` repeats by then: enough to meet quiet moments."""
COST_SECONDS_MAX: Final = 6.0
"""How long cost is measured at most, by the clock, unless the least number of repeats takes longer."""
COST_SHARES: Final = (0.0, 0.0625, 0.125, 0.25, 0.5, 0.75, 1.0)
"""Sizes of measured rows, as shares of the largest."""
COST_SHARES_FEW: Final = (0.0, 0.5, 1.0)
"""The same where a row takes long."""
TESTED_BATCH_ROWS: Final = 4
"""Neighbours are tested in batches of this many rows when b is 1."""
SWEPT_ROWS: Final = 128
"""Rows of each source that are tested for dependences: one that shows in a twentieth of the rows stays hidden once in
700 times. Slow programs are tested on as many as `SWEEP_SECONDS` allow, each source and dependence by itself."""
SWEEP_SECONDS: Final = 1.5
SCALES: Final = (1.0, 50.0, 0.02)
"""Neighbours are also stretched and shrunk: dynamic quantisation looks at the largest value in a batch."""
SEED: Final = 20_260

Columns = dict[str, ColumnValues]

_statm_fd: int = -1


class _RefusedError(Exception):
    """One sentence why not."""


@dataclass(frozen=True, slots=True)
class _Cost:
    unit_micros_per_row: int
    unit_micros_per_kib: int
    curve: CostCurve | None = None
    flops_per_row: int = 0


def prepare() -> None:
    """Makes everything happen before lock-down that this module would otherwise open lazily afterwards."""
    global _statm_fd  # noqa: PLW0603 - a descriptor that can only be opened now
    if sys.platform == "linux":
        _statm_fd = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
    findings = onnx_graph.examine(canary.MODEL, "canary.onnx")
    assert not findings.refusals, findings.refusals
    onnx_graph.examine(b"no model", "canary.onnx")
    _Reference().flops()


def inspect(
    message: Inspect,
    files: Mapping[str, bytes],
    *,
    sample: RowBlock | None,
    options: SpawnOptions,
    machine_class: str,
    progress: Callable[[int], None] = lambda _: None,
) -> InspectionReport:
    """The report on one bundle. `progress` hears how many steps are done. Raises nothing that is the bundle's fault."""
    return _Inspection(message, files, sample=sample, options=options, machine_class=machine_class).report(progress)


class _Inspection:
    def __init__(
        self,
        message: Inspect,
        files: Mapping[str, bytes],
        *,
        sample: RowBlock | None,
        options: SpawnOptions,
        machine_class: str,
    ) -> None:
        self._message = message
        self._files = files
        self._sample = sample
        self._options = options
        self._machine_class = machine_class
        self._started = time.monotonic()
        self._operators: Counter[str] = Counter()
        self._flops_per_row = 0
        self._rows: Callable[[int, int, float], Columns]
        self._sources: list[Callable[[int, int, float], Columns]] = []
        """Where tested rows come from: made from the schema, and the submitter's sample when there is one."""

    def report(self, progress: Callable[[int], None]) -> InspectionReport:
        refusals = self._examine()
        progress(1)
        if refusals:
            return self._refusal(refusals)
        try:
            return self._measured(progress)
        except _RefusedError as refused:
            return self._refusal([str(refused)])
        except FallowError as error:
            if error.reason not in {Reason.BUNDLE_INVALID, Reason.PROGRAM_REFUSED, Reason.LIMIT_EXCEEDED}:
                raise
            return self._refusal([str(error)])

    def _examine(self) -> list[str]:
        refusals: list[str] = []
        for file in {stage.file for stage in self._message.manifest.stages if isinstance(stage, ProgramStage)}:
            content = self._files.get(file)
            if content is None:
                refusals.append(f"the bundle has no file {file!r}")
                continue
            findings = onnx_graph.examine(content, file)
            refusals += findings.refusals
            self._operators += findings.operators
            self._flops_per_row += findings.flops_per_row
        return refusals[: onnx_graph.REFUSALS_LISTED_MAX]

    def _measured(self, progress: Callable[[int], None]) -> InspectionReport:
        chain = self._chain()
        chain.warm_up()
        self._choose_rows(chain)
        progress(2)
        if not chain.takes_zeros and chain.fixed_batch not in {None, 1}:
            raise _RefusedError("the program fails on rows of zeros, which must fill its last batch")
        # A program that fails on zeros can have no batch filled with them, so every row runs alone.
        batch = chain.fixed_batch or (self._best_batch(chain) if chain.takes_zeros else 1)
        progress(3)
        neighbour_dependent = chain.takes_zeros and self._depends_on_neighbours(chain, batch)
        if neighbour_dependent:
            if chain.fixed_batch not in {None, 1}:
                raise _RefusedError(
                    f"rows depend on their neighbours, and the program always takes {chain.fixed_batch} rows: "
                    "export it with a free row axis"
                )
            batch = 1
        slot_dependent = batch > 1 and self._depends_on_slot(chain, batch)
        progress(4)
        cost = self._cost(chain, batch)
        del chain
        fresh = self._chain()
        memory = self._repeats(fresh, batch)
        progress(5)
        return self._report(
            accepted=True,
            refusals=(),
            batch=batch,
            slot_dependent=slot_dependent,
            neighbour_dependent=neighbour_dependent,
            cost=cost,
            memory=memory,
        )

    def _chain(self) -> Chain:
        message = self._message
        return Chain(
            message.manifest,
            self._files,
            input_schema_digest=message.input_schema_digest,
            output_schema_digest=message.output_schema_digest,
            batch_rows=0,
            threads=self._options.threads,
            lanes=lanes_of(self._options),
            allow_spinning=self._options.allow_spinning,
        )

    # ------------------------------------------------------------------------------------------------------- rows

    def _choose_rows(self, chain: Chain) -> None:
        """Finds synthetic rows that the program takes; the submitter's sample stands in when there are none."""
        manifest = self._message.manifest
        sampled = self._sampled()

        def cycled(count: int, seed: int, scale: float) -> Columns:
            del scale
            assert sampled is not None
            return {name: _cycled(values, count, seed) for name, values in sampled.items()}

        failure = ""
        for top in INTEGER_TOPS:

            def rows(count: int, seed: int, scale: float, top: int = top) -> Columns:
                return synthetic_rows(manifest, count, seed=seed, integer_top=top, scale=scale)

            try:
                chain.run_batch(rows(chain.batch_rows, SEED, 1.0))
            except FallowError:
                raise
            except Exception as error:  # the runtime's: try tamer rows
                failure = clipped_reason(str(error))
                continue
            self._rows = rows
            self._sources = [rows] if sampled is None else [rows, cycled]
            return
        if sampled is None:
            raise _RefusedError(f"the program fails on every row made from its schema: {failure}")

        try:
            chain.run_batch(cycled(chain.batch_rows, 0, 1.0))
        except FallowError:
            raise
        except Exception as error:  # the runtime's
            raise _RefusedError(f"the program fails on its own sample rows: {clipped_reason(str(error))}") from None
        self._rows = cycled
        self._sources = [cycled]

    def _sampled(self) -> Columns | None:
        if self._sample is None:
            return None
        codec = RowCodec(self._message.manifest.input_schema, self._message.input_schema_digest)
        decoded = codec.decode(self._sample)
        return decoded.columns if len(decoded.positions) else None

    # ---------------------------------------------------------------------------------------------------- batches

    def _best_batch(self, chain: Chain) -> int:
        """The smallest batch within `BATCH_TOLERANCE` of the most rows for a second of one core."""
        lone = self._seconds(chain, 1, repeats=1)
        lone = min(lone, self._seconds(chain, 1, repeats=1))
        budget = min(TIMED_SECONDS_MAX, self._message.seconds_max - (time.monotonic() - self._started) - 10)
        sizes = [1]
        for size in BATCHES[1:]:
            if ROUNDS_MIN * lone * (sum(sizes) + size) > budget:
                break
            sizes.append(size)
        times: dict[int, list[float]] = {size: [] for size in sizes}
        deadline = time.monotonic() + max(budget, 1.0)
        for turn in range(ROUNDS_MAX):
            for size in sizes:
                repeats = max(1, round(TIMED_SECONDS_MIN / max(lone * size, 1e-6)))
                try:
                    times[size].append(self._seconds(chain, size, repeats=repeats) / size)
                except FallowError:
                    raise
                except Exception:  # the runtime's: it cannot run so many rows at once
                    if size == 1:
                        raise
                    sizes = sizes[: sizes.index(size)]
                    break
            if turn + 1 >= ROUNDS_MIN and time.monotonic() > deadline:
                break
        quickest = {size: undisturbed(times[size], best=min) for size in sizes}
        best = min(quickest.values())
        return next(size for size in sizes if quickest[size] * (1 - BATCH_TOLERANCE) <= best)

    def _seconds(self, chain: Chain, batch: int, *, repeats: int) -> float:
        """Seconds of one core for a batch, on the calling thread alone: unmoved by what else the machine does."""
        rows = self._rows(batch, SEED, 1.0)
        chain.batch_rows = batch
        started = time.thread_time()
        for _ in range(repeats):
            chain.run_batch(rows, wide=False)
        return (time.thread_time() - started) / repeats

    # ----------------------------------------------------------------------------------------------- dependences

    def _depends_on_neighbours(self, chain: Chain, batch: int) -> bool:
        """Whether a row's bits change with the rows around it, its slot unchanged."""
        batch = batch if batch > 1 else TESTED_BATCH_ROWS
        if chain.fixed_batch == 1:
            return False
        chain.batch_rows = batch
        zeros = chain.zero_rows(batch)
        for source, (trial, scale) in product(self._sources, enumerate(SCALES)):
            rows = source(batch, SEED + trial, 1.0)
            around = [self._rows(batch, SEED + 100 + trial, scale), *([zeros] if not trial else [])]
            together = self._outputs(chain, rows)
            for slot in range(min(batch, TESTED_BATCH_ROWS)):
                if any(
                    self._outputs(chain, _placed(them, rows, slot, slot))[slot] != together[slot] for them in around
                ):
                    return True
        return any(self._half_depends_on_the_other(chain, source) for source in self._sources)

    def _half_depends_on_the_other(self, chain: Chain, source: Callable[[int, int, float], Columns]) -> bool:
        """Whether rows in every other slot change when those between them do: many rows with few runs."""
        batch = chain.batch_rows
        for trial in self._sweep(batch):
            rows = source(batch, SEED + 400 + trial, 1.0)
            together = self._outputs(chain, rows)
            others = self._rows(batch, SEED + 600 + trial, SCALES[trial % 2])
            for kept in (0, 1):
                mixed = rows
                for slot in range(1 - kept, batch, 2):
                    mixed = _placed(mixed, others, slot, slot)
                if self._outputs(chain, mixed)[kept::2] != together[kept::2]:
                    return True
        return False

    def _sweep(self, batch: int) -> Iterator[int]:
        """Trials until `SWEPT_ROWS` rows are tested or the time is over."""
        until = time.monotonic() + SWEEP_SECONDS
        for trial in range(max(1, SWEPT_ROWS // batch)):
            if trial and time.monotonic() > until:
                return
            yield trial

    def _depends_on_slot(self, chain: Chain, batch: int) -> bool:
        """Whether a row's bits change with its place in the batch."""
        chain.batch_rows = batch
        zeros = chain.zero_rows(batch)
        for source, trial in product(self._sources, range(2)):
            rows = source(batch, SEED + 200 + trial, 1.0)
            straight = self._outputs(chain, rows)
            backward = self._outputs(chain, {name: _reversed(values) for name, values in rows.items()})
            if straight != backward[::-1]:
                return True
            for slot in {0, 1, batch // 2, batch - 1}:
                if self._outputs(chain, _placed(zeros, rows, 0, slot))[slot] != straight[0]:
                    return True
        for source in self._sources:
            for trial in self._sweep(batch):
                rows = source(batch, SEED + 500 + trial, 1.0)
                turn = 1 + trial % (batch - 1)
                moved = {name: _turned(values, turn) for name, values in rows.items()}
                straight = self._outputs(chain, rows)
                if self._outputs(chain, moved) != straight[-turn:] + straight[:-turn]:
                    return True
        return False

    def _outputs(self, chain: Chain, rows: Columns) -> list[bytes]:
        """The output row bytes of a batch; what a failing batch gives is no row's bits."""
        try:
            columns = chain.run_batch(rows, wide=False)
        except FallowError:
            raise
        except Exception as error:  # the runtime's
            raise _RefusedError(f"the program fails on rows that it took alone: {clipped_reason(str(error))}") from None
        count = chain.batch_rows
        lines = [b""] * count
        for values in columns.values():
            for row in range(count):
                value: Any = values[row]
                lines[row] += value.tobytes() if isinstance(value, np.ndarray | np.generic) else str(value).encode()
        return lines

    def _repeats(self, chain: Chain, batch: int) -> int:
        """Refuses a program that gives other bits for the same rows; gives the resident size while it runs."""
        chain.batch_rows = batch
        rows = self._rows(batch, SEED + 300, 1.0)
        first = self._outputs(chain, rows)
        memory = _resident_bytes()
        for _ in range(3):
            if self._outputs(chain, rows) != first:
                raise _RefusedError("the program gives other bits when the same rows run again: nobody could check it")
        return max(memory, _resident_bytes())

    # ------------------------------------------------------------------------------------------------------- cost

    def _cost(self, chain: Chain, batch: int) -> _Cost:
        """What rows cost over the declared range of their sizes: CPU time against matrix products beside it."""
        chain.batch_rows = batch
        manifest = self._message.manifest
        varying = [column.name for column in manifest.input_schema.columns if isinstance(column, BytesColumn)]
        flops_per_row = self._flops_per_row
        if not varying:
            samples = self._units(chain, {0: self._rows(batch, SEED, 1.0)})
            curve = fitted(_measured(samples, batch), feature_number=0, flops_per_row=flops_per_row)
            return _Cost(_micros(curve.knots[0].unit_nanos), 0, curve, flops_per_row)
        longest = max(content_bytes(manifest, name) for name in varying)
        lengths = self._lengths(chain, batch, longest)
        samples = self._units(
            chain,
            {
                length * len(varying): sized_rows(manifest, batch, content_length=length, seed=SEED)
                for length in lengths
            },
        )
        features = manifest.input_schema.size_features
        curve = fitted(
            _measured(samples, batch),
            feature_number=features.index(SizeFeature.BYTES) + 1 if SizeFeature.BYTES in features else 0,
            flops_per_row=flops_per_row,
        )
        least, most = curve.knots[0], curve.knots[-1]
        slope = (most.unit_nanos - least.unit_nanos) * KIB // max(1, most.size - least.size)
        return _Cost(_micros(least.unit_nanos), round(slope / 1_000), curve, flops_per_row)

    def _lengths(self, chain: Chain, batch: int, longest: int) -> list[int]:
        """Which lengths of contents are measured: fewer where the longest take long."""
        rows = sized_rows(self._message.manifest, batch, content_length=longest, seed=SEED)
        started = time.monotonic()
        chain.run_batch(rows, wide=False)
        seconds = time.monotonic() - started
        enough = COST_ROUNDS[0] * len(COST_SHARES) * seconds <= COST_SECONDS_MAX
        return sorted({round(share * longest) for share in (COST_SHARES if enough else COST_SHARES_FEW)})

    def _units(self, chain: Chain, rows_of: Mapping[int, Columns]) -> dict[int, list[float]]:
        """Units that a batch of each size takes, several times over, sizes taking turns."""
        reference = _Reference()
        once: dict[int, float] = {}
        for size, rows in rows_of.items():
            chain.run_batch(rows, wide=False)
            started = time.thread_time()
            chain.run_batch(rows, wide=False)
            once[size] = max(time.thread_time() - started, 1e-6)
        seconds: dict[int, list[float]] = {size: [] for size in rows_of}
        flops = [reference.flops()]
        began, began_cpu = time.monotonic(), time.thread_time()
        for turn in range(COST_ROUNDS[1]):
            if turn >= COST_ROUNDS[0] and time.monotonic() - began > COST_SECONDS_MAX:
                break
            if turn >= COST_ROUNDS_ENOUGH and time.thread_time() - began_cpu > COST_SECONDS:
                break
            for size, rows in rows_of.items():
                repeats = max(1, round(TIMED_SECONDS_MIN / once[size]))
                started = time.thread_time()
                for _ in range(repeats):
                    chain.run_batch(rows, wide=False)
                seconds[size].append((time.thread_time() - started) / repeats)
                flops.append(reference.flops())
        speed = undisturbed(flops, best=max) / REFERENCE_FLOPS
        return {size: [second * speed for second in repeats] for size, repeats in seconds.items()}

    # ----------------------------------------------------------------------------------------------------- report

    def _refusal(self, refusals: Sequence[str]) -> InspectionReport:
        return self._report(
            accepted=False,
            refusals=tuple(clipped_reason(refusal) for refusal in refusals),
            batch=0,
            slot_dependent=False,
            neighbour_dependent=False,
            cost=_Cost(0, 0),
            memory=0,
        )

    def _report(
        self,
        *,
        accepted: bool,
        refusals: tuple[str, ...],
        batch: int,
        slot_dependent: bool,
        neighbour_dependent: bool,
        cost: _Cost,
        memory: int,
    ) -> InspectionReport:
        precision = self._message.manifest.precision.value
        return InspectionReport(
            bundle_digest=self._message.bundle_digest,
            accepted=accepted,
            refusals=refusals,
            operators=tuple(sorted(self._operators.items())),
            canonical_batch_rows=batch,
            slot_dependent=slot_dependent,
            neighbour_dependent=neighbour_dependent,
            unit_micros_per_row=cost.unit_micros_per_row,
            unit_micros_per_kib=cost.unit_micros_per_kib,
            memory_bytes_peak=memory,
            execution_class=execution_class(self._machine_class, precision=precision, batch_rows=batch),
            inspected_seconds=round(time.monotonic() - self._started, 3),
            cost=cost.curve,
            flops_per_row=cost.flops_per_row,
        )


def _placed(around: Columns, rows: Columns, source: int, slot: int) -> Columns:
    """`around` with row `source` of `rows` in its place `slot`."""
    columns: Columns = {}
    for name, values in around.items():
        if isinstance(values, np.ndarray):
            copy = values.copy()
            copy[slot] = rows[name][source]
            columns[name] = copy
        else:
            contents = list(cast("Sequence[bytes]", values))
            contents[slot] = cast("Sequence[bytes]", rows[name])[source]
            columns[name] = contents
    return columns


def _reversed(values: ColumnValues) -> ColumnValues:
    return np.ascontiguousarray(values[::-1]) if isinstance(values, np.ndarray) else values[::-1]


def _turned(values: ColumnValues, turn: int) -> ColumnValues:
    """The last `turn` rows first."""
    if isinstance(values, np.ndarray):
        return np.ascontiguousarray(np.roll(values, turn, axis=0))
    contents = list(cast("Sequence[bytes]", values))
    return contents[-turn:] + contents[:-turn]


def _cycled(values: ColumnValues, count: int, seed: int) -> ColumnValues:
    order = [(seed + place) % len(values) for place in range(count)]
    if isinstance(values, np.ndarray):
        return values[order]
    return [cast("Sequence[bytes]", values)[place] for place in order]


class _Reference:
    """A matrix product whose speed on this core, just now, says how large a unit is here."""

    def __init__(self) -> None:
        generator = np.random.default_rng(SEED)
        self._left, self._right, self._out = (
            generator.standard_normal((GEMM_SIZE, GEMM_SIZE), dtype=np.float32) for _ in range(3)
        )
        np.matmul(self._left, self._right, out=self._out)

    def flops(self) -> float:
        """Float32 operations for each second of CPU time of this thread."""
        started = time.thread_time()
        for _ in range(GEMM_ROUNDS):
            np.matmul(self._left, self._right, out=self._out)
        return GEMM_ROUNDS * 2 * GEMM_SIZE**3 / max(time.thread_time() - started, 1e-9)


def _measured(units_of: Mapping[int, Sequence[float]], batch: int) -> list[Measured]:
    return [Measured(size, tuple(units / batch for units in units_of[size])) for size in sorted(units_of)]


def _micros(unit_nanos: int) -> int:
    return max(1, round(unit_nanos / 1_000))


def _resident_bytes() -> int:
    if _statm_fd < 0:
        from fallow_worker.engine.work import memory_bytes_peak

        return memory_bytes_peak()
    pages = os.pread(_statm_fd, 128, 0).split()
    return int(pages[1]) * os.sysconf("SC_PAGE_SIZE")
