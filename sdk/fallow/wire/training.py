"""Training programs to protobuf and back. What is decoded obeys every rule of `TrainingProgram`."""

from __future__ import annotations

from google.protobuf.message import DecodeError

from fallow.errors import FallowError, Reason
from fallow.federated.program import PROGRAM_BYTES_MAX, Hyperparameter, TrainingProgram
from fallow.federated.updates import TensorSpec
from fallow.schema import DType, Schema, TensorColumn
from fallow.v1 import schema_pb2, training_pb2
from fallow.wire.schema import DTYPES, schema_from_message, schema_to_message


def encode_training_program(program: TrainingProgram) -> bytes:
    """The deterministic bytes that are stored and digested."""
    message = training_pb2.TrainingProgram(
        columns=schema_to_message(Schema(program.columns)).columns,
        weights=[_spec_to_message(tensor) for tensor in program.weights],
        state=[_spec_to_message(tensor) for tensor in program.state],
        hyperparameters=[
            training_pb2.Hyperparameter(name=each.name, value=each.value) for each in program.hyperparameters
        ],
        metrics=program.metrics,
        batch_rows=program.batch_rows,
        platforms=program.platforms,
        stablehlo_version=program.stablehlo_version,
        train=program.train,
        evaluate=program.evaluate,
        init=program.init,
    )
    return message.SerializeToString(deterministic=True)


def decode_training_program(data: bytes) -> TrainingProgram:
    """The program of stored bytes. Raises MALFORMED_MESSAGE, FIELD_INVALID, LIMIT_EXCEEDED."""
    if len(data) > PROGRAM_BYTES_MAX:
        raise FallowError(
            Reason.LIMIT_EXCEEDED,
            f"a program of {len(data)} bytes",
            field="program",
            limit=f"{PROGRAM_BYTES_MAX} bytes",
        )
    try:
        message = training_pb2.TrainingProgram.FromString(data)
    except DecodeError:
        raise FallowError(Reason.MALFORMED_MESSAGE, "these bytes are no training program", field="program") from None
    columns = schema_from_message(schema_pb2.Schema(columns=message.columns)).columns
    tensors = tuple(column for column in columns if isinstance(column, TensorColumn))
    if len(tensors) != len(columns):
        raise FallowError(Reason.FIELD_INVALID, "a training program reads tensors only", field="columns")
    return TrainingProgram(
        columns=tensors,
        weights=tuple(_spec_from_message(spec, f"weights[{n}]") for n, spec in enumerate(message.weights)),
        state=tuple(_spec_from_message(spec, f"state[{n}]") for n, spec in enumerate(message.state)),
        hyperparameters=tuple(Hyperparameter(each.name, each.value) for each in message.hyperparameters),
        metrics=tuple(message.metrics),
        batch_rows=message.batch_rows,
        train=message.train,
        evaluate=message.evaluate,
        init=message.init,
        platforms=tuple(message.platforms),
        stablehlo_version=message.stablehlo_version,
    )


def _spec_to_message(spec: TensorSpec) -> training_pb2.TensorSpec:
    return training_pb2.TensorSpec(name=spec.name, dtype=DTYPES.number(DType(spec.dtype)), shape=spec.shape)


def _spec_from_message(message: training_pb2.TensorSpec, field: str) -> TensorSpec:
    return TensorSpec(message.name, DTYPES.member(message.dtype, f"{field}.dtype").value, tuple(message.shape))
