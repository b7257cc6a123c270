"""Variants of a bundle, made where their owner runs this: fp16, static int8 and fixed-shape forms of its program, each
measured against the fp32 form before anybody may choose it.

Needs `onnx` and `onnxruntime`, as they come with any runtime extra; both are imported late, and only here.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportMissingImports=false, reportMissingTypeStubs=false, reportUnknownParameterType=false
# pyright: reportAttributeAccessIssue=false
# onnx and onnxruntime carry no complete types.

from __future__ import annotations

import logging
import tempfile
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Final, cast

import numpy as np

from fallow.bundle import (
    Agreement,
    BundleManifest,
    BundleVariant,
    BytesCodec,
    Precision,
    ProgramFormat,
    ProgramStage,
    VariantForm,
)
from fallow.bundle_file import Bundle, FileSource, bundle_file
from fallow.byte_tokens import bytes_tokens
from fallow.errors import FallowError, Reason
from fallow.row_values import Array, ColumnValues, numpy_dtype
from fallow.schema import BytesColumn, TensorColumn
from fallow.sources import Rows, SourceRequest, source_of

SAMPLE_ROWS_MAX: Final = 512
"""Rows that are read from samples, or made: for calibration and for measuring agreement."""
SAMPLE_ROWS_SYNTHETIC: Final = 128
CALIBRATION_ROWS_MAX: Final = 256
FIXED_ROWS_MAX: Final = 1024
SEED: Final = 20_260
_INTEGER_TOPS: Final = (100, 2, 1)

Feeds = dict[str, Array]


@dataclass(frozen=True, slots=True)
class _Program:
    """The one program of a bundle."""

    stage: ProgramStage
    model: bytes


def optimized(
    bundle: Bundle, forms: Sequence[VariantForm | str], *, samples: Rows | None = None, fixed_rows: int = 1
) -> Bundle:
    """`bundle` with these forms of its program beside it, each a bundle of its own with its measured agreement.

    `samples` are rows as `map` takes them: int8 is calibrated on the first of them, and agreement is measured on up to
    512; rows made from the schema stand in when there are none. Fixed forms always take `fixed_rows` rows at once.
    Raises BUNDLE_INVALID naming the form that cannot be made and why, FIELD_INVALID, or what reading samples raises.
    """
    if not 1 <= fixed_rows <= FIXED_ROWS_MAX:
        raise FallowError(
            Reason.FIELD_INVALID,
            f"a fixed shape of {fixed_rows} rows",
            field="fixed_rows",
            limit=f"1 to {FIXED_ROWS_MAX} rows",
        )
    wanted = _forms(forms)
    program = _program_of(bundle)
    rows, origin = _sample_feeds(bundle.manifest, program, samples)
    expected = _answers(program.model, rows)
    variants: dict[VariantForm, Bundle] = {}
    entries: list[BundleVariant] = []
    for form in wanted:
        model = _converted(program, form, rows, fixed_rows)
        given = _answers(model, rows)
        variant = _variant_bundle(bundle, program.stage, form, model)
        variants[form] = variant
        entries.append(
            BundleVariant(form, variant.digest, variant.manifest.precision, _agreement(expected, given, origin))
        )
    return Bundle(replace(bundle.manifest, variants=tuple(entries)), bundle.files, variants=variants)


def _forms(given: Sequence[VariantForm | str]) -> list[VariantForm]:
    allowed = {form.value: form for form in VariantForm}
    for form in given:
        if form not in allowed:
            raise FallowError(
                Reason.FIELD_INVALID, f"there is no form {str(form)[:40]!r}", field="forms", limit=", ".join(allowed)
            )
    if not given:
        raise FallowError(Reason.FIELD_INVALID, "no form is asked for", field="forms", limit=", ".join(allowed))
    return list(dict.fromkeys(allowed[form] for form in given))


def _program_of(bundle: Bundle) -> _Program:
    stages = [stage for stage in bundle.manifest.stages if isinstance(stage, ProgramStage)]
    if len(stages) != 1 or stages[0].format is not ProgramFormat.ONNX:
        raise _invalid("only bundles with one ONNX program have variants", "stages")
    if bundle.manifest.precision is not Precision.FP32:
        raise _invalid(
            f"variants are made from the fp32 form, and this bundle is {bundle.manifest.precision.value}", "precision"
        )
    source = bundle.files[stages[0].file]
    return _Program(stages[0], source if isinstance(source, bytes) else source.read_bytes())


# ------------------------------------------------------------------------------------------------------------ rows


def _sample_feeds(manifest: BundleManifest, program: _Program, samples: Rows | None) -> tuple[Feeds, str]:
    """The program's inputs for the sample rows, and whether they were given or made."""
    if samples is not None:
        columns = _read_samples(manifest, samples)
        return _feeds(manifest, program, columns), "given"
    failure = ""
    for top in _INTEGER_TOPS:
        feeds = _feeds(manifest, program, _synthetic(manifest, top))
        try:
            _answers(program.model, {name: values[:1] for name, values in feeds.items()})
        except FallowError as error:
            failure = error.message
            continue
        return feeds, "synthetic"
    raise _invalid(f"the program fails on every row made from its schema: {failure}", "samples", "give sample rows")


