"""A referee at work in an engine child: others' output rows beside our own, and the program in other forms if needed.

The program runs here only when some row of another class differs: first on seeded rows made from its schema, which give
the bundle's spread, the same on every machine of a class and at any time; then on the very rows in question.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fallow.bundle import ProgramStage
from fallow.comparison import CandidateFinding, Finding, RowFinding, Spread
from fallow.errors import FallowError
from fallow.row_block import NONCE_BYTES, RowBlock, Span, pack, pack_selection
from fallow.row_comparison import Comparison, LabelScores, Reference, measured_spread, unmeasured
from fallow.row_values import ColumnValues
from fallow.rows import RowCodec
from fallow_worker.engine.chain import EMPTY_SLOT, Chain, ChainResult, Watch
from fallow_worker.engine.jitter import jittered
from fallow_worker.engine.protocol import CandidatePlacement, Referee
from fallow_worker.engine.stages import head_columns
from fallow_worker.engine.synthetic import INTEGER_TOPS, synthetic_rows

SAMPLES: Final = 256
"""Seeded rows that a spread is measured on, unless the program takes too long."""
SAMPLES_AT_ONCE: Final = 32
SEED: Final = 20_261
JITTER_SEEDS: Final = (1, 2)
"""Forms with moved weights."""
FORMS_COST: Final = 8
"""Time for all forms, in times of the canonical one; graphs as they were written are slow."""
_NO_NONCE: Final = bytes(NONCE_BYTES)


@dataclass(frozen=True, slots=True)
class Blocks:
    """What lies in the child's memory, parsed."""

    input: RowBlock
    own: RowBlock
    candidates: tuple[RowBlock, ...]
    slots: Sequence[int] | None


@dataclass(frozen=True, slots=True)
class Found:
    """One finding for each row and candidate, and the bundle's spread when it is known by now."""

    rows: tuple[RowFinding, ...]
    spread: Spread | None


class _UnmeasurableError(Exception):
    """The program takes longer than there is time for, or fails on rows that it took before."""


def compare(message: Referee, *, files: Mapping[str, bytes], blocks: Blocks, progress: Callable[[int], None]) -> Found:
    """What is found of every candidate's rows. Raises SCHEMA_MISMATCH for blocks that are not of the output schema.

    What goes wrong while the program runs in other forms only costs the spread, which is then as if it were unmeasured.
    """
    manifest = message.manifest
    spread = message.spread or unmeasured(manifest.precision)
    reference = Reference(blocks.own, message.own_class, spread)
    comparison = Comparison(manifest.output_schema, message.output_schema_digest, reference)
    found = _findings(message, blocks, comparison)
    disputed, suspected = _to_look_into(message, blocks, comparison, found)
    if not message.files or not (disputed or suspected):
        return Found(found, message.spread)
    forms = _Forms(message, files, blocks, progress)
    steady: frozenset[int] = frozenset()
    if suspected:
        with contextlib.suppress(FallowError, _UnmeasurableError, MemoryError):
            steady = forms.steady(suspected)
    if disputed:
        with contextlib.suppress(FallowError, _UnmeasurableError, MemoryError):
            reference = forms.reference(disputed)
    reference = replace(reference, steady=steady)
    comparison = Comparison(manifest.output_schema, message.output_schema_digest, reference)
    measured = reference.spread if reference.spread.samples else None
    return Found(_findings(message, blocks, comparison), measured)


def _to_look_into(
    message: Referee, blocks: Blocks, comparison: Comparison, found: Sequence[RowFinding]
) -> tuple[list[int], list[int]]:
    """(rows to run in other forms, rows to run in other places): those that differ in another class, once the spread is
    known only those whose difference it does not explain; and those that differ in our own.
    """
    disputed: set[int] = set()
    suspected: set[int] = set()
    unexplained = {Finding.UNEXPLAINED, Finding.WRONG}
    for index, (placement, block) in enumerate(_pairs(message, blocks)):
        classes = _classes(message, placement)
        for place, row in comparison.differing(block, placement.rows):
            if classes[place] == message.own_class:
                suspected.add(row)
            elif message.spread is None or found[row].candidates[index].finding in unexplained:
                disputed.add(row)
    return sorted(disputed), sorted(suspected)


def _findings(message: Referee, blocks: Blocks, comparison: Comparison) -> tuple[RowFinding, ...]:
    profiles = {
        profile.candidate_class: profile for profile in message.profiles if profile.referee_class == message.own_class
    }
    by_row: list[list[CandidateFinding]] = [
        [CandidateFinding(None)] * len(message.candidates) for _ in range(len(blocks.own))
    ]
    for index, (placement, block) in enumerate(_pairs(message, blocks)):
        found = comparison.findings(block, placement.rows, _classes(message, placement), profiles)
        for row, finding in zip(placement.rows, found, strict=True):
            by_row[row][index] = finding
    return tuple(RowFinding(row, tuple(found)) for row, found in enumerate(by_row))


