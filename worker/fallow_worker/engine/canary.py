"""A small trusted bundle that walks the very path which a foreign one will take: codec, session, run, heads, row block.

Run before the filter it makes the runtime import and open whatever it opens lazily; run again behind the filter it
shows that everything still works and gives the same bits.
"""

from __future__ import annotations

import base64
from typing import Final

from fallow.bundle import (
    Binding,
    BundleManifest,
    BytesCodec,
    ProgramFormat,
    ProgramStage,
    SoftmaxHead,
    TopKHead,
)
from fallow.ids import DIGEST_BYTES, Digest
from fallow.row_block import RowBlock
from fallow.rows import RowCodec
from fallow.schema import BytesColumn, DType, Schema, SizeFeature, StringColumn, TensorColumn
from fallow_worker.engine.chain import Chain

MODEL: Final = base64.b64decode(
    "CAgSADq1AwocCgZ0b2tlbnMSAWYiBENhc3QqCQoCdG8YAaABAgoOCgFmCgFzEgFtIgNNdWwKEgoBbQoCdzESAXAiBk1hdE11bAoPCgFwCgJiMR"
    "IBcSIDQWRkCgwKAXESAXIiBFJlbHUKFwoBcgoCdzISBnNjb3JlcyIGTWF0TXVsEgZjYW5hcnkqCxABQgFzSgQAAIA7Ko0BCAgIBBABQgJ3MUqA"
    "AQAAIL8AAIA+AACAvgAAID8AAAA+AADAvgAAAD8AAAAAAAAAvwAAwD4AAAC+AAAgvwAAgD4AAIC+AAAgPwAAAD4AAMC+AAAAPwAAAAAAAAC/AA"
    "DAPgAAAL4AACC/AACAPgAAgL4AACA/AAAAPgAAwL4AAAA/AAAAAAAAAL8AAMA+KhoIBBABQgJiMUoQAACAPgAAAL8AAAA+AACAPSo8CAQIAxAB"
    "QgJ3MkowAABAvwAAAD8AAAAAAAAAvwAAQD8AAIA+AACAvgAAQL8AAAA/AAAAAAAAAL8AAEA/WhwKBnRva2VucxISChAIBhIMCgYSBHJvd3MKAg"
    "gIYhwKBnNjb3JlcxISChAIARIMCgYSBHJvd3MKAggDQgQKABAR"
)
"""tokens int32[rows, 8] → Cast → Mul 1/256 → MatMul [8, 4] → Add → Relu → MatMul [4, 3] → scores float32[rows, 3]."""

TOKENS: Final = 8
LABELS: Final = ("low", "middle", "high")
_NO_DIGEST: Final = Digest(bytes(DIGEST_BYTES))
_CONTENTS: Final = (b"  canary one", b"x", b"", b"a longer row than both windows", b"\xff\x00\x80 \n")

MANIFEST: Final = BundleManifest(
    name="canary",
    files=(),
    stages=(
        BytesCodec(
            column="content",
            output="tokens",
            head_window_bytes=16,
            tail_window_bytes=16,
            head_tokens=TOKENS // 2,
            tail_tokens=TOKENS // 2,
            padding_token=256,
            strip_whitespace=True,
        ),
        ProgramStage(ProgramFormat.ONNX, "canary.onnx", (Binding("tokens", "tokens"),), (Binding("scores", "raw"),)),
        SoftmaxHead("raw", "chances"),
        TopKHead("chances", "label", 2, "labels.txt"),
    ),
    input_schema=Schema((BytesColumn("content"),), (SizeFeature.BYTES,)),
    output_schema=Schema(
        (
            StringColumn("label_0"),
            TensorColumn("label_0_score", DType.FLOAT32, ()),
            StringColumn("label_1"),
            TensorColumn("chances", DType.FLOAT32, (len(LABELS),)),
        )
    ),
)


def sing(*, threads: int, lanes: int, allow_spinning: bool) -> bytes:
    """The output block of the canary's rows."""
    chain = Chain(
        MANIFEST,
        {"canary.onnx": MODEL, "labels.txt": "\n".join(LABELS).encode()},
        input_schema_digest=_NO_DIGEST,
        output_schema_digest=_NO_DIGEST,
        batch_rows=2,
        threads=threads,
        lanes=lanes,
        allow_spinning=allow_spinning,
    )
    chain.warm_up()
    rows = RowCodec(MANIFEST.input_schema, _NO_DIGEST).encode({"content": list(_CONTENTS)}, nonce=bytes(16))
    result = chain.run(RowBlock.parse(rows), nonce=bytes(16))
    assert result.failed_rows == 0, result.failures
    return result.block
