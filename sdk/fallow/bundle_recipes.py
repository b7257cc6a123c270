"""Bundles made from models: the signature is read from the file, the schemas follow from it."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from fallow.bundle import (
    RESERVED_PREFIX,
    Binding,
    BundleManifest,
    BytesCodec,
    Precision,
    ProgramFormat,
    ProgramStage,
    Stage,
    TopKHead,
)
from fallow.bundle_file import About, Bundle, FileSource, bundle_file
from fallow.errors import FallowError, Reason
from fallow.onnx_signature import OnnxSignature, OnnxValue, read_onnx_signature
from fallow.onnx_weights import with_weights_inside
from fallow.schema import BytesColumn, DType, Schema, SizeFeature, StringColumn, TensorColumn

_PROGRAM_NAME = "model.onnx"
_MAGIKA_MODEL = "magika/models/standard_v3_3"


def bundle_from_onnx(
    path: Path,
    *,
    about: About,
    outputs: Sequence[str],
    shapes: Mapping[str, Sequence[int]],
    dims: Mapping[str, int],
) -> Bundle:
    """See `Bundle.from_onnx`."""
    signature = read_onnx_signature(path)
    kept = _chosen_outputs(signature, [outputs] if isinstance(outputs, str) else outputs)
    unknown = set(shapes) - {value.name for value in (*signature.inputs, *kept)}
    if unknown:
        raise _invalid(f"there is no input or output {sorted(unknown)[0]!r}", "shapes", _names(signature))
    reader = _ColumnReader(shapes, dims)
    inputs = [reader.column(value, "input") for value in signature.inputs]
    if not inputs:
        raise _invalid(f"{path} takes no input", "inputs", "at least one input with the row axis first")
    results = [reader.column(value, "output") for value in kept]
    _check_output_names(results, inputs)
    unused = set(dims) - reader.symbols
    if unused:
        named = ", ".join(sorted(reader.symbols)) or "none"
        raise _invalid(f"the model has no dimension called {sorted(unused)[0]!r}", "dims", named)
    stage = ProgramStage(
        format=ProgramFormat.ONNX,
        file=_PROGRAM_NAME,
        inputs=tuple(Binding(column.name, column.name) for column in inputs),
        outputs=tuple(Binding(column.name, column.name) for column in results),
    )
    return _bundle(
        path,
        about,
        (stage,),
        Schema(tuple(inputs)),
        Schema(tuple(results)),
        files={_PROGRAM_NAME: _program(path, signature)},
    )


def bundle_from_bytes_model(
    path: Path,
    *,
    codec: BytesCodec,
    head: TopKHead,
    labels: Sequence[str] | str | Path,
    about: About,
) -> Bundle:
    """See `Bundle.from_bytes_model`."""
    signature = read_onnx_signature(path)
    _check_codec(codec)
    tokens = codec.head_tokens + codec.tail_tokens
    if len(signature.inputs) != 1 or len(signature.outputs) != 1:
        raise _invalid(
            f"a bytes model takes one tensor and gives one, {path} has {_names(signature)}", "model", "one of each"
        )
    reader = _ColumnReader({signature.inputs[0].name: (tokens,)}, {})
    given, scores = reader.column(signature.inputs[0], "input"), reader.column(signature.outputs[0], "output")
    if given.dtype is not DType.INT32:
        raise _invalid(f"input {given.name!r} takes {given.dtype.value}", "model", "int32 tokens")
    if scores.dtype is not DType.FLOAT32 or len(scores.shape) != 1:
        raise _invalid(
            f"output {scores.name!r} is {scores.dtype.value}{list(scores.shape)}", "model", "float32[labels]"
        )
    names = _labels(labels)
    if len(names) != scores.shape[0]:
        raise _invalid(f"{len(names)} labels for {scores.shape[0]} scores", "labels", "one label for each score")
    if not 1 <= head.k <= len(names):
        raise _invalid(f"the best {head.k} of {len(names)} labels", "top_k", f"1 to {len(names)}")
    stages = (
        codec,
        ProgramStage(
            format=ProgramFormat.ONNX,
            file=_PROGRAM_NAME,
            inputs=(Binding(given.name, codec.output),),
            outputs=(Binding(scores.name, head.value),),
        ),
        head,
    )
    columns: list[StringColumn | TensorColumn] = []
    for name in [head.output] if head.k == 1 else [f"{head.output}_{place}" for place in range(head.k)]:
        columns += [StringColumn(name), TensorColumn(f"{name}_score", DType.FLOAT32, ())]
    return _bundle(
        path,
        about,
        stages,
        Schema((BytesColumn(codec.column),), (SizeFeature.BYTES,)),
        Schema(tuple(columns)),
        files={
            _PROGRAM_NAME: _program(path, signature),
            head.labels_file: "".join(f"{name}\n" for name in names).encode(),
        },
    )


def magika_bundle() -> Bundle:
    """See `Bundle.magika`."""
    try:
        package = importlib.metadata.distribution("magika")
    except importlib.metadata.PackageNotFoundError:
        raise FallowError(
            Reason.BUNDLE_INVALID,
            "the package magika is not installed",
            field="model",
            hint="`pip install --no-deps magika==1.0.3`, then try again",
        ) from None
    model = Path(str(package.locate_file(_MAGIKA_MODEL)))
    try:
        config = cast("dict[str, Any]", json.loads((model / "config.min.json").read_text(encoding="utf-8")))
        overwrite = cast("dict[str, str]", config["overwrite_map"])
        labels = [overwrite.get(label, label) for label in cast("list[str]", config["target_labels_space"])]
        head_tokens, tail_tokens = int(config["beg_size"]), int(config["end_size"])
        window, padding = int(config["block_size"]), int(config["padding_token"])
        least = int(config["min_file_size_for_dl"])
        plain = config["mid_size"] == 0 and not config["use_inputs_at_offsets"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _invalid(
            f"magika {package.version} has no model that this version of fallow knows ({error})", "model", "magika 1.0"
        ) from error
    if not plain:
        raise _invalid(f"magika {package.version} reads parts of files that no codec here reads", "model", "magika 1.0")
    return Bundle.from_bytes_model(
        model / "model.onnx",
        head_window=window,
        tail_window=window,
        head_tokens=head_tokens,
        tail_tokens=tail_tokens,
        padding_token=padding,
        strip_whitespace=True,
        labels=labels,
        short_label="unknown",
        short_bytes_max=least - 1,
        name="magika",
        title=f"Magika file types ({model.name}, package {package.version})",
        publisher="Google",
        purpose="labels files by content type",
        url="https://github.com/google/magika",
        licence="Apache-2.0",
    )


class _ColumnReader:
    """Turns a model's values into tensor columns, with what the submitter said about open dimensions."""

    def __init__(self, shapes: Mapping[str, Sequence[int]], dims: Mapping[str, int]) -> None:
        self._shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self._dims = dims
        self._batch_rows: int | None = None
        self.symbols: set[str] = set()
        """Named dimensions met so far."""

    def column(self, value: OnnxValue, side: str) -> TensorColumn:
        """The column of an input or output. Raises BUNDLE_INVALID naming it and what is open."""
        where = f"{side} {value.name!r}"
        if value.dtype is None:
            hint = "leave it out: name the outputs to keep (`outputs=`, `--outputs`)" if side == "output" else ""
            if value.kind in {"a map", "a sequence"}:
                hint = "export without it, for instance with skl2onnx's option zipmap=False" + (hint and f", or {hint}")
            raise _invalid(f"{where} is {value.kind}", value.name, "a tensor of numbers or bools", hint)
        given = self._shapes.get(value.name)
        if value.shape is None:
            if given is None:
                raise self._open(where, value, "?")
            return TensorColumn(value.name, value.dtype, given)
        if not value.shape:
            hint = "name the outputs to keep (`outputs=`, `--outputs`)" if side == "output" else ""
            raise _invalid(f"{where} is one number for the whole batch", value.name, "the row axis first", hint)
        self._check_row_axis(where, value)
        rest = value.shape[1:]
        self.symbols |= {dim for dim in rest if isinstance(dim, str)}
        if given is not None:
            if len(given) != len(rest) or any(isinstance(d, int) and d != g for d, g in zip(rest, given, strict=True)):
                raise _invalid(f"{where} cannot have row shape {list(given)}", value.name, _told(rest))
            return TensorColumn(value.name, value.dtype, given)
        known = [self._dims.get(dim) if isinstance(dim, str) else dim for dim in rest]
        shape = tuple(dim for dim in known if dim is not None)
        if len(shape) != len(known):
            raise self._open(where, value, _told(rest))
        return TensorColumn(value.name, value.dtype, shape)

    def _check_row_axis(self, where: str, value: OnnxValue) -> None:
        assert value.shape, "a value with a shape"
        rows = value.shape[0]
        if not isinstance(rows, int):
            return
        if self._batch_rows is None:
            self._batch_rows = rows
        if rows != self._batch_rows:
            raise _invalid(
                f"{where} begins with {rows} where another value begins with {self._batch_rows}",
                value.name,
                "the row axis first in every input and output",
                "export the model with a dynamic first dimension",
            )

    def _open(self, where: str, value: OnnxValue, told: str) -> FallowError:
        return _invalid(
            f"the model leaves the row shape of {where} open: {told}",
            value.name,
            "a shape without open dimensions",
            _how_to_say(value),
        )


