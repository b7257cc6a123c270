"""ONNX programs on ONNX Runtime, from bytes, on the CPU: one session, checked against what the chain feeds it."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from fallow.bundle import ProgramStage
from fallow.errors import FallowError, Reason
from fallow.schema import DType
from fallow_worker.engine.protocol import WIDE_PROGRAM_BYTES_MAX, clipped_reason
from fallow_worker.engine.stages import CODEC_VERSION

Array = NDArray[Any]

ort: Any = onnxruntime
"""The package has no complete types."""

_DTYPES: dict[str, DType] = {
    "tensor(float)": DType.FLOAT32,
    "tensor(double)": DType.FLOAT64,
    "tensor(float16)": DType.FLOAT16,
    "tensor(int8)": DType.INT8,
    "tensor(int16)": DType.INT16,
    "tensor(int32)": DType.INT32,
    "tensor(int64)": DType.INT64,
    "tensor(uint8)": DType.UINT8,
    "tensor(uint16)": DType.UINT16,
    "tensor(uint32)": DType.UINT32,
    "tensor(uint64)": DType.UINT64,
    "tensor(bool)": DType.BOOL,
}
_NUMERIC_CPU_FLAGS = frozenset(
    [
        "sse4_1",
        "sse4_2",
        "avx",
        "avx2",
        "fma",
        "f16c",
        "avx512f",
        "avx512bw",
        "avx512dq",
        "avx512vl",
        "avx512_vnni",
        "avx512_bf16",
        "avx512_fp16",
        "avx_vnni",
        "avx_vnni_int8",
        "amx_tile",
        "amx_int8",
        "amx_bf16",
        "asimd",
        "asimdhp",
        "asimddp",
        "fphp",
        "i8mm",
        "bf16",
        "sve",
        "sve2",
        "sme",
    ]
)
"""Instruction sets by which the runtime and NumPy choose among kernels."""


@dataclass(frozen=True, slots=True)
class TensorType:
    """An element type and the shape of one row; None: a dimension that only running the program will tell."""

    dtype: DType
    shape: tuple[int | None, ...]

    def __str__(self) -> str:
        return f"{self.dtype.value}[{', '.join('?' if dim is None else str(dim) for dim in self.shape)}]"


@dataclass(frozen=True, slots=True)
class _Slot:
    """An input or output of a program."""

    type: TensorType
    batch: int | None
    """The fixed size of its row axis; None when it is free."""


def session_options(*, threads: int, allow_spinning: bool, optimised: bool = True) -> Any:
    """How every session runs: one operator at a time, deterministic kernels, all graph optimisations.

    Not `optimised`: the graph as it was written, for the same arithmetic in another form.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimised else levels.ORT_DISABLE_ALL
    options.use_deterministic_compute = True
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if allow_spinning else "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    return options


