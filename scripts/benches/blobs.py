"""Blob transfers, stored durably and checked, against a bare gRPC stream of the same bytes over the same mTLS."""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
from scripts.benches.blob_saturation import assigns_while_saturated
from scripts.benches.report import Report, median, say

from fallow.blob_client import BlobClient
from fallow.identity import BLOBS_NAME
from fallow.limits import BLOB_CHUNK_BYTES, MIB
from fallow.wire.chunks import CHUNK_MESSAGE_BYTES_MAX

BUDGET_OVER_TRANSPORT = 0.7
BUDGET_ASSIGN_P99_MS = 50.0
PAIRS_MIN = 7
_MESSAGES: list[tuple[str, Any]] = [
    ("grpc.max_receive_message_length", CHUNK_MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", CHUNK_MESSAGE_BYTES_MAX),
]


def options(parser: argparse.ArgumentParser) -> None:
    """What can be changed."""
    parser.add_argument("--pairs", type=int, default=PAIRS_MIN, help=f"interleaved pairs, at least {PAIRS_MIN}")
    parser.add_argument("--mebibytes", type=int, default=256, help="size of each transfer")
    parser.add_argument("--seconds", type=float, default=20.0, help="how long leases are watched while blobs saturate")
    parser.add_argument("--quick", action="store_true", help="one pair of small transfers: does it run?")


async def measure(chosen: argparse.Namespace) -> Report:
    """Moves fresh bytes up and down, through the service and bare, in turn; then leases beside blobs."""
    if chosen.quick:
        chosen.pairs, chosen.mebibytes, chosen.seconds = 1, 8, 2.0
    found = await _paired(chosen)
    return _report(chosen, found, await assigns_while_saturated(chosen.seconds, min(64, chosen.mebibytes)))


async def _paired(chosen: argparse.Namespace) -> dict[str, list[float]]:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "tests"))
    from integration.blob_rig import BlobRig, reference_of

    found: dict[str, list[float]] = {"up": [], "down": [], "bare_up": [], "bare_down": []}
    with tempfile.TemporaryDirectory(prefix="fallow-bench-") as folder:
        rig = BlobRig(Path(folder))
        rig.start()
        party = rig.party("bench", "bench")
        credentials = (party.key.pem, party.credentials.certificate_pem, rig.authority.certificate_pem)
        server = (rig.service_key.pem, (rig.state / "blobs" / "certificate.pem").read_bytes(), credentials[2])
        spawn = multiprocessing.get_context("spawn")
        ours, theirs = spawn.Pipe()
        bare = spawn.Process(target=_serve_bare, args=(theirs, server, chosen.mebibytes), daemon=True)
        bare.start()
        try:
            async with rig.channel(party) as channel, _bare_channel(ours.recv(), credentials) as transport:
                client = BlobClient(channel)
                for number in range(chosen.pairs + 1):
                    data = os.urandom(chosen.mebibytes * MIB)
                    put, get = rig.put_grant(party, data), rig.get_grant(party, data)
                    speeds = {
                        "bare_up": await _seconds(_bare_up(transport, data)),
                        "up": await _seconds(client.put(put, data)),
                        "bare_down": await _seconds(_bare_down(transport)),
                        "down": await _seconds(client.get(get, reference_of(data))),
                    }
                    for path in rig.blob_files():
                        path.unlink()
                    say(
                        f"{number or 'warm-up'}: "
                        + ", ".join(f"{k} {chosen.mebibytes / v:.0f}" for k, v in speeds.items())
                    )
                    if number:
                        for name, seconds in speeds.items():
                            found[name].append(chosen.mebibytes / seconds)
        finally:
            ours.close()
            bare.terminate()
            bare.join()
            rig.stop()
    return found


def _report(chosen: argparse.Namespace, found: dict[str, list[float]], beside: dict[str, Any]) -> Report:
    over = {
        side: median([ours / bare for ours, bare in zip(found[side], found[f"bare_{side}"], strict=True)])
        for side in ("up", "down")
    }
    void = [] if chosen.quick or chosen.pairs >= PAIRS_MIN else [f"{chosen.pairs} pairs, fewer than {PAIRS_MIN}"]
    if not beside["leases_sent"]:
        void.append("no lease was sent while blobs saturated")
    void += [f"nothing went {side}" for side, speed in beside["mib_moved_per_s"].items() if not speed]
    return Report(
        {
            "blob_mib_per_s": {side: round(median(found[side]), 1) for side in over},
            "transport_mib_per_s": {side: round(median(found[f"bare_{side}"]), 1) for side in over},
            "blob_over_transport": {side: round(value, 3) for side, value in over.items()},
            **beside,
            "budget": f"blob_over_transport >= {BUDGET_OVER_TRANSPORT}, assign_p99_ms <= {BUDGET_ASSIGN_P99_MS:g}",
            "holds": min(over.values()) >= BUDGET_OVER_TRANSPORT
            and beside["assign_p99_ms"] <= BUDGET_ASSIGN_P99_MS
            and not void,
            "mebibytes": chosen.mebibytes,
            "pairs": chosen.pairs,
        },
        void,
    )


async def _seconds(transfer: Any) -> float:
    began = time.perf_counter()
    await transfer
    return time.perf_counter() - began


def _bare_channel(port: int, credentials: tuple[bytes, bytes, bytes]) -> grpc.aio.Channel:
    key, certificate, authority = credentials
    mutual = grpc.ssl_channel_credentials(authority, key, certificate)
    named: list[tuple[str, Any]] = [*_MESSAGES, ("grpc.ssl_target_name_override", BLOBS_NAME)]
    return grpc.aio.secure_channel(f"127.0.0.1:{port}", mutual, named)


async def _bare_up(channel: grpc.aio.Channel, data: bytes) -> None:
    view = memoryview(data)

    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(data), BLOB_CHUNK_BYTES):
            yield bytes(view[start : start + BLOB_CHUNK_BYTES])

    put: Any = channel.stream_unary("/bare/Put")
    assert int(await put(chunks())) == len(data)


async def _bare_down(channel: grpc.aio.Channel) -> None:
    get: Any = channel.unary_stream("/bare/Get")
    chunks: list[bytes] = [chunk async for chunk in get(b"")]
    b"".join(chunks)


def _serve_bare(connection: Connection, server: tuple[bytes, bytes, bytes], mebibytes: int) -> None:
    asyncio.run(_bare_server(connection, server, mebibytes))


async def _bare_server(connection: Connection, server: tuple[bytes, bytes, bytes], mebibytes: int) -> None:
    key, certificate, authority = server
    content = os.urandom(BLOB_CHUNK_BYTES)

    async def put(chunks: AsyncIterator[bytes], _: object) -> bytes:
        return str(sum([len(chunk) async for chunk in chunks])).encode()

    async def get(_request: bytes, _: object) -> AsyncIterator[bytes]:
        for _number in range(mebibytes):
            yield content

    rpc: Any = grpc.aio.server(options=_MESSAGES)
    methods: dict[str, Any] = {
        "Put": grpc.stream_unary_rpc_method_handler(put),
        "Get": grpc.unary_stream_rpc_method_handler(get),
    }
    rpc.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bare", methods),))
    port = rpc.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(key, certificate)], authority, True))
    await rpc.start()
    connection.send(port)
    await rpc.wait_for_termination()