def _how_to_say(value: OnnxValue) -> str:
    """How a user says the sizes that a model leaves open, in Python and on the command line."""
    rest = value.shape[1:] if value.shape else (None,)
    sizes = ",".join(str(dim) if isinstance(dim, int) else "N" for dim in rest)
    shape = f'shapes={{"{value.name}": ({sizes},)}} (`--shape {value.name}={sizes}`)'
    symbols = list(dict.fromkeys(dim for dim in rest if isinstance(dim, str)))
    if not symbols or None in rest:
        return f"say it: {shape}"
    dims = ", ".join(f'"{symbol}": N' for symbol in symbols)
    options = " ".join(f"--dim {symbol}=N" for symbol in symbols)
    return f"say it: dims={{{dims}}} (`{options}`), or {shape}"


def _program(path: Path, signature: OnnxSignature) -> FileSource:
    """What travels as the program: the file, or its bytes with the weights that lie beside it taken in."""
    return with_weights_inside(path) if signature.external_data else path


def _chosen_outputs(signature: OnnxSignature, outputs: Sequence[str]) -> list[OnnxValue]:
    if not outputs:
        return list(signature.outputs)
    by_name = {value.name: value for value in signature.outputs}
    for name in outputs:
        if name not in by_name:
            raise _invalid(f"the model has no output {name!r}", "outputs", ", ".join(by_name))
    return [by_name[name] for name in outputs]


