"""Bundle manifests and inspection reports to protobuf and back."""

from __future__ import annotations

from math import isfinite

from google.protobuf.message import DecodeError

from fallow.bundle import (
    Agreement,
    Binding,
    BundleFile,
    BundleManifest,
    BundleVariant,
    BytesCodec,
    InspectionReport,
    ProgramStage,
    SoftmaxHead,
    Stage,
    TopKHead,
    VariantForm,
)
from fallow.cost import CostCurve, CostKnot
from fallow.errors import FallowError, Reason
from fallow.limits import (
    BUNDLE_FILES_MAX,
    BUNDLE_STAGES_MAX,
    BUNDLE_VARIANTS_MAX,
    MANIFEST_BYTES_MAX,
    PROGRAM_BYTES_MAX,
    REPORT_BYTES_MAX,
    TITLE_BYTES_MAX,
)
from fallow.v1 import bundle_pb2
from fallow.wire.blob import digest_from
from fallow.wire.enums import PRECISIONS, PROGRAM_FORMATS
from fallow.wire.schema import schema_from_message, schema_to_message

FILE_NAME_BYTES_MAX = 128


def manifest_to_message(manifest: BundleManifest) -> bundle_pb2.BundleManifest:
    """The protobuf form of a manifest."""
    return bundle_pb2.BundleManifest(
        name=manifest.name,
        files=[
            bundle_pb2.BundleFile(name=file.name, digest=file.digest, length_bytes=file.length_bytes)
            for file in manifest.files
        ],
        stages=[_stage_to_message(stage) for stage in manifest.stages],
        input_schema=schema_to_message(manifest.input_schema),
        output_schema=schema_to_message(manifest.output_schema),
        precision=PRECISIONS.number(manifest.precision),
        title=manifest.title,
        publisher=manifest.publisher,
        purpose=manifest.purpose,
        url=manifest.url,
        licence=manifest.licence,
        variants=[_variant_to_message(variant) for variant in manifest.variants],
    )


def _variant_to_message(variant: BundleVariant) -> bundle_pb2.BundleVariant:
    agreement = variant.agreement
    return bundle_pb2.BundleVariant(
        form=variant.form.value,
        bundle_digest=variant.bundle_digest,
        precision=PRECISIONS.number(variant.precision),
        agreement=bundle_pb2.Agreement(
            rows=agreement.rows,
            samples=agreement.samples,
            error_max=agreement.error_max,
            value_max=agreement.value_max,
            labelled_rows=agreement.labelled_rows,
            labels_agreeing=agreement.labels_agreeing,
        ),
    )


def _variants_from_message(message: bundle_pb2.BundleManifest) -> tuple[BundleVariant, ...]:
    if len(message.variants) > BUNDLE_VARIANTS_MAX:
        raise _invalid(f"{len(message.variants)} variants", "variants", f"up to {BUNDLE_VARIANTS_MAX}")
    variants: list[BundleVariant] = []
    for index, entry in enumerate(message.variants):
        field = f"variants[{index}]"
        forms = {form.value: form for form in VariantForm}
        if entry.form not in forms or any(known.form.value == entry.form for known in variants):
            raise _invalid(
                f"the form {entry.form[:40]!r} is unknown or stands twice", f"{field}.form", ", ".join(forms)
            )
        agreement = entry.agreement
        if agreement.samples not in {"given", "synthetic"} or not (
            agreement.labels_agreeing <= agreement.labelled_rows <= agreement.rows
            and isfinite(agreement.error_max)
            and isfinite(agreement.value_max)
        ):
            raise _invalid("the measured agreement contradicts itself", f"{field}.agreement")
        variants.append(
            BundleVariant(
                form=forms[entry.form],
                bundle_digest=digest_from(entry.bundle_digest, f"{field}.bundle_digest"),
                precision=PRECISIONS.member(entry.precision, f"{field}.precision"),
                agreement=Agreement(
                    rows=agreement.rows,
                    samples=agreement.samples,
                    error_max=agreement.error_max,
                    value_max=agreement.value_max,
                    labelled_rows=agreement.labelled_rows,
                    labels_agreeing=agreement.labels_agreeing,
                ),
            )
        )
    return tuple(variants)


def encode_manifest(manifest: BundleManifest) -> bytes:
    """The deterministic bytes that are stored; the bundle's digest is their SHA-256."""
    return manifest_to_message(manifest).SerializeToString(deterministic=True)


