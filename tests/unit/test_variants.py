"""Variants of bundles: made here, measured against the fp32 form, kept beside it, bound by digest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto

from engine_models import LABELS_FILE, PROGRAM_FILE, dense_model, gather_model, text_bundle
from fallow.bundle import Agreement, BundleVariant, Precision, VariantForm
from fallow.bundle_file import Bundle
from fallow.cli.root import fallow
from fallow.errors import FallowError, Reason
from fallow.ids import Digest
from fallow.wire.bundle import decode_manifest, encode_manifest

FEATURES = 32
FORMS = list(VariantForm)
AGREEMENT = Agreement(128, "synthetic", 0.25, 3.0, 128, 127)
ENTRY = BundleVariant(VariantForm.FP16, Digest(bytes(32)), Precision.FP16, AGREEMENT)


def dense_bundle(folder: Path) -> Bundle:
    path = folder / "dense.onnx"
    path.write_bytes(dense_model(features=FEATURES, hidden=64, outputs=5))
    return Bundle.from_onnx(path)


def samples() -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.random.default_rng(5).standard_normal((300, FEATURES), dtype=np.float32)


def test_every_form_is_made_measured_and_bound(tmp_path: Path) -> None:
    plain = dense_bundle(tmp_path)
    bundle = plain.optimized(*FORMS, samples={"x": samples()}, fixed_rows=4)
    assert [variant.form for variant in bundle.manifest.variants] == FORMS
    assert bundle.digest != plain.digest
    assert replace(bundle.manifest, variants=()) == plain.manifest
    assert len({variant.digest for variant in bundle.variants.values()}) == len(FORMS)
    for entry in bundle.manifest.variants:
        variant = bundle.variants[entry.form]
        assert variant.digest == entry.bundle_digest
        assert variant.manifest.precision is entry.precision
        assert (variant.manifest.input_schema, variant.manifest.output_schema) == (
            plain.manifest.input_schema,
            plain.manifest.output_schema,
        )
        found = entry.agreement
        assert (found.rows, found.samples, found.labelled_rows) == (300, "given", 300)
        assert 0 <= found.error_max < 0.5 * found.value_max
        assert found.labels_agreeing >= 270
    exact = next(entry for entry in bundle.manifest.variants if entry.form is VariantForm.FIXED)
    assert exact.agreement.error_max < 1e-4
    assert exact.precision is Precision.FP32


def test_forms_are_what_they_say(tmp_path: Path) -> None:
    bundle = dense_bundle(tmp_path).optimized("fp16", "int8", "int8-fixed", fixed_rows=4)

    def parsed(form: str) -> onnx.ModelProto:
        source = bundle.variants[VariantForm(form)].files["model.onnx"]
        assert isinstance(source, bytes)
        return onnx.load_from_string(source)

    half = {tensor.data_type for tensor in parsed("fp16").graph.initializer}
    assert half == {TensorProto.FLOAT16}
    operators = {node.op_type for node in parsed("int8").graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= operators and "DynamicQuantizeLinear" not in operators
    weights = [
        onnx.numpy_helper.to_array(t) for t in parsed("int8").graph.initializer if t.data_type == TensorProto.INT8
    ]
    assert weights and all(np.abs(values.astype(int)).max() <= 64 for values in weights), "7 bits"
    shapes = [value.type.tensor_type.shape.dim[0].dim_value for value in parsed("int8-fixed").graph.input]
    assert shapes == [4]


def test_a_bundle_with_variants_goes_to_disk_and_comes_back(tmp_path: Path) -> None:
    bundle = dense_bundle(tmp_path).optimized("fp16", "int8")
    folder = bundle.save(tmp_path / "dense.bundle")
    loaded = Bundle.load(folder)
    assert loaded.digest == bundle.digest
    assert loaded.manifest == bundle.manifest
    assert {form: variant.digest for form, variant in loaded.variants.items()} == {
        form: variant.digest for form, variant in bundle.variants.items()
    }
    other = dense_bundle(tmp_path).optimized("fixed")
    (folder / "variants" / "fp16" / "manifest.pb").write_bytes(other.variants[VariantForm.FIXED].manifest_bytes)
    (folder / "variants" / "fp16" / "model.onnx").write_bytes(
        bytes(other.variants[VariantForm.FIXED].files["model.onnx"])
    )
    with pytest.raises(FallowError) as caught:
        Bundle.load(folder)
    assert caught.value.reason is Reason.BUNDLE_INVALID
    assert "variant" in caught.value.message


def test_bytes_models_are_measured_on_their_tokens(tmp_path: Path) -> None:
    manifest, files = text_bundle()
    bundle = Bundle(manifest, dict(files)).optimized("fixed", "fp16", samples=[b"a text", b"another one"] * 8)
    found = bundle.manifest.variants[0].agreement
    assert (found.rows, found.samples, found.labels_agreeing) == (16, "given", 16)
    made = Bundle(manifest, dict(files)).optimized("fixed")
    assert made.manifest.variants[0].agreement.samples == "synthetic"
    assert set(made.variants[VariantForm.FIXED].files) == {PROGRAM_FILE, LABELS_FILE}


def test_what_cannot_be_made_is_said_with_the_form(tmp_path: Path) -> None:
    path = tmp_path / "picky.onnx"
    path.write_bytes(gather_model())
    picky = Bundle.from_onnx(path)
    with pytest.raises(FallowError, match="does not run on the sample rows") as caught:
        picky.optimized("fixed", samples={"x": np.full((3, 1), 77, np.int64)})
    assert caught.value.reason is Reason.BUNDLE_INVALID
    assert picky.optimized("fixed").manifest.variants[0].agreement.error_max == 0.0
    with pytest.raises(FallowError, match="there is no form 'fp8'"):
        dense_bundle(tmp_path).optimized("fp8")
    with pytest.raises(FallowError, match="no form is asked for"):
        dense_bundle(tmp_path).optimized()
    with pytest.raises(FallowError, match="a fixed shape of 0 rows"):
        dense_bundle(tmp_path).optimized("fixed", fixed_rows=0)
    fixed = dense_bundle(tmp_path).optimized("int8").variants[VariantForm.INT8]
    with pytest.raises(FallowError, match="made from the fp32 form"):
        fixed.optimized("fp16")


@pytest.mark.parametrize(
    "entry",
    [
        replace(ENTRY, agreement=replace(AGREEMENT, labels_agreeing=129)),
        replace(ENTRY, agreement=replace(AGREEMENT, labelled_rows=129, labels_agreeing=129)),
        replace(ENTRY, agreement=replace(AGREEMENT, samples="believed")),
        replace(ENTRY, agreement=replace(AGREEMENT, error_max=float("nan"))),
    ],
)
def test_an_agreement_that_cannot_be_is_refused(entry: BundleVariant, tmp_path: Path) -> None:
    manifest = dense_bundle(tmp_path).manifest
    assert decode_manifest(encode_manifest(replace(manifest, variants=(ENTRY,)))).variants == (ENTRY,)
    for variants in ((entry,), (ENTRY, ENTRY)):
        with pytest.raises(FallowError) as caught:
            decode_manifest(encode_manifest(replace(manifest, variants=variants)))
        assert caught.value.reason is Reason.BUNDLE_INVALID


def test_the_command_makes_them_and_tells_how_they_agree(tmp_path: Path) -> None:
    (tmp_path / "dense.onnx").write_bytes(dense_model(features=FEATURES, outputs=5))
    np.save(tmp_path / "rows.npy", samples())
    target = tmp_path / "out.bundle"
    arguments = ["bundle", "optimize", str(tmp_path / "dense.onnx"), "--fp16", "--int8", "--fixed-shape"]
    result = CliRunner().invoke(fallow, [*arguments, "--samples", str(tmp_path / "rows.npy"), "-o", str(target)])
    assert result.exit_code == 0, result.output
    for form in FORMS:
        assert f"variant   {form.value}" in result.output
    assert "of 300 (300 given rows)" in result.output
    assert len(Bundle.load(target).variants) == len(FORMS)
    result = CliRunner().invoke(fallow, ["bundle", "optimize", str(tmp_path / "dense.onnx")])
    assert result.exit_code == 2
    assert "--fp16" in result.output
