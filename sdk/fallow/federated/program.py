"""A training step as data: StableHLO under a typed header. What it takes and gives, and what it may not be."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from fallow.errors import FallowError, Reason
from fallow.federated.updates import Layout, TensorSpec
from fallow.limits import KIB, MIB
from fallow.schema import TensorColumn

PLATFORMS: Final = ("cpu", "cuda", "rocm", "tpu")
"""Of XLA, for each of which an artifact is lowered."""
STABLEHLO_VERSION: Final = "1.9.0"
"""Artifacts are written for this version of the operation set: readable for five years from it on."""
ARTIFACT_BYTES_MAX: Final = 16 * MIB
HEADER_BYTES_MAX: Final = 256 * KIB
PROGRAM_BYTES_MAX: Final = 3 * ARTIFACT_BYTES_MAX + HEADER_BYTES_MAX
NAME_BYTES_MAX: Final = 256
TENSORS_MAX: Final = 4_096
COLUMNS_MAX: Final = 64
METRICS_MAX: Final = 64
BATCH_ROWS_MAX: Final = 65_536
RANK_MAX: Final = 8
PARAMETERS_MAX: Final = 1 << 30
LOSS: Final = "loss"
"""The metric that every program gives."""


@dataclass(frozen=True, slots=True)
class Hyperparameter:
    """A float32 number that a study may set anew each round, and its default."""

    name: str
    value: float


@dataclass(frozen=True, slots=True)
class TrainingProgram:
    """Steps as StableHLO portable artifacts; `protos/fallow/v1/training.proto` says in which order arguments stand."""

    columns: tuple[TensorColumn, ...]
    weights: tuple[TensorSpec, ...]
    state: tuple[TensorSpec, ...]
    hyperparameters: tuple[Hyperparameter, ...]
    metrics: tuple[str, ...]
    batch_rows: int
    train: bytes = field(repr=False)
    evaluate: bytes = field(repr=False)
    init: bytes = field(repr=False, default=b"")
    """Empty exactly when there is no state."""
    platforms: tuple[str, ...] = PLATFORMS
    stablehlo_version: str = STABLEHLO_VERSION

    def __post_init__(self) -> None:
        """Raises FIELD_INVALID or LIMIT_EXCEEDED naming what cannot be."""
        _check_tensors("weights", self.weights, dtype="float32")
        _check_tensors("state", self.state)
        _check_names("columns", [column.name for column in self.columns], COLUMNS_MAX)
        _check_names("hyperparameters", [each.name for each in self.hyperparameters], METRICS_MAX)
        _check_names("metrics", list(self.metrics), METRICS_MAX)
        if not self.weights or not self.columns:
            raise FallowError(Reason.FIELD_INVALID, "a program has weights and columns", field="weights, columns")
        if LOSS not in self.metrics:
            raise FallowError(Reason.FIELD_INVALID, f"a program gives the metric {LOSS!r}", field="metrics")
        if not 1 <= self.batch_rows <= BATCH_ROWS_MAX:
            raise FallowError(
                Reason.FIELD_INVALID,
                f"batch_rows is {self.batch_rows}",
                field="batch_rows",
                limit=f"1 to {BATCH_ROWS_MAX}",
            )
        if self.layout.parameters > PARAMETERS_MAX:
            raise FallowError(
                Reason.LIMIT_EXCEEDED,
                f"{self.layout.parameters} parameters",
                field="weights",
                limit=f"{PARAMETERS_MAX} parameters",
            )
        if bool(self.init) != bool(self.state):
            raise FallowError(Reason.FIELD_INVALID, "state and init go together", field="init")
        if not self.platforms or not set(self.platforms) <= set(PLATFORMS):
            raise FallowError(
                Reason.FIELD_INVALID,
                f"platforms are {list(self.platforms)}",
                field="platforms",
                limit=", ".join(PLATFORMS),
            )
        for name, artifact in (("train", self.train), ("evaluate", self.evaluate), ("init", self.init)):
            if len(artifact) > ARTIFACT_BYTES_MAX or (name != "init" and not artifact):
                raise FallowError(
                    Reason.LIMIT_EXCEEDED,
                    f"{name} has {len(artifact)} bytes",
                    field=name,
                    limit=f"1 to {ARTIFACT_BYTES_MAX} bytes",
                )

    @property
    def layout(self) -> Layout:
        """Where each weight stands in an update."""
        return Layout(self.weights)

    @property
    def artifact_bytes(self) -> int:
        """How much travels besides the header."""
        return len(self.train) + len(self.evaluate) + len(self.init)


def _check_tensors(field_name: str, tensors: tuple[TensorSpec, ...], dtype: str | None = None) -> None:
    _check_names(field_name, [tensor.name for tensor in tensors], TENSORS_MAX)
    for tensor in tensors:
        if len(tensor.shape) > RANK_MAX or any(size < 0 for size in tensor.shape):
            raise FallowError(
                Reason.FIELD_INVALID,
                f"{tensor.name!r} has the shape {list(tensor.shape)}",
                field=field_name,
                limit=f"up to {RANK_MAX} sizes, none negative",
            )
        if dtype is not None and tensor.dtype != dtype:
            raise FallowError(Reason.FIELD_INVALID, f"{tensor.name!r} is {tensor.dtype}", field=field_name, limit=dtype)


def _check_names(field_name: str, names: list[str], count_max: int) -> None:
    if len(names) > count_max:
        raise FallowError(Reason.LIMIT_EXCEEDED, f"{len(names)} {field_name}", field=field_name, limit=f"{count_max}")
    if names != sorted(set(names)):
        raise FallowError(
            Reason.FIELD_INVALID, f"{field_name} stand in the order of their names, each once", field=field_name
        )
    for name in names:
        if not 1 <= len(name.encode()) <= NAME_BYTES_MAX:
            raise FallowError(
                Reason.FIELD_INVALID,
                f"a name of {len(name.encode())} bytes",
                field=field_name,
                limit=f"1 to {NAME_BYTES_MAX}",
            )