class OnnxProgram:
    """A foreign model in one session or two: narrow for many batches at once, wide for one at a time."""

    def __init__(
        self,
        model: bytes,
        stage: ProgramStage,
        *,
        threads: int,
        lanes: int,
        allow_spinning: bool,
        optimised: bool = True,
    ) -> None:
        """Loads `model`. Raises PROGRAM_REFUSED when the runtime will not have it, BUNDLE_INVALID for wrong
        bindings."""
        options = session_options(threads=max(1, threads // lanes), allow_spinning=allow_spinning, optimised=optimised)
        self._narrow = _session(model, stage.file, options)
        self._wide = self._narrow
        if lanes > 1 and len(model) <= WIDE_PROGRAM_BYTES_MAX:
            options = session_options(threads=threads, allow_spinning=allow_spinning, optimised=optimised)
            self._wide = _session(model, stage.file, options)
        self.stage = stage
        self._inputs = {value.name: _slot(value, stage.file) for value in self._narrow.get_inputs()}
        # Outputs that nobody wants may be of any kind: converters of classifiers emit maps and strings beside scores.
        wanted = {binding.tensor for binding in stage.outputs}
        declared = {value.name: value for value in self._narrow.get_outputs()}
        self._check_names(declared)
        self._outputs = {name: _slot(declared[name], stage.file, is_output=True) for name in wanted}
        self._feed_names = tuple((binding.tensor, binding.value) for binding in stage.inputs)
        self._fetch_names = [binding.tensor for binding in stage.outputs]
        self._fetch_values = tuple(binding.value for binding in stage.outputs)

    @property
    def is_wide(self) -> bool:
        """Whether a batch may run on all threads in a session of its own."""
        return self._wide is not self._narrow

    @property
    def fixed_batch(self) -> int | None:
        """The number of rows that this program always takes; None when any will do."""
        sizes = {slot.batch for slot in self._inputs.values()} - {None}
        if len(sizes) > 1:
            raise FallowError(
                Reason.BUNDLE_INVALID,
                f"inputs of {self.stage.file!r} disagree on the number of rows: {sorted(map(str, sizes))}",
                field=self.stage.file,
            )
        return next(iter(sizes), None)

    def check_inputs(self, values: Mapping[str, TensorType]) -> None:
        """Raises BUNDLE_INVALID naming the tensor when the chain's `values` are not what the program takes."""
        for tensor, value in self._feed_names:
            have = values.get(value)
            wanted = self._inputs[tensor].type
            if have is None:
                raise FallowError(
                    Reason.BUNDLE_INVALID,
                    f"input {tensor!r} of {self.stage.file!r} is bound to {value!r}, which is no tensor of the chain",
                    field=f"inputs[{tensor}]",
                    limit=", ".join(sorted(values)) or "no tensors",
                )
            if have.dtype is not wanted.dtype or not _shapes_agree(have.shape, wanted.shape):
                raise FallowError(
                    Reason.BUNDLE_INVALID,
                    f"input {tensor!r} of {self.stage.file!r} takes {wanted} for each row, but {value!r} is {have}",
                    field=f"inputs[{tensor}]",
                    limit=str(wanted),
                )

    def output_types(self) -> dict[str, TensorType]:
        """The declared type of each value that this program adds to the chain."""
        return {binding.value: self._outputs[binding.tensor].type for binding in self.stage.outputs}

    def run(self, values: Mapping[str, Array], rows: int, *, wide: bool = True) -> dict[str, Array]:
        """The program's outputs for one batch of exactly `rows` rows. Raises whatever the runtime raises.

        `wide` uses all threads for this batch; narrow runs may go on in several threads of the caller at once.
        """
        session: Any = self._wide if wide else self._narrow
        fetched: list[Any] = session.run(
            self._fetch_names, {tensor: values[value] for tensor, value in self._feed_names}
        )
        outputs: dict[str, Array] = {}
        for value, array in zip(self._fetch_values, fetched, strict=True):
            shape = tuple(getattr(array, "shape", ()))
            if not isinstance(array, np.ndarray) or shape[:1] != (rows,):
                raise FallowError(
                    Reason.BUNDLE_INVALID,
                    f"output bound to {value!r} has no row axis: shape {list(shape)} for {rows} rows",
                    field=f"outputs[{value}]",
                    limit=f"first dimension {rows}",
                    hint="leave it out: name the outputs to keep (`outputs=`, `--outputs`)",
                )
            outputs[value] = cast("Array", array)
        return outputs

    def only_narrow(self) -> None:
        """Runs every batch on the threads of a lane from now on."""
        self._wide = self._narrow

    def _check_names(self, outputs: Mapping[str, object]) -> None:
        bound = [binding.tensor for binding in self.stage.inputs]
        for tensor in bound:
            if tensor not in self._inputs:
                raise _unknown("input", tensor, self.stage.file, self._inputs)
        for tensor in self._inputs:
            if bound.count(tensor) != 1:
                raise FallowError(
                    Reason.BUNDLE_INVALID,
                    f"input {tensor!r} of {self.stage.file!r} is bound {bound.count(tensor)} times",
                    field=f"inputs[{tensor}]",
                    limit="once",
                )
        for binding in self.stage.outputs:
            if binding.tensor not in outputs:
                raise _unknown("output", binding.tensor, self.stage.file, outputs)


def _session(model: bytes, file: str, options: Any) -> Any:
    try:
        return ort.InferenceSession(
            model,
            sess_options=options,
            providers=["CPUExecutionProvider"],
        )
    except Exception as error:  # whatever the runtime raises, it raises it about the model
        raise FallowError(
            Reason.PROGRAM_REFUSED, f"the runtime cannot load {file!r}: {clipped_reason(str(error))}", field=file
        ) from None


def runtime_name() -> str:
    """The runtime and its version."""
    return f"onnxruntime {ort.__version__}"


def prepare_runtime() -> None:
    """Turns off what a runtime may tell its makers, and its chatter."""
    ort.disable_telemetry_events()
    ort.set_default_logger_severity(3)


@cache
def machine_class(*, data_limit_bytes: int, threads_per_batch: int = 1) -> str:
    """Everything on this machine that decides output bits, but precision and batch: readable parts and one digest.

    A batch runs on `threads_per_batch` threads, or on more where that was seen to change no bit.
    """
    machine = platform.machine()
    facts = [
        f"onnxruntime {ort.__version__} {ort.get_build_info()}",
        f"numpy {np.__version__}",
        f"codec {CODEC_VERSION}",
        f"data {data_limit_bytes}",
        "provider cpu, all optimisations, deterministic",
        f"threads {threads_per_batch} a batch, one operator at a time",
        f"{machine} {' '.join(sorted(_cpu_flags()))}",
    ]
    digest = sha256("\n".join(facts).encode()).hexdigest()[:12]
    return f"ort-{ort.__version__}/cpu/{machine}/{digest}"


def execution_class(base: str, *, precision: str, batch_rows: int) -> str:
    """`base` (of `machine_class`) with what a bundle adds: its declared precision and canonical batch."""
    return f"{base}/{precision}/b{batch_rows}"


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return {platform.processor()}
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() in {"flags", "Features"}:
            return set(value.split()) & _NUMERIC_CPU_FLAGS
    return set()


def _slot(value: Any, file: str, *, is_output: bool = False) -> _Slot:
    dtype = _DTYPES.get(value.type)
    what = "output" if is_output else "input"
    if dtype is None:
        raise FallowError(
            Reason.BUNDLE_INVALID,
            f"{what} {value.name!r} of {file!r} is {value.type}, which no row can hold",
            field=f"{what}s[{value.name}]",
            limit=", ".join(sorted(_DTYPES)),
        )
    dims = list(value.shape)
    if not dims:
        if is_output:
            return _Slot(TensorType(dtype, ()), None)
        raise FallowError(
            Reason.BUNDLE_INVALID,
            f"{what} {value.name!r} of {file!r} is a scalar without a row axis",
            field=f"{what}s[{value.name}]",
            limit="at least one dimension, the first being the rows",
        )
    shape = tuple(dim if isinstance(dim, int) and dim >= 0 else None for dim in dims)
    return _Slot(TensorType(dtype, shape[1:]), shape[0])


def _shapes_agree(have: tuple[int | None, ...], wanted: tuple[int | None, ...]) -> bool:
    return len(have) == len(wanted) and all(
        mine is None or theirs is None or mine == theirs for mine, theirs in zip(have, wanted, strict=True)
    )


def _unknown(what: str, tensor: str, file: str, known: Mapping[str, object]) -> FallowError:
    return FallowError(
        Reason.BUNDLE_INVALID,
        f"{file!r} has no {what} {tensor!r}",
        field=f"{what}s[{tensor}]",
        limit=", ".join(known),
    )