def decode_manifest(data: bytes) -> BundleManifest:
    """The manifest of stored bytes. Raises BUNDLE_INVALID naming the field, or LIMIT_EXCEEDED."""
    if len(data) > MANIFEST_BYTES_MAX:
        raise FallowError(
            Reason.LIMIT_EXCEEDED,
            f"a manifest of {len(data)} bytes",
            field="manifest",
            limit=f"{MANIFEST_BYTES_MAX} bytes",
            hint="put long lists such as labels into a file of the bundle",
        )
    try:
        message = bundle_pb2.BundleManifest.FromString(data)
    except DecodeError:
        raise _invalid("these bytes are no manifest", "manifest") from None
    if not 1 <= len(message.stages) <= BUNDLE_STAGES_MAX or len(message.files) > BUNDLE_FILES_MAX:
        raise _invalid(
            f"{len(message.stages)} stages and {len(message.files)} files",
            "manifest",
            f"1 to {BUNDLE_STAGES_MAX} stages, up to {BUNDLE_FILES_MAX} files",
        )
    texts = (message.name, message.title, message.publisher, message.purpose, message.url, message.licence)
    if not message.name or any(len(text.encode()) > TITLE_BYTES_MAX for text in texts):
        raise _invalid("the name is empty or a text too long", "manifest.name", f"1 to {TITLE_BYTES_MAX} bytes each")
    try:
        return BundleManifest(
            name=message.name,
            files=_files_from_message(message),
            stages=tuple(_stage_from_message(stage, f"stages[{i}]") for i, stage in enumerate(message.stages)),
            input_schema=schema_from_message(message.input_schema),
            output_schema=schema_from_message(message.output_schema),
            precision=PRECISIONS.member(message.precision, "precision"),
            title=message.title,
            publisher=message.publisher,
            purpose=message.purpose,
            url=message.url,
            licence=message.licence,
            variants=_variants_from_message(message),
        )
    except FallowError as error:
        raise FallowError(
            Reason.BUNDLE_INVALID,
            error.message,
            field=f"manifest.{error.field}",
            limit=error.limit,
            hint=error.hint,
        ) from None


def curve_to_message(curve: CostCurve) -> bundle_pb2.CostCurve:
    """The protobuf form of a cost curve."""
    return bundle_pb2.CostCurve(
        feature_number=curve.feature_number,
        knots=[bundle_pb2.CostKnot(size=knot.size, unit_nanos=knot.unit_nanos) for knot in curve.knots],
        spread_permille=curve.spread_permille,
        note=curve.note,
    )


def curve_from_message(message: bundle_pb2.CostCurve) -> CostCurve:
    """The cost curve that a message describes."""
    return CostCurve(
        feature_number=message.feature_number,
        knots=tuple([CostKnot(knot.size, knot.unit_nanos) for knot in message.knots]),
        spread_permille=message.spread_permille,
        note=message.note,
    )


def report_to_message(report: InspectionReport) -> bundle_pb2.InspectionReport:
    """The protobuf form of a report."""
    return bundle_pb2.InspectionReport(
        bundle_digest=report.bundle_digest,
        accepted=report.accepted,
        refusals=report.refusals,
        operators=[bundle_pb2.OperatorCount(operator=name, count=count) for name, count in report.operators],
        canonical_batch_rows=report.canonical_batch_rows,
        slot_dependent=report.slot_dependent,
        neighbour_dependent=report.neighbour_dependent,
        unit_micros_per_row=report.unit_micros_per_row,
        unit_micros_per_kib=report.unit_micros_per_kib,
        memory_bytes_peak=report.memory_bytes_peak,
        execution_class=report.execution_class,
        inspected_seconds=report.inspected_seconds,
        cost=curve_to_message(report.cost) if report.cost is not None else None,
        flops_per_row=report.flops_per_row,
    )


def report_from_message(message: bundle_pb2.InspectionReport) -> InspectionReport:
    """The report a message describes. Raises FIELD_INVALID or LIMIT_EXCEEDED."""
    if message.ByteSize() > REPORT_BYTES_MAX:
        raise FallowError(
            Reason.LIMIT_EXCEEDED,
            f"a report of {message.ByteSize()} bytes",
            field="report",
            limit=f"{REPORT_BYTES_MAX} bytes",
        )
    return InspectionReport(
        bundle_digest=digest_from(message.bundle_digest, "report.bundle_digest"),
        accepted=message.accepted,
        refusals=tuple(message.refusals),
        operators=tuple((entry.operator, entry.count) for entry in message.operators),
        canonical_batch_rows=message.canonical_batch_rows,
        slot_dependent=message.slot_dependent,
        neighbour_dependent=message.neighbour_dependent,
        unit_micros_per_row=message.unit_micros_per_row,
        unit_micros_per_kib=message.unit_micros_per_kib,
        memory_bytes_peak=message.memory_bytes_peak,
        execution_class=message.execution_class,
        inspected_seconds=message.inspected_seconds,
        cost=curve_from_message(message.cost) if message.HasField("cost") else None,
        flops_per_row=message.flops_per_row,
    )


