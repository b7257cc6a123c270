"""`fallow bundle …`: create and inspect."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import click

from fallow.bundle import BundleVariant, BytesCodec, ProgramStage, SoftmaxHead, Stage, TopKHead, VariantForm
from fallow.bundle_file import BUNDLE_SUFFIX, About, Bundle
from fallow.cli.options import bundle_of, json_option, login_option, model_options, run
from fallow.cli.output import Output, plain
from fallow.client.client import BundleState, connect_async
from fallow.errors import FallowError
from fallow.row_values import described


@click.group("bundle")
def bundle_group() -> None:
    """Make bundles and look into them."""


@bundle_group.command("create")
@click.argument("model")
@click.option(
    "-o", "--output", "folder", type=click.Path(path_type=Path), help="Folder to make. [default: NAME.bundle]"
)
@model_options
@click.option("--name", help="Short name. [default: the file's]")
@click.option("--title", help="What people call it.")
@click.option("--publisher", help="Whose model it is.")
@click.option("--purpose", help="What it is for.")
@click.option("--url", help="Where to read about it.")
@click.option("--licence", help="Under which licence.")
@click.option("--labels", type=click.Path(path_type=Path), help="For a model of bytes: file of labels, one a line.")
@click.option("--head-window", type=int, help="For a model of bytes: bytes at the head of each row that travel.")
@click.option("--tail-window", type=int, help="For a model of bytes: bytes at the tail of each row that travel.")
@click.option("--head-tokens", type=int, help="For a model of bytes: tokens made of the head window.")
@click.option("--tail-tokens", type=int, help="For a model of bytes: tokens made of the tail window.")
@click.option("--padding-token", type=int, default=256, show_default=True, help="For a model of bytes.")
@click.option(
    "--top-k", type=click.IntRange(min=1), default=1, show_default=True, help="For a model of bytes: labels a row."
)
@json_option
def create_command(model: str, folder: Path | None, as_json: bool, **given: Any) -> None:
    """Make a bundle of MODEL: an ONNX file, or `magika`.

    With --labels the model is one of bytes: the head and tail windows of each row become its tokens.
    """
    output = Output(as_json=as_json)
    about = _about(given)
    try:
        bundle = (
            _bytes_bundle(model, about, given) if given["labels"] is not None else _plain_bundle(model, about, given)
        )
        target = bundle.save(folder or Path(f"{bundle.manifest.name}{BUNDLE_SUFFIX}"))
    except FallowError as error:
        output.failed(error)
    output.result({"path": target, **_facts(bundle)}, f"{target}\n{_description(bundle)}")


@bundle_group.command("optimize")
@click.argument("model")
@model_options
@click.option("--fp16", is_flag=True, help="A form with weights and arithmetic in fp16.")
@click.option("--int8", is_flag=True, help="A static int8 form, calibrated on the samples.")
@click.option(
    "--fixed-shape",
    is_flag=True,
    help="Forms that always take --rows rows at once, as NPUs want it: of fp32 and the others.",
)
@click.option("--rows", type=click.IntRange(min=1), default=1, show_default=True, help="Rows of a fixed shape.")
@click.option(
    "--samples", help="Rows to calibrate and to measure on, as INPUT of `fallow map`. [default: made from the schema]"
)
@click.option(
    "-o", "--output", "folder", type=click.Path(path_type=Path), help="Folder to make. [default: NAME.bundle]"
)
@json_option
def optimize_command(
    model: str,
    fp16: bool,
    int8: bool,
    fixed_shape: bool,
    rows: int,
    samples: str | None,
    folder: Path | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Make a bundle of MODEL with other forms of its program, measured against the fp32 form on this machine.

    Nobody computes with them unless a submitter accepts it: `fallow map --accept fp16,int8`.
    """
    output = Output(as_json=as_json)
    forms = [*([VariantForm.FP16] if fp16 else []), *([VariantForm.INT8] if int8 else [])]
    if fixed_shape:
        forms += [VariantForm.FIXED, *(VariantForm(f"{form.value}-fixed") for form in forms)]
    if not forms:
        raise click.UsageError("say which forms: --fp16, --int8, --fixed-shape")
    try:
        bundle = _plain_bundle(model, {}, given).optimized(*forms, samples=samples, fixed_rows=rows)
        target = bundle.save(folder or Path(f"{bundle.manifest.name}{BUNDLE_SUFFIX}"))
    except FallowError as error:
        output.failed(error)
    output.result({"path": target, **_facts(bundle)}, f"{target}\n{_description(bundle)}")


