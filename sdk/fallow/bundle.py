"""A bundle: a chain of declared stages from a closed list, their files, one manifest, one digest."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from fallow.cost import CostCurve
from fallow.ids import Digest
from fallow.schema import Schema

RESERVED_PREFIX: Final = "fallow."
"""Begins the names of columns that a result adds by itself; no output is called so."""


class Precision(StrEnum):
    """What the submitter promises to accept; providers are configured to it."""

    FP32 = "fp32"
    TF32 = "tf32"
    FP16 = "fp16"
    INT8 = "int8"


class VariantForm(StrEnum):
    """A form of a bundle's program beside its fp32 form."""

    FP16 = "fp16"
    """Weights and arithmetic in fp16."""
    INT8 = "int8"
    """Static int8: scales fixed by calibration, 7-bit weights."""
    FIXED = "fixed"
    """fp32 that always takes the same number of rows, as NPUs want it."""
    FP16_FIXED = "fp16-fixed"
    INT8_FIXED = "int8-fixed"


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far a variant's answers lie from the fp32 form's, measured where it was made; its maker's word."""

    rows: int
    samples: str
    """`given` or `synthetic`."""
    error_max: float
    """Largest absolute difference of any output value."""
    value_max: float
    """Largest absolute output value of the fp32 form, to compare with."""
    labelled_rows: int
    """Rows with a score for each of several labels; 0: the program gives none."""
    labels_agreeing: int
    """Those of them whose best label is the same one."""


@dataclass(frozen=True, slots=True)
class BundleVariant:
    """Another form of a bundle: a bundle of its own, chosen only with the submitter's consent."""

    form: VariantForm
    bundle_digest: Digest
    precision: Precision
    agreement: Agreement


class ProgramFormat(StrEnum):
    """Data-only program formats."""

    ONNX = "onnx"
    STABLEHLO = "stablehlo"
    GGUF = "gguf"


@dataclass(frozen=True, slots=True)
class BundleFile:
    """One file of a bundle, bound by digest."""

    name: str
    """A plain name without path separators, unique in the bundle."""
    digest: Digest
    length_bytes: int


@dataclass(frozen=True, slots=True)
class BytesCodec:
    """The head and tail windows of a byte string as one row of integer tokens.

    The row's bytes column holds the whole content when it is no longer than `head_window_bytes + tail_window_bytes`,
    else the head window followed by the tail window: only these travel. From the head window (the first
    `head_window_bytes` of the content) leading ASCII whitespace is removed when `strip_whitespace`, then the first
    `head_tokens` bytes are taken and padded on the right with `padding_token`; from the tail window trailing
    whitespace is removed, then the last `tail_tokens` bytes are taken and padded on the left. Output: head ‖ tail,
    int32, shape (head_tokens + tail_tokens,).
    """

    column: str
    output: str
    head_window_bytes: int
    tail_window_bytes: int
    head_tokens: int
    tail_tokens: int
    padding_token: int
    strip_whitespace: bool


@dataclass(frozen=True, slots=True)
class Binding:
    """Which value of the chain a program's input or output is."""

    tensor: str
    """The name inside the program."""
    value: str
    """The name in the chain: an input column or an earlier stage's output."""


@dataclass(frozen=True, slots=True)
class ProgramStage:
    """A program run on batches of rows: every bound tensor has the row axis first."""

    format: ProgramFormat
    file: str
    inputs: tuple[Binding, ...]
    outputs: tuple[Binding, ...]


@dataclass(frozen=True, slots=True)
class SoftmaxHead:
    """Softmax over the last axis of `value`, computed in float32 with the maximum subtracted."""

    value: str
    output: str


@dataclass(frozen=True, slots=True)
class TopKHead:
    """The k largest entries of the last axis, ties broken by the lower index, with their labels.

    Gives string columns `output` (k = 1) or `output_0` … and float32 columns `<column>_score`. The labels file holds
    one UTF-8 label a line. A row whose content is no longer than `short_bytes_max` gets `short_label` and score 1
    instead, when `short_label` is not empty: some models declare a least size below which they are not asked.
    """

    value: str
    output: str
    k: int
    labels_file: str
    short_label: str = ""
    short_bytes_max: int = 0


Stage = BytesCodec | ProgramStage | SoftmaxHead | TopKHead


@dataclass(frozen=True, slots=True)
class BundleManifest:
    """What a bundle is. Its digest is the SHA-256 of its deterministic protobuf bytes as stored."""

    name: str
    files: tuple[BundleFile, ...]
    stages: tuple[Stage, ...]
    input_schema: Schema
    output_schema: Schema
    precision: Precision = Precision.FP32
    title: str = ""
    publisher: str = ""
    purpose: str = ""
    url: str = ""
    licence: str = ""
    variants: tuple[BundleVariant, ...] = ()
    """Other forms of the same program, each once."""


@dataclass(frozen=True, slots=True)
class InspectionReport:
    """What an operator worker found when it took a bundle apart and ran it, in a sandboxed child."""

    bundle_digest: Digest
    accepted: bool
    refusals: tuple[str, ...]
    """Why not, one sentence each, naming node and limit; empty when accepted."""
    operators: tuple[tuple[str, int], ...]
    """Qualified operator name and how often it stands in the program."""
    canonical_batch_rows: int
    """b: the engine always runs exactly this many rows, zero-padded."""
    slot_dependent: bool
    """Bits of a row depend on its place in the batch."""
    neighbour_dependent: bool
    """Bits of a row depend on the other rows: b is then 1."""
    unit_micros_per_row: int
    """Cost of an empty row in micro-units (1 unit = one second of a 50 GFLOP/s core)."""
    unit_micros_per_kib: int
    """Further cost for each KiB of row bytes, in micro-units."""
    memory_bytes_peak: int
    """Largest resident size of the child while it ran the canonical batch."""
    execution_class: str
    """The class in which the tests ran."""
    inspected_seconds: float
    cost: CostCurve | None = None
    """Cost of a row by its size; None in reports from before there was one: the two numbers above tell then."""
    flops_per_row: int = 0
    """Multiplications and additions of one row in matrix products and convolutions, as the graph tells; 0: unknown."""
