"""Stand-ins for other machines: the same bundle in other forms of its arithmetic, and in coarser ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from engine_models import INPUT_DIGEST, OUTPUT_DIGEST, PROGRAM_FILE
from fallow.bundle import BundleManifest
from fallow.comparison import CandidateFinding, ToleranceProfile
from fallow.row_block import RowBlock
from fallow.row_values import ColumnValues
from fallow.rows import RowCodec
from fallow_worker.engine import referee
from fallow_worker.engine.chain import Chain
from fallow_worker.engine.protocol import CandidatePlacement, FilePlacement, Placement, Referee

OWN_CLASS, OTHER_CLASS = "class-a", "class-b"
NONCE = bytes(16)
NOWHERE = Placement(0, 1)


@dataclass(frozen=True, slots=True)
class Machine:
    """One who runs the bundle: honest in a class of his own, or not."""

    manifest: BundleManifest
    files: Mapping[str, bytes]
    batch_rows: int = 4
    optimised: bool = True
    slot_dependent: bool = False

    def outputs(self, columns: Mapping[str, ColumnValues]) -> RowBlock:
        """The output block of these rows."""
        chain = Chain(
            self.manifest,
            self.files,
            input_schema_digest=INPUT_DIGEST,
            output_schema_digest=OUTPUT_DIGEST,
            batch_rows=self.batch_rows,
            slot_dependent=self.slot_dependent,
            optimised=self.optimised,
        )
        return RowBlock.parse(chain.run(self.rows(columns), nonce=NONCE).block)

    def rows(self, columns: Mapping[str, ColumnValues]) -> RowBlock:
        """The input block of these rows."""
        return RowBlock.parse(RowCodec(self.manifest.input_schema, INPUT_DIGEST).encode(columns, nonce=NONCE))

    def unoptimised(self) -> Machine:
        """A stand-in for another class: the graph as it was written."""
        return replace(self, optimised=False)

    def in_batches_of(self, rows: int) -> Machine:
        """A stand-in for another class: kernels for another batch."""
        return replace(self, batch_rows=rows)

    def with_weights(self, change: Any) -> Machine:
        """Somebody with other weights, such as those rounded to fp16."""
        return replace(self, files={**self.files, PROGRAM_FILE: changed_weights(self.files[PROGRAM_FILE], change)})


def changed_weights(model: bytes, change: Any) -> bytes:
    """The model with `change` done to every floating weight."""
    parsed = onnx.load_from_string(model)
    for tensor in parsed.graph.initializer:
        weights: NDArray[Any] = numpy_helper.to_array(tensor)
        if weights.dtype.kind == "f":
            tensor.CopyFrom(numpy_helper.from_array(np.asarray(change(weights), np.float32), tensor.name))
    return bytes(parsed.SerializeToString())


def halved(weights: NDArray[Any]) -> NDArray[Any]:
    """Weights as fp16 holds them."""
    return weights.astype(np.float16)


def quantised(weights: NDArray[Any]) -> NDArray[Any]:
    """Weights as 8 bits a tensor hold them."""
    step = float(np.abs(weights).max()) / 127
    return np.rint(weights / step) * step


def rewritten(machine: Machine, block: RowBlock, change: Callable[[dict[str, Any]], dict[str, Any]]) -> RowBlock:
    """An output block with `change` done to its columns."""
    codec = RowCodec(machine.manifest.output_schema, OUTPUT_DIGEST)
    columns = {name: np.array(values) if isinstance(values, np.ndarray) else list(values)
               for name, values in codec.decode(block).columns.items()}  # fmt: skip
    return RowBlock.parse(codec.encode(change(columns), nonce=NONCE))


def found(
    machine: Machine,
    columns: Mapping[str, ColumnValues],
    candidates: Sequence[tuple[RowBlock, str]],
    *,
    own: RowBlock | None = None,
    profiles: tuple[ToleranceProfile, ...] = (),
    runs_program: bool = True,
    seconds_max: float = 60.0,
    slots: tuple[int, ...] | None = None,
) -> list[list[CandidateFinding]]:
    """What a referee on `machine`, in class a, finds of whole candidate blocks: by candidate, by row."""
    rows = machine.rows(columns)
    mine = own or machine.outputs(columns)
    count = tuple(range(len(rows)))
    message = Referee(
        manifest=machine.manifest,
        input_schema_digest=INPUT_DIGEST,
        output_schema_digest=OUTPUT_DIGEST,
        files=tuple(FilePlacement(name, NOWHERE) for name in machine.files) if runs_program else (),
        canonical_batch_rows=machine.batch_rows,
        slot_dependent=machine.slot_dependent,
        input=NOWHERE,
        slots=None,
        own=NOWHERE,
        own_class=OWN_CLASS,
        candidates=tuple(
            CandidatePlacement(NOWHERE, count, ((OWN_CLASS, OTHER_CLASS).index(name),) * len(rows))
            for _, name in candidates
        ),
        execution_classes=(OWN_CLASS, OTHER_CLASS),
        profiles=profiles,
        spread=None,
        seconds_max=seconds_max,
    )
    blocks = referee.Blocks(rows, mine, tuple(block for block, _ in candidates), slots)
    result = referee.compare(message, files=machine.files, blocks=blocks, progress=lambda _: None)
    return [[row.candidates[index] for row in result.rows] for index in range(len(candidates))]