@bundle_group.command("inspect")
@click.argument("model")
@model_options
@click.option("--register", is_flag=True, help="Have the operator inspect it, and wait for the report.")
@login_option
@json_option
def inspect_command(model: str, register: bool, login: Path | None, as_json: bool, **given: Any) -> None:
    """Show what a bundle folder or MODEL takes, does and gives; with --register, what inspection finds."""
    output = Output(as_json=as_json)

    async def work() -> None:
        bundle = _plain_bundle(model, {}, given)
        facts, text = _facts(bundle), _description(bundle)
        if register:
            async with await connect_async(login) as client:
                state = await client.inspected(bundle)
            facts["inspection"] = state
            text += f"\n{_inspection(state)}"
        output.result(facts, text)

    run(output, work())


def _about(given: dict[str, Any]) -> About:
    names = ("name", "title", "publisher", "purpose", "url", "licence")
    return cast(About, {name: str(given[name]) for name in names if given[name]})


def _plain_bundle(model: str, about: About, given: dict[str, Any]) -> Bundle:
    return bundle_of(
        model,
        outputs=given["outputs"],
        shapes=given["shapes"],
        dims=given["dims"],
        precision=given["precision"],
        about=about,
    )


def _bytes_bundle(model: str, about: About, given: dict[str, Any]) -> Bundle:
    needed = ("head_window", "tail_window", "head_tokens", "tail_tokens")
    missing = [f"--{name.replace('_', '-')}" for name in needed if given[name] is None]
    if missing:
        raise click.UsageError(f"a model of bytes needs {', '.join(missing)}")
    return Bundle.from_bytes_model(
        model,
        head_window=given["head_window"],
        tail_window=given["tail_window"],
        head_tokens=given["head_tokens"],
        tail_tokens=given["tail_tokens"],
        padding_token=given["padding_token"],
        labels=given["labels"],
        top_k=given["top_k"],
        **about,
    )


def _facts(bundle: Bundle) -> dict[str, Any]:
    manifest = bundle.manifest
    return {
        "digest": bundle.digest,
        "name": manifest.name,
        "title": manifest.title,
        "publisher": manifest.publisher,
        "licence": manifest.licence,
        "precision": manifest.precision,
        "files": manifest.files,
        "stages": [{"kind": type(stage).__name__, **plain(stage)} for stage in manifest.stages],
        "inputs": {column.name: described(column) for column in manifest.input_schema.columns},
        "outputs": {column.name: described(column) for column in manifest.output_schema.columns},
        "variants": manifest.variants,
    }


def _description(bundle: Bundle) -> str:
    manifest = bundle.manifest
    lines = [f"bundle    {manifest.name}" + (f" ({manifest.title})" if manifest.title else "")]
    lines.append(f"digest    {bundle.digest.hex()}")
    lines += [f"takes     {column.name}: {described(column)}" for column in manifest.input_schema.columns]
    lines += [f"does      {_stage_text(stage)}" for stage in manifest.stages]
    lines += [f"gives     {column.name}: {described(column)}" for column in manifest.output_schema.columns]
    lines += [f"file      {file.name}: {file.length_bytes:,} bytes" for file in manifest.files]
    lines.append(f"precision {manifest.precision.value}")
    lines += [f"variant   {_variant_text(bundle, variant)}" for variant in manifest.variants]
    return "\n".join(lines)


def _variant_text(bundle: Bundle, variant: BundleVariant) -> str:
    found = variant.agreement
    size = sum(file.length_bytes for file in bundle.variants[variant.form].manifest.files)
    labels = ""
    if found.labelled_rows:
        labels = f", best label the same for {found.labels_agreeing} of {found.labelled_rows}"
    return (
        f"{variant.form.value:<10} {size:>12,} bytes, off by at most {found.error_max:.3g} of {found.value_max:.3g}"
        f"{labels} ({found.rows} {found.samples} rows)"
    )


def _stage_text(stage: Stage) -> str:
    match stage:
        case BytesCodec():
            return (
                f"bytes: {stage.head_tokens} + {stage.tail_tokens} tokens from windows of "
                f"{stage.head_window_bytes} + {stage.tail_window_bytes} bytes"
            )
        case ProgramStage():
            return f"{stage.format.value} program {stage.file}"
        case SoftmaxHead():
            return f"softmax of {stage.value}"
        case TopKHead():
            return f"the best {stage.k} of the labels in {stage.labels_file}"


def _inspection(state: BundleState) -> str:
    lines = [f"inspection {state.state}" + (f": {state.reason}" if state.reason else "")]
    report = state.report
    if report is not None:
        lines += [f"  refused: {refusal}" for refusal in report.refusals]
        lines.append(f"  batch of {report.canonical_batch_rows} rows, {report.unit_micros_per_row} unit-micros a row")
        lines.append(f"  operators: {', '.join(f'{name} x {count}' for name, count in report.operators)}")
    return "\n".join(lines)
