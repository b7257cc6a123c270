"""Schemas to protobuf and back; a schema's digest is that of its deterministic bytes as stored."""

from __future__ import annotations

from google.protobuf.message import DecodeError

from fallow.errors import FallowError, Reason
from fallow.limits import MANIFEST_BYTES_MAX
from fallow.schema import (
    BytesColumn,
    Column,
    DType,
    RaggedColumn,
    Schema,
    SchemaBytes,
    SizeFeature,
    StringColumn,
    TensorColumn,
)
from fallow.v1 import schema_pb2
from fallow.wire.enums import EnumTable

DTYPES = EnumTable(DType, schema_pb2.DType, "D_TYPE")
SIZE_FEATURES = EnumTable(SizeFeature, schema_pb2.SizeFeature, "SIZE_FEATURE")


def schema_to_message(schema: Schema) -> schema_pb2.Schema:
    """The protobuf form of a schema."""
    return schema_pb2.Schema(
        columns=[_column_to_message(column) for column in schema.columns],
        size_features=[SIZE_FEATURES.number(feature) for feature in schema.size_features],
    )


def schema_from_message(message: schema_pb2.Schema) -> Schema:
    """The schema a message describes. Raises FIELD_INVALID, LIMIT_EXCEEDED or ROW_TOO_LARGE."""
    features = tuple(SIZE_FEATURES.member(n, f"size_features[{i}]") for i, n in enumerate(message.size_features))
    columns = tuple(_column_from_message(column, f"columns[{i}]") for i, column in enumerate(message.columns))
    return Schema(columns, features)


def encode_schema(schema: Schema) -> SchemaBytes:
    """The deterministic bytes that are stored and digested."""
    return SchemaBytes(schema_to_message(schema).SerializeToString(deterministic=True))


def decode_schema(data: bytes) -> Schema:
    """The schema of stored bytes. Raises MALFORMED_MESSAGE, and what `schema_from_message` raises."""
    if len(data) > MANIFEST_BYTES_MAX:
        raise FallowError(
            Reason.LIMIT_EXCEEDED, f"a schema of {len(data)} bytes", field="schema", limit=f"{MANIFEST_BYTES_MAX} bytes"
        )
    try:
        message = schema_pb2.Schema.FromString(data)
    except DecodeError:
        raise FallowError(Reason.MALFORMED_MESSAGE, "these bytes are no schema", field="schema") from None
    return schema_from_message(message)


def _column_to_message(column: Column) -> schema_pb2.Column:
    match column:
        case TensorColumn(name, dtype, shape):
            tensor = schema_pb2.TensorColumn(dtype=DTYPES.number(dtype), shape=shape)
            return schema_pb2.Column(name=name, tensor=tensor)
        case RaggedColumn(name, dtype, shape):
            free = [0 if dim is None else dim for dim in shape]
            return schema_pb2.Column(name=name, ragged=schema_pb2.RaggedColumn(dtype=DTYPES.number(dtype), shape=free))
        case BytesColumn(name):
            return schema_pb2.Column(name=name, bytes=schema_pb2.BytesColumn())
        case StringColumn(name):
            return schema_pb2.Column(name=name, string=schema_pb2.StringColumn())


def _column_from_message(message: schema_pb2.Column, field: str) -> Column:
    match message.WhichOneof("kind"):
        case "tensor":
            dtype = DTYPES.member(message.tensor.dtype, f"{field}.dtype")
            return TensorColumn(message.name, dtype, tuple(message.tensor.shape))
        case "ragged":
            dtype = DTYPES.member(message.ragged.dtype, f"{field}.dtype")
            return RaggedColumn(message.name, dtype, tuple(dim or None for dim in message.ragged.shape))
        case "bytes":
            return BytesColumn(message.name)
        case "string":
            return StringColumn(message.name)
        case _:
            raise FallowError(
                Reason.FIELD_INVALID, "a column without a kind", field=field, limit="tensor, ragged, bytes or string"
            )