def _check_output_names(results: Sequence[TensorColumn], inputs: Sequence[TensorColumn]) -> None:
    """Raises BUNDLE_INVALID for names that would mean two things in the chain or in a result."""
    hint = "rename it in the model, or leave it out: name the outputs to keep (`outputs=`, `--outputs`)"
    given = {column.name for column in inputs}
    for column in results:
        if column.name in given:
            raise _invalid(f"output {column.name!r} has the name of an input", column.name, "a name of its own", hint)
        if column.name.startswith(RESERVED_PREFIX):
            raise _invalid(
                f"output {column.name!r} begins with {RESERVED_PREFIX!r}, as the columns do that results add",
                column.name,
                "another name",
                hint,
            )


def _check_codec(codec: BytesCodec) -> None:
    for side, window, tokens in (
        ("head", codec.head_window_bytes, codec.head_tokens),
        ("tail", codec.tail_window_bytes, codec.tail_tokens),
    ):
        if tokens < 0 or window < tokens:
            raise _invalid(
                f"{tokens} {side} tokens from a window of {window} bytes",
                f"{side}_window",
                f"at least as many bytes as {side} tokens",
            )
    if codec.head_tokens + codec.tail_tokens < 1:
        raise _invalid("no tokens at all", "head_tokens", "at least 1 token")


def _labels(labels: Sequence[str] | str | Path) -> list[str]:
    if isinstance(labels, str | Path):
        try:
            names = Path(labels).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise _invalid(
                f"cannot read the labels file {labels}: {error}", "labels", "UTF-8, one label a line"
            ) from None
    else:
        names = list(labels)
    for place, name in enumerate(names):
        if not name or name.splitlines() != [name]:
            raise _invalid(f"label {place} is {name!r}", "labels", "one line of text each, none empty")
    return names


def _bundle(
    path: Path,
    about: About,
    stages: tuple[Stage, ...],
    input_schema: Schema,
    output_schema: Schema,
    *,
    files: Mapping[str, FileSource],
) -> Bundle:
    manifest = BundleManifest(
        name=about.get("name") or path.stem,
        files=tuple(bundle_file(name, source) for name, source in files.items()),
        stages=stages,
        input_schema=input_schema,
        output_schema=output_schema,
        precision=about.get("precision", Precision.FP32),
        title=about.get("title", ""),
        publisher=about.get("publisher", ""),
        purpose=about.get("purpose", ""),
        url=about.get("url", ""),
        licence=about.get("licence", ""),
    )
    return Bundle(manifest, files)


def _names(signature: OnnxSignature) -> str:
    inputs = ", ".join(value.name for value in signature.inputs)
    return f"inputs {inputs}; outputs {', '.join(value.name for value in signature.outputs)}"


def _told(shape: Sequence[int | str | None]) -> str:
    return f"[{', '.join('?' if dim is None else str(dim) for dim in shape)}]"


def _invalid(message: str, field: str, limit: str, hint: str = "") -> FallowError:
    return FallowError(Reason.BUNDLE_INVALID, message, field=field, limit=limit, hint=hint)