def _read_samples(manifest: BundleManifest, samples: Rows) -> dict[str, ColumnValues]:
    windows = {
        stage.column: (stage.head_window_bytes, stage.tail_window_bytes)
        for stage in manifest.stages
        if isinstance(stage, BytesCodec)
    }
    source = source_of(samples, manifest.input_schema)
    parts: dict[str, list[Any]] = {column.name: [] for column in manifest.input_schema.columns}
    rows = 0
    for batch in islice(source.batches(SourceRequest(manifest.input_schema, windows, {}, (), False)), SAMPLE_ROWS_MAX):
        for name, values in batch.columns.items():
            parts[name].append(values[: SAMPLE_ROWS_MAX - rows])
        rows += min(batch.row_count, SAMPLE_ROWS_MAX - rows)
        if rows >= SAMPLE_ROWS_MAX:
            break
    if not rows:
        raise FallowError(Reason.DATASET_EMPTY, "there are no sample rows", field="samples")
    return {
        name: np.concatenate(pieces)
        if isinstance(pieces[0], np.ndarray)
        else [value for piece in pieces for value in piece]
        for name, pieces in parts.items()
    }


def _synthetic(manifest: BundleManifest, integer_top: int) -> dict[str, ColumnValues]:
    generator = np.random.default_rng(SEED)
    count = SAMPLE_ROWS_SYNTHETIC
    columns: dict[str, ColumnValues] = {}
    for column in manifest.input_schema.columns:
        if isinstance(column, TensorColumn):
            shape, dtype = (count, *column.shape), numpy_dtype(column.dtype)
            values: Any = (
                generator.standard_normal(shape, dtype=np.float32)
                if dtype.kind == "f"
                else generator.integers(0, 2 if dtype.kind == "b" else integer_top, shape)
            )
            columns[column.name] = values.astype(dtype)
        elif isinstance(column, BytesColumn):
            lengths = generator.integers(16, 4096, count)
            columns[column.name] = [generator.integers(32, 127, int(n), dtype=np.uint8).tobytes() for n in lengths]
        else:
            raise _invalid(f"rows cannot be made for column {column.name!r}", column.name, "give sample rows")
    return columns


def _feeds(manifest: BundleManifest, program: _Program, columns: Mapping[str, ColumnValues]) -> Feeds:
    """What the program's tensors are for these rows."""
    values: dict[str, Any] = dict(columns)
    for stage in manifest.stages:
        if isinstance(stage, BytesCodec):
            contents = cast("Sequence[bytes]", columns[stage.column])
            values[stage.output] = bytes_tokens(stage, contents)
    feeds: Feeds = {}
    for binding in program.stage.inputs:
        value = values.get(binding.value)
        if not isinstance(value, np.ndarray):
            raise _invalid(f"input {binding.tensor!r} of the program is no tensor made from the rows", "stages")
        feeds[binding.tensor] = value
    return feeds


