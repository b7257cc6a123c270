"""The operator's controls, through the command line and on the wire."""

from __future__ import annotations

import json
import secrets
from collections.abc import Awaitable, Callable
from pathlib import Path

import grpc
import pytest

from fallow.channel import control_channel
from fallow.errors import FallowError, Reason
from fallow.roles import Role, Tier
from fallow.v1 import admin_service_pb2 as pb
from fallow.v1 import admin_service_pb2_grpc, identity_pb2
from fallow.wire.errors import error_from_rpc
from integration.harness import CoordinatorService
from integration.raw_session import joined

pytestmark = pytest.mark.processes


async def refusal(call: Awaitable[object]) -> tuple[grpc.StatusCode, FallowError]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), error_from_rpc(caught.value)


async def test_token_carries_account_pool_tier_uses_and_tags(
    shared_coordinator: CoordinatorService, tmp_path: Path
) -> None:
    name = secrets.token_hex(4)
    account_id = shared_coordinator.cli("account", "create", f"account {name}")["account_id"]
    pool_id = shared_coordinator.cli("pool", "create", f"pool {name}", "--account", account_id)["pool_id"]
    made = shared_coordinator.cli(
        "token", "new", "--role", "worker", "--tier", "managed", "--account", account_id, "--pool", pool_id,
        "--uses", "2", "--valid-for", "15m", "--tag", "lab", "--tag", name,
    )  # fmt: skip
    worker = await joined(made["join_line"], tmp_path / "worker", "lab 1")
    assert (worker.role, worker.tier, worker.account_id, worker.pool_id) == (
        Role.WORKER,
        Tier.MANAGED,
        account_id,
        pool_id,
    )
    tokens = {token["token_id"]: token for token in shared_coordinator.cli("token", "list")["tokens"]}
    token = tokens[made["token_id"]]
    assert (token["uses"], token["uses_max"], token["tags"]) == (1, 2, ["lab", name])
    assert "secret" not in json.dumps(token)
    (listed,) = (
        one for one in shared_coordinator.cli("worker", "list")["workers"] if one["worker_id"] == worker.party_id
    )
    assert (listed["name"], listed["tier"], listed["connected"]) == ("lab 1", "TIER_MANAGED", False)
    await joined(made["join_line"], tmp_path / "second")
    left = {token["token_id"] for token in shared_coordinator.cli("token", "list")["tokens"]}
    assert made["token_id"] not in left


async def test_volunteers_without_a_named_account_each_get_their_own(
    shared_coordinator: CoordinatorService, tmp_path: Path
) -> None:
    first = await joined(shared_coordinator.worker_join_line, tmp_path / "a")
    second = await joined(shared_coordinator.worker_join_line, tmp_path / "b")
    assert len({first.account_id, second.account_id, shared_coordinator.operator.account_id}) == 3
    assert first.tier is Tier.VOLUNTEER


async def test_operators_join_the_operators_account_and_may_control(
    shared_coordinator: CoordinatorService, tmp_path: Path
) -> None:
    line = shared_coordinator.new_token("--role", "operator")
    operator = await joined(line, tmp_path / "operator")
    assert operator.account_id == shared_coordinator.operator.account_id
    async with control_channel(operator) as channel:
        status = await admin_service_pb2_grpc.AdminServiceStub(channel).GetStatus(pb.GetStatusRequest(), timeout=10)
    assert status.protocol.version == 1
    assert status.journal_sequence > 0
    assert status.epoch >= 1
    assert 0 < status.resident_bytes < 512 * 1024 * 1024


@pytest.mark.parametrize("line", ["client_join_line", "worker_join_line"])
async def test_nobody_else_may_control(shared_coordinator: CoordinatorService, tmp_path: Path, line: str) -> None:
    party = await joined(shared_coordinator.facts[line], tmp_path / "party")
    async with control_channel(party) as channel:
        stub = admin_service_pb2_grpc.AdminServiceStub(channel)
        calls: tuple[Callable[[], Awaitable[object]], ...] = (
            lambda: stub.CreateToken(pb.CreateTokenRequest(role=identity_pb2.ROLE_OPERATOR)),
            lambda: stub.ListTokens(pb.ListTokensRequest()),
            lambda: stub.RevokeParty(pb.RevokePartyRequest(party_id=party.party_id)),
            lambda: stub.GetStatus(pb.GetStatusRequest()),
        )
        for call in calls:
            code, error = await refusal(call())
            assert (code, error.reason) == (grpc.StatusCode.PERMISSION_DENIED, Reason.PERMISSION_DENIED)


def test_wrong_arguments_are_told_with_their_limit(shared_coordinator: CoordinatorService) -> None:
    for arguments, words in (
        (("token", "new", "--role", "worker", "--uses", "99999"), "uses_max"),
        (("token", "new", "--role", "worker", "--valid-for", "400d"), "365 days"),
        (("token", "new", "--role", "client", "--tier", "volunteer"), "only workers have a tier"),
        (("token", "new", "--role", "worker", "--pool", "pool-nowhere"), "pool"),
        (("token", "new", "--role", "worker", "--account", "account-nobody"), "account"),
        (("token", "revoke", "token-nobody"), "token"),
        (("worker", "quarantine", "worker-nobody"), "worker"),
        (("party", "revoke", "client-nobody"), "part"),
        (("account", "create", " "), "name"),
        (("pool", "create", "p" * 500), "128 bytes"),
    ):
        done = shared_coordinator.cli_raw(*arguments)
        assert done.returncode == 1, arguments
        told = done.stderr.decode()
        assert told.startswith("fallow-coordinator: "), told
        assert words in told, (arguments, told)
        assert "Traceback" not in told


def test_names_of_accounts_and_pools_are_taken_once(shared_coordinator: CoordinatorService) -> None:
    name = secrets.token_hex(4)
    for kind in ("account", "pool"):
        shared_coordinator.cli(kind, "create", name)
        again = shared_coordinator.cli_raw(kind, "create", name)
        assert again.returncode == 1
        assert name in again.stderr.decode() or "taken" in again.stderr.decode()


def test_lists_are_readable_by_people(shared_coordinator: CoordinatorService) -> None:
    for arguments, head in ((("token", "list"), b"TOKEN"), (("worker", "list"), b"WORKER"), (("status",), b"software")):
        done = shared_coordinator.cli_raw(*arguments)
        assert done.returncode == 0
        assert done.stdout.startswith(head)


def test_journal_of_a_running_coordinator_checks(shared_coordinator: CoordinatorService) -> None:
    report = shared_coordinator.cli("check")
    assert report["faults"] == []
    assert report["records"] > 0