def _pairs(message: Referee, blocks: Blocks) -> Iterator[tuple[CandidatePlacement, RowBlock]]:
    return zip(message.candidates, blocks.candidates, strict=True)


def _classes(message: Referee, placement: CandidatePlacement) -> list[str]:
    return [message.execution_classes[number] for number in placement.class_numbers]


class _Forms:
    """The bundle's program in the canonical form and others, one loaded at a time."""

    def __init__(
        self, message: Referee, files: Mapping[str, bytes], blocks: Blocks, progress: Callable[[int], None]
    ) -> None:
        self._message = message
        self._files = files
        self._blocks = blocks
        self._progress = progress
        self._deadline = time.monotonic() + message.seconds_max
        self._steps = 0
        self._input = RowCodec(message.manifest.input_schema, message.input_schema_digest)
        self._output = RowCodec(message.manifest.output_schema, message.output_schema_digest)

    def reference(self, disputed: Sequence[int]) -> Reference:
        """Our rows with the bundle's spread, and what `disputed` ones give in other forms. Raises FallowError."""
        chain = self._chain(optimised=True)
        known = self._message.spread
        samples = self._samples(chain) if known is None else None
        own_values: dict[str, ColumnValues] = {}
        forms_of_samples: list[dict[str, ColumnValues]] = []
        forms: list[RowBlock] = []
        labels = self._own_labels(chain, disputed)
        if samples is not None:
            own_values = self._values(chain, samples)
        batch, fixed = chain.batch_rows, chain.fixed_batch
        if batch > 1 and fixed is None:
            # Rows do not depend on their neighbours here: inspection gives such programs batch 1.
            chain.batch_rows, chain.slot_dependent = 1, False
            self._add_form(chain, samples, disputed, forms_of_samples, forms)
        del chain
        self._add_form(self._chain(optimised=False), samples, disputed, forms_of_samples, forms)
        for seed in JITTER_SEEDS:
            moved = self._jittered(seed)
            if moved is not None:
                self._add_form(self._chain(optimised=True, files=moved), samples, disputed, forms_of_samples, forms)
        precision = self._message.manifest.precision
        spread = known or unmeasured(precision)
        if samples is not None:
            spread = measured_spread(own_values, forms_of_samples, precision)
        return Reference(self._blocks.own, self._message.own_class, spread, tuple(forms), labels)

    def steady(self, suspected: Sequence[int]) -> frozenset[int]:
        """Those of our rows that give the same bytes again: alone, among other rows, and in every place where that
        may not matter. Inspection has looked for programs of which that is not true; it may have missed a rare one.
        """
        chain = self._chain(optimised=True)
        steady: set[int] = set()
        for row in suspected:
            if time.monotonic() > self._deadline - self._message.seconds_max / 2:
                break  # what was found by then is found: one proven row of a worker is enough
            if self._is_steady(chain, row):
                steady.add(row)
        return frozenset(steady)

    def _is_steady(self, chain: Chain, row: int) -> bool:
        own, count, batch = bytes(self._blocks.own[row]), len(self._blocks.input), chain.batch_rows
        slots = self._blocks.slots
        slot = slots[row] if slots and chain.slot_dependent else None
        others = [(row + step) % count for step in range(1, batch)]
        arrangements: list[tuple[list[int], list[int] | None]]
        if slot is None:
            arrangements = [([row], None), ([row] * batch, None), ([*others, row], None), ([row, *others], None)]
        else:
            free = [place for place in range(batch) if place != slot]
            arrangements = [([row], [slot]), ([row, *others], [slot, *free])]
        for rows, places in arrangements:
            spans = [Span(0, one, one + 1) for one in rows]
            packed = RowBlock.parse(pack_selection([self._blocks.input], spans, _NO_NONCE))
            answered = RowBlock.parse(self._run(chain, packed, places).block)
            if any(bytes(answered[place]) != own for place, one in enumerate(rows) if one == row):
                return False
        return True

    def _add_form(
        self,
        chain: Chain,
        samples: RowBlock | None,
        disputed: Sequence[int],
        forms_of_samples: list[dict[str, ColumnValues]],
        forms: list[RowBlock],
    ) -> None:
        if samples is not None:
            forms_of_samples.append(self._values(chain, samples))
        rows, slots = self._disputed(disputed)
        answered = RowBlock.parse(self._run(chain, rows, slots).block)
        features = [answered.row_size_features(place) for place in range(len(answered))]
        count = len(self._blocks.own)
        empty = (0,) * answered.feature_count
        at = {row: place for place, row in enumerate(disputed)}
        whole = pack(
            answered.schema_digest,
            [answered[at[row]] if row in at else b"" for row in range(count)],
            [features[at[row]] if row in at else empty for row in range(count)],
            _NO_NONCE,
        )
        forms.append(RowBlock.parse(whole))

    def _disputed(self, disputed: Sequence[int]) -> tuple[RowBlock, Sequence[int] | None]:
        spans = [Span(0, row, row + 1) for row in disputed]
        rows = RowBlock.parse(pack_selection([self._blocks.input], spans, _NO_NONCE))
        slots = self._blocks.slots
        return rows, [slots[row] for row in disputed] if slots else None

    def _own_labels(self, chain: Chain, disputed: Sequence[int]) -> tuple[LabelScores, ...]:
        """What the heads chose from, for the disputed rows, in the canonical form."""
        if not chain.heads:
            return ()
        scores: dict[str, dict[int, NDArray[np.float64]]] = {head.value: {} for head, _ in chain.heads}

        def watch(rows: NDArray[np.int64], tensors: Mapping[str, Any]) -> None:
            for place in np.flatnonzero(rows != EMPTY_SLOT).tolist():
                for value, by_row in scores.items():
                    by_row[disputed[int(rows[place])]] = np.asarray(tensors[value][place], dtype=np.float64)

        rows, slots = self._disputed(disputed)
        self._run(chain, rows, slots, watch)
        declared = {column.name for column in self._message.manifest.output_schema.columns}
        found: list[LabelScores] = []
        for head, labels in chain.heads:
            columns = tuple(label for label, _ in head_columns(head))
            if declared.issuperset(columns):
                found.append(LabelScores(columns, labels, head.value, scores[head.value]))
        return tuple(found)

    def _samples(self, chain: Chain) -> RowBlock | None:
        """Seeded rows of which the program takes every one; None when there are none such."""
        manifest = self._message.manifest
        for top in INTEGER_TOPS:
            columns = synthetic_rows(manifest, SAMPLES, seed=SEED, integer_top=top)
            try:
                block = RowBlock.parse(self._input.encode(columns, nonce=_NO_NONCE))
                first = RowBlock.parse(pack_selection([block], [Span(0, 0, SAMPLES_AT_ONCE)], _NO_NONCE))
                started = time.monotonic()
                failed = self._run(chain, first, None).failed_rows
            except FallowError:
                continue
            if not failed:
                whole = (time.monotonic() - started) * SAMPLES / SAMPLES_AT_ONCE * FORMS_COST
                return block if time.monotonic() + whole < self._deadline else None
        return None

    def _values(self, chain: Chain, samples: RowBlock) -> dict[str, ColumnValues]:
        """Output columns of the samples, and what heads score, by name. Raises FallowError when rows fail."""
        scored: dict[str, list[NDArray[Any]]] = {head.value: [] for head, _ in chain.heads}
        parts: list[dict[str, ColumnValues]] = []
        for start in range(0, len(samples), SAMPLES_AT_ONCE):
            end = min(start + SAMPLES_AT_ONCE, len(samples))
            part = RowBlock.parse(pack_selection([samples], [Span(0, start, end)], _NO_NONCE))

            def watch(rows: NDArray[np.int64], tensors: Mapping[str, Any]) -> None:
                used = rows != EMPTY_SLOT
                for value, seen in scored.items():
                    seen.append(np.asarray(tensors[value])[used])

            result = self._run(chain, part, None, watch)
            if result.failed_rows:
                raise _UnmeasurableError
            parts.append(dict(self._output.decode(RowBlock.parse(result.block)).columns))
        together: dict[str, ColumnValues] = {}
        for name, first in parts[0].items():
            if isinstance(first, np.ndarray):
                together[name] = np.concatenate([np.asarray(part[name]) for part in parts])
        return together | {name: np.concatenate(seen) for name, seen in scored.items()}

    def _run(
        self, chain: Chain, rows: RowBlock, slots: Sequence[int] | None, watch: Watch | None = None
    ) -> ChainResult:
        if time.monotonic() > self._deadline:
            raise _UnmeasurableError
        result = chain.run(rows, nonce=_NO_NONCE, slots=slots, watch=watch)
        self._steps += 1
        self._progress(self._steps)
        return result

    def _jittered(self, seed: int) -> Mapping[str, bytes] | None:
        """The files with the weights of every program moved; None when there are none to move."""
        message = self._message
        moved = dict(self._files)
        any_moved = False
        for file in {stage.file for stage in message.manifest.stages if isinstance(stage, ProgramStage)}:
            model = jittered(self._files[file], precision=message.manifest.precision, seed=seed)
            if model is not None:
                moved[file], any_moved = model, True
        return moved if any_moved else None

    def _chain(self, *, optimised: bool, files: Mapping[str, bytes] | None = None) -> Chain:
        message = self._message
        return Chain(
            message.manifest,
            files or self._files,
            input_schema_digest=message.input_schema_digest,
            output_schema_digest=message.output_schema_digest,
            batch_rows=message.canonical_batch_rows,
            slot_dependent=message.slot_dependent,
            optimised=optimised,
        )