# ------------------------------------------------------------------------------------------------------- conversion


def _converted(program: _Program, form: VariantForm, rows: Feeds, fixed_rows: int) -> bytes:
    model = program.model
    try:
        if form in {VariantForm.FP16, VariantForm.FP16_FIXED}:
            model = _half(model)
        elif form in {VariantForm.INT8, VariantForm.INT8_FIXED}:
            model = _quantised(model, rows)
        if form in {VariantForm.FIXED, VariantForm.FP16_FIXED, VariantForm.INT8_FIXED}:
            model = _with_fixed_rows(model, fixed_rows)
    except FallowError:
        raise
    except Exception as error:  # the converters raise many kinds for graphs that they do not know
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise _invalid(f"the {form.value} form cannot be made: {first[:200]}", form.value) from error
    return model


def _half(model: bytes) -> bytes:
    """Weights and arithmetic in fp16; inputs and outputs keep their types.

    NOTE: CPUs compute fp16 in fp32 from the rounded weights, so agreement measured there leaves out the rounding of
    values in between; a device that computes in fp16 would tell.
    """
    onnx, _ = _runtime()
    from onnxruntime.transformers.float16 import convert_float_to_float16

    with _quiet():
        converted = convert_float_to_float16(onnx.load_from_string(model), keep_io_types=True)
    return bytes(converted.SerializeToString())


def _quantised(model: bytes, rows: Feeds) -> bytes:
    """Static int8: scales are fixed by calibration, weights have 7 bits so that no CPU's sums saturate."""
    onnx, _ = _runtime()
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    count = min(CALIBRATION_ROWS_MAX, len(next(iter(rows.values()))))
    batch = _fixed_rows_of(onnx.load_from_string(model)) or 1

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # the base has no types
        def __init__(self) -> None:
            starts = range(0, count - batch + 1, batch)
            self._feeds = iter({name: a[start : start + batch] for name, a in rows.items()} for start in starts)

        def get_next(self) -> Any:
            return next(self._feeds, None)

    with tempfile.TemporaryDirectory(prefix="fallow-optimize-") as folder, _quiet():
        plain, made = Path(folder) / "plain.onnx", Path(folder) / "int8.onnx"
        quant_pre_process(onnx.load_from_string(model), str(plain), skip_symbolic_shape=True)
        quantize_static(
            str(plain),
            str(made),
            Reader(),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=True,
        )
        return made.read_bytes()


def _with_fixed_rows(model: bytes, rows: int) -> bytes:
    """The row axis of every input and output is `rows`; shapes within follow."""
    onnx, _ = _runtime()
    parsed = onnx.load_from_string(model)
    initializers = {tensor.name for tensor in parsed.graph.initializer}
    del parsed.graph.value_info[:]
    for value in (*parsed.graph.input, *parsed.graph.output):
        dims = value.type.tensor_type.shape.dim
        if value.name in initializers or not dims:
            continue
        if dims[0].HasField("dim_value") and dims[0].dim_value != rows:
            raise _invalid(
                f"the program always takes {dims[0].dim_value} rows",
                "fixed_rows",
                f"{dims[0].dim_value}, or a model with a free row axis",
            )
        dims[0].ClearField("dim_param")
        dims[0].dim_value = rows
    return bytes(onnx.shape_inference.infer_shapes(parsed, data_prop=True).SerializeToString())


def _variant_bundle(bundle: Bundle, stage: ProgramStage, form: VariantForm, model: bytes) -> Bundle:
    files: dict[str, FileSource] = {**bundle.files, stage.file: model}
    precision = {
        VariantForm.FP16: Precision.FP16,
        VariantForm.FP16_FIXED: Precision.FP16,
        VariantForm.INT8: Precision.INT8,
        VariantForm.INT8_FIXED: Precision.INT8,
    }.get(form, Precision.FP32)
    manifest = replace(
        bundle.manifest,
        name=f"{bundle.manifest.name}-{form.value}",
        files=tuple(bundle_file(file.name, files[file.name]) for file in bundle.manifest.files),
        precision=precision,
        variants=(),
    )
    return Bundle(manifest, files)