def _files_from_message(message: bundle_pb2.BundleManifest) -> tuple[BundleFile, ...]:
    files: list[BundleFile] = []
    seen: set[str] = set()
    for index, file in enumerate(message.files):
        field = f"files[{index}]"
        plain = (
            file.name not in (".", "..") and "/" not in file.name and "\\" not in file.name and "\0" not in file.name
        )
        if not plain or not 1 <= len(file.name.encode()) <= FILE_NAME_BYTES_MAX or file.name in seen:
            raise _invalid(
                f"file name {file.name!r}",
                f"{field}.name",
                f"a plain name of 1 to {FILE_NAME_BYTES_MAX} bytes, without path separators, each once",
            )
        if not 1 <= file.length_bytes <= PROGRAM_BYTES_MAX:
            raise _invalid(
                f"{file.name} has {file.length_bytes} bytes", f"{field}.length_bytes", f"1 to {PROGRAM_BYTES_MAX} bytes"
            )
        seen.add(file.name)
        files.append(BundleFile(file.name, digest_from(file.digest, f"{field}.digest"), file.length_bytes))
    return tuple(files)


def _stage_to_message(stage: Stage) -> bundle_pb2.Stage:
    match stage:
        case BytesCodec():
            return bundle_pb2.Stage(
                bytes_codec=bundle_pb2.BytesCodec(
                    column=stage.column,
                    output=stage.output,
                    head_window_bytes=stage.head_window_bytes,
                    tail_window_bytes=stage.tail_window_bytes,
                    head_tokens=stage.head_tokens,
                    tail_tokens=stage.tail_tokens,
                    padding_token=stage.padding_token,
                    strip_whitespace=stage.strip_whitespace,
                )
            )
        case ProgramStage():
            return bundle_pb2.Stage(
                program=bundle_pb2.ProgramStage(
                    format=PROGRAM_FORMATS.number(stage.format),
                    file=stage.file,
                    inputs=[bundle_pb2.Binding(tensor=b.tensor, value=b.value) for b in stage.inputs],
                    outputs=[bundle_pb2.Binding(tensor=b.tensor, value=b.value) for b in stage.outputs],
                )
            )
        case SoftmaxHead():
            return bundle_pb2.Stage(softmax=bundle_pb2.SoftmaxHead(value=stage.value, output=stage.output))
        case TopKHead():
            return bundle_pb2.Stage(
                top_k=bundle_pb2.TopKHead(
                    value=stage.value,
                    output=stage.output,
                    k=stage.k,
                    labels_file=stage.labels_file,
                    short_label=stage.short_label,
                    short_bytes_max=stage.short_bytes_max,
                )
            )


def _stage_from_message(message: bundle_pb2.Stage, field: str) -> Stage:
    match message.WhichOneof("kind"):
        case "bytes_codec":
            codec = message.bytes_codec
            return BytesCodec(
                column=codec.column,
                output=codec.output,
                head_window_bytes=codec.head_window_bytes,
                tail_window_bytes=codec.tail_window_bytes,
                head_tokens=codec.head_tokens,
                tail_tokens=codec.tail_tokens,
                padding_token=codec.padding_token,
                strip_whitespace=codec.strip_whitespace,
            )
        case "program":
            program = message.program
            return ProgramStage(
                format=PROGRAM_FORMATS.member(program.format, f"{field}.format"),
                file=program.file,
                inputs=tuple(Binding(b.tensor, b.value) for b in program.inputs),
                outputs=tuple(Binding(b.tensor, b.value) for b in program.outputs),
            )
        case "softmax":
            return SoftmaxHead(message.softmax.value, message.softmax.output)
        case "top_k":
            head = message.top_k
            return TopKHead(
                value=head.value,
                output=head.output,
                k=head.k,
                labels_file=head.labels_file,
                short_label=head.short_label,
                short_bytes_max=head.short_bytes_max,
            )
        case _:
            raise _invalid("a stage of a kind that is not known here", field, "bytes_codec, program, softmax, top_k")


def _invalid(message: str, field: str, limit: str = "") -> FallowError:
    return FallowError(Reason.BUNDLE_INVALID, message, field=field, limit=limit)
