"""Whether a bundle's stages, programs and schemas fit together: types along the chain, names, batches, labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, cast

from numpy.typing import NDArray

from fallow.bundle import BundleManifest, BytesCodec, ProgramStage, SoftmaxHead, TopKHead
from fallow.errors import FallowError, Reason
from fallow.row_values import numpy_dtype
from fallow.schema import BytesColumn, DType, SizeFeature, StringColumn, TensorColumn
from fallow_worker.engine import stages
from fallow_worker.engine.onnx_program import OnnxProgram, TensorType

Array = NDArray[Any]

CANONICAL_BATCH_ROWS_MAX: Final = 1024


def check_types(manifest: BundleManifest, programs: Mapping[int, OnnxProgram], labels: Mapping[int, list[str]]) -> None:
    """Walks the chain by types. Raises BUNDLE_INVALID at the first stage that does not fit."""
    _check_size_features(manifest)
    schema = manifest.input_schema
    tensors = {
        column.name: TensorType(column.dtype, column.shape)
        for column in schema.columns
        if isinstance(column, TensorColumn)
    }
    contents = {column.name for column in schema.columns if isinstance(column, BytesColumn)}
    texts: set[str] = set()
    for index, stage in enumerate(manifest.stages):
        where = f"stages[{index}]"
        match stage:
            case BytesCodec():
                if stage.column not in contents:
                    raise _missing(f"{where}.column", stage.column, "column of bytes", contents)
                _add(tensors, stage.output, TensorType(DType.INT32, (stage.head_tokens + stage.tail_tokens,)), where)
            case ProgramStage():
                program = programs[index]
                program.check_inputs(tensors)
                for name, declared in program.output_types().items():
                    _add(tensors, name, declared, where)
            case SoftmaxHead():
                value = _tensor(tensors, stage.value, f"{where}.value")
                _add(tensors, stage.output, TensorType(DType.FLOAT32, value.shape), where)
            case TopKHead():
                value = _tensor(tensors, stage.value, f"{where}.value")
                _check_labels(manifest, stage, value, len(labels[index]), where)
                for label, score in stages.head_columns(stage):
                    texts.add(label)
                    _add(tensors, score, TensorType(DType.FLOAT32, ()), where)
    _check_columns(manifest, tensors, texts)


def _check_labels(manifest: BundleManifest, stage: TopKHead, value: TensorType, labels: int, where: str) -> None:
    rank_wrong = len(value.shape) != 1
    size = None if rank_wrong else value.shape[0]
    if rank_wrong or stage.k < 1 or stage.k > labels or (size is not None and size != labels):
        raise FallowError(
            Reason.BUNDLE_INVALID,
            f"{stage.labels_file!r} has {labels} labels, {stage.value!r} is {value}, k is {stage.k}",
            field=f"{where}.labels_file",
            limit="one dimension, one label for each entry, k of at least 1 and at most that",
        )
    if stage.short_label:
        content_column(manifest)


def content_column(manifest: BundleManifest) -> str:
    """The column whose length decides about short rows: the only one of bytes."""
    names = [column.name for column in manifest.input_schema.columns if isinstance(column, BytesColumn)]
    if len(names) != 1:
        raise FallowError(
            Reason.BUNDLE_INVALID,
            f"a label for short rows needs exactly one column of bytes, there are {len(names)}",
            field="short_label",
        )
    return names[0]


def _tensor(tensors: Mapping[str, TensorType], name: str, where: str) -> TensorType:
    value = tensors.get(name)
    if value is None:
        raise _missing(where, name, "tensor", tensors)
    return value


def _check_size_features(manifest: BundleManifest) -> None:
    for field_name, schema in (
        ("input_schema", manifest.input_schema),
        ("output_schema", manifest.output_schema),
    ):
        for feature in schema.size_features:
            if feature is not SizeFeature.BYTES:
                raise FallowError(
                    Reason.BUNDLE_INVALID,
                    f"no stage here can count {feature.value!r}",
                    field=f"{field_name}.size_features",
                    limit=SizeFeature.BYTES.value,
                )


def _check_columns(manifest: BundleManifest, tensors: Mapping[str, TensorType], texts: set[str]) -> None:
    for index, column in enumerate(manifest.output_schema.columns):
        where = f"output_schema.columns[{index}]"
        match column:
            case TensorColumn():
                value = _tensor(tensors, column.name, where)
                declared = TensorType(column.dtype, column.shape)
                fits = len(value.shape) == len(column.shape) and all(
                    mine is None or mine == theirs for mine, theirs in zip(value.shape, column.shape, strict=True)
                )
                if value.dtype is not column.dtype or not fits:
                    raise FallowError(
                        Reason.BUNDLE_INVALID,
                        f"output column {column.name!r} is declared {declared}, the chain gives {value}",
                        field=where,
                        limit=str(value),
                    )
            case StringColumn():
                if column.name not in texts:
                    raise _missing(where, column.name, "label", texts)
            case _:
                raise FallowError(
                    Reason.BUNDLE_INVALID,
                    f"output column {column.name!r} is of a kind that no stage gives",
                    field=where,
                    limit="tensors and labels",
                )


def check_output(manifest: BundleManifest, name: str, values: Array) -> None:
    """Raises BUNDLE_INVALID when what a program really gave is not what the output schema says."""
    column = manifest.output_schema.column(name)
    assert isinstance(column, TensorColumn), name
    if values.dtype != numpy_dtype(column.dtype) or values.shape[1:] != column.shape:
        raise FallowError(
            Reason.BUNDLE_INVALID,
            f"output column {name!r} is declared {TensorType(column.dtype, column.shape)}, "
            f"the program gave {values.dtype}{list(values.shape[1:])}",
            field=name,
        )


def fixed_batch_of(programs: Mapping[int, OnnxProgram]) -> int | None:
    """The rows that the programs always take; None when any number will do. Raises BUNDLE_INVALID when they differ."""
    sizes = {program.fixed_batch for program in programs.values()} - {None}
    if len(sizes) > 1:
        raise FallowError(
            Reason.BUNDLE_INVALID,
            f"the programs take different numbers of rows: {sorted(map(str, sizes))}",
            field="stages",
        )
    return next(iter(sizes), None)


def canonical_batch(wanted: int, fixed: int | None, *, neighbour_dependent: bool) -> int:
    """b for a chain whose programs fix `fixed` rows: `wanted` unless it is 0. Raises BUNDLE_INVALID, LIMIT_EXCEEDED."""
    batch = wanted or fixed or 1
    if not 1 <= batch <= CANONICAL_BATCH_ROWS_MAX:
        raise FallowError(
            Reason.LIMIT_EXCEEDED,
            f"a batch of {batch} rows",
            field="canonical_batch_rows",
            limit=f"1 to {CANONICAL_BATCH_ROWS_MAX}",
        )
    if fixed is not None and batch != fixed:
        raise FallowError(
            Reason.BUNDLE_INVALID,
            f"the program always takes {fixed} rows, not {batch}",
            field="canonical_batch_rows",
            limit=str(fixed),
        )
    if neighbour_dependent and batch != 1:
        raise FallowError(
            Reason.BUNDLE_INVALID,
            "rows of this program depend on their neighbours",
            field="canonical_batch_rows",
            limit="1",
        )
    return batch


def skippable_bytes(manifest: BundleManifest) -> int:
    """The content length up to which rows are answered without a program; -1: none are."""
    heads = [stage for stage in manifest.stages if isinstance(stage, TopKHead)]
    given = {name for head in heads for pair in stages.head_columns(head) for name in pair}
    names = {column.name for column in manifest.output_schema.columns}
    if not heads or not all(head.short_label for head in heads) or not names <= given:
        return -1
    return min(head.short_bytes_max for head in heads)


def _add(tensors: dict[str, TensorType], name: str, declared: TensorType, where: str) -> None:
    if name in tensors:
        raise FallowError(Reason.BUNDLE_INVALID, f"two values of the chain are called {name!r}", field=where)
    tensors[name] = declared


def _missing(where: str, name: str, what: str, known: object) -> FallowError:
    names = ", ".join(sorted(cast("set[str]", known)))
    return FallowError(Reason.BUNDLE_INVALID, f"there is no {what} {name!r}", field=where, limit=names or "none")


def file_of(files: Mapping[str, bytes], name: str, where: str) -> bytes:
    """The content of a file of the bundle. Raises BUNDLE_INVALID naming `where` it is missing."""
    content = files.get(name)
    if content is None:
        raise FallowError(
            Reason.BUNDLE_INVALID, f"the bundle has no file {name!r}", field=where, limit=", ".join(files) or "no files"
        )
    return content