# -------------------------------------------------------------------------------------------------------- agreement


def _answers(model: bytes, rows: Feeds) -> dict[str, Array]:
    """The program's outputs for the rows, run in batches of the size that it asks for, else all at once."""
    onnx, runtime = _runtime()
    try:
        options = runtime.SessionOptions()
        options.log_severity_level = 3
        session = runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        count = len(next(iter(rows.values())))
        batch = _fixed_rows_of(onnx.load_from_string(model)) or min(count, 32)
        parts: dict[str, list[Array]] = {name: [] for name in names}
        for start in range(0, count, batch):
            feeds = {name: _padded(values[start : start + batch], batch) for name, values in rows.items()}
            for name, values in zip(names, session.run(names, feeds), strict=True):
                parts[name].append(values[: count - start])
    except Exception as error:  # the runtime raises many kinds
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise _invalid(f"the program does not run on the sample rows: {first[:300]}", "samples") from error
    return {name: np.concatenate(pieces) for name, pieces in parts.items()}


def _padded(values: Array, rows: int) -> Array:
    if len(values) == rows:
        return values
    return np.concatenate([values, np.zeros((rows - len(values), *values.shape[1:]), dtype=values.dtype)])


def _agreement(expected: Mapping[str, Array], given: Mapping[str, Array], origin: str) -> Agreement:
    """How far the answers lie from the fp32 form's, and for how many rows the largest entry is the same one."""
    rows = len(next(iter(expected.values())))
    error_max = value_max = 0.0
    labelled = False
    agreeing = np.ones(rows, dtype=np.bool_)
    for name, wanted in expected.items():
        got = given[name]
        if wanted.shape != got.shape:
            raise _invalid(f"output {name!r} changes its shape: {wanted.shape}, {got.shape}", "model")
        exact, found = wanted.astype(np.float64), got.astype(np.float64)
        same = (exact == found) | (np.isnan(exact) & np.isnan(found))
        distance = np.where(same, 0.0, np.abs(exact - found))
        if not np.isfinite(distance).all():
            raise _invalid(
                f"output {name!r} is not finite where the fp32 form's is: the range of the form is too small", "model"
            )
        error_max = max(error_max, float(distance.max(initial=0.0)))
        value_max = max(value_max, float(np.abs(exact[np.isfinite(exact)]).max(initial=0.0)))
        if wanted.ndim == 2 and wanted.shape[1] > 1 and wanted.dtype.kind == "f":
            labelled = True
            agreeing &= wanted.argmax(axis=1) == got.argmax(axis=1)
    return Agreement(
        rows=rows,
        samples=origin,
        error_max=error_max,
        value_max=value_max,
        labelled_rows=rows if labelled else 0,
        labels_agreeing=int(agreeing.sum()) if labelled else 0,
    )


def _fixed_rows_of(parsed: Any) -> int | None:
    """How many rows the model always takes; None: any."""
    initializers = {tensor.name for tensor in parsed.graph.initializer}
    for value in parsed.graph.input:
        dims = value.type.tensor_type.shape.dim
        if value.name not in initializers and dims and dims[0].HasField("dim_value"):
            return int(dims[0].dim_value)
    return None


def _runtime() -> tuple[Any, Any]:
    """The packages `onnx` and `onnxruntime`. Raises BUNDLE_INVALID saying what to install."""
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise FallowError(
            Reason.BUNDLE_INVALID,
            f"variants cannot be made here: {error}",
            field="model",
            hint="`pip install 'fallow[cpu]'` brings what it takes",
        ) from None
    return onnx, onnxruntime


@contextmanager
def _quiet() -> Generator[None, None, None]:
    """The converters tell their story on the root logger; nobody asked."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)


def _invalid(message: str, field: str, limit: str = "") -> FallowError:
    return FallowError(Reason.BUNDLE_INVALID, message, field=field, limit=limit)
