"""Closed pools take jobs of admitted accounts alone; pools of before stay open."""

from __future__ import annotations

from typing import Any

import pytest

from fallow.errors import FallowError, Reason
from fallow.ids import AccountId, PoolId
from fallow.roles import Role
from fallow_coordinator.core import commands as c
from fallow_coordinator.core import events as e
from fallow_coordinator.core.answers import AccountMade, PoolMade
from fallow_coordinator.core.state import Party
from simulation.core_world import World


def refused(world: World, command: c.Command) -> FallowError:
    before = repr(world.state)
    with pytest.raises(FallowError) as caught:
        world.take(command)
    assert repr(world.state) == before, "a refusal changes nothing"
    return caught.value


def client(world: World, name: str, **token: Any) -> Party:
    """Somebody with an account, a bundle and rows of their own."""
    granted = world.enroll(name, world.token(Role.CLIENT, **token))
    return world.state.parties[granted.party_id]


def pool(world: World, *, closed: bool) -> PoolId:
    made = world.ask(c.CreatePool("a pool", world.state.operator_account_id, closed=closed))
    assert isinstance(made, PoolMade)
    return made.pool_id


def submission(world: World, party: Party, pool_id: PoolId | None) -> c.SubmitMapJob:
    if party.account_id not in world.state.bundles[world.bundle_digest].owners:
        world.register(party.account_id)
    return world.submission(
        4, key=f"of {party.party_id}", account_id=party.account_id, party_id=party.party_id, pool_id=pool_id
    )


def test_a_closed_pool_refuses_strangers_and_says_what_to_ask_for() -> None:
    world = World().start().ready_bundle()
    stranger, closed = client(world, "stranger"), pool(world, closed=True)
    error = refused(world, submission(world, stranger, closed))
    assert error.reason is Reason.PERMISSION_DENIED and error.field == "pool_id"
    assert f"pool admit {closed} {stranger.account_id}" in error.hint
    turn = world.take(c.AdmitAccount(closed, stranger.account_id))
    assert turn.events == (e.AccountAdmitted(closed, stranger.account_id),)
    assert world.take(c.AdmitAccount(closed, stranger.account_id)).events == ()
    world.take(submission(world, stranger, closed))
    world.take(c.ExpelAccount(closed, stranger.account_id))
    assert world.take(c.ExpelAccount(closed, stranger.account_id)).events == ()
    again = world.submission(
        4, key="another", account_id=stranger.account_id, party_id=stranger.party_id, pool_id=closed
    )
    assert refused(world, again).reason is Reason.PERMISSION_DENIED


def test_open_pools_and_the_operators_own_account_need_no_admission() -> None:
    world = World().start().ready_bundle()
    stranger = client(world, "stranger")
    world.take(submission(world, stranger, pool(world, closed=False)))
    world.take(world.submission(4, key="own", pool_id=PoolId(list(world.state.pools)[-1])))


def test_who_joins_by_a_token_of_a_closed_pool_is_admitted_to_it() -> None:
    world = World().start().ready_bundle()
    closed = pool(world, closed=True)
    member = client(world, "member", pool_id=closed)
    assert list(world.state.pools[closed].admitted) == [member.account_id]
    world.take(submission(world, member, None))


def test_admission_names_a_pool_and_an_account_that_are_there() -> None:
    world = World().start()
    made = world.ask(c.CreateAccount("lab"))
    assert isinstance(made, AccountMade)
    nowhere = PoolId("pool-nowhere")
    assert refused(world, c.AdmitAccount(nowhere, made.account_id)).reason is Reason.POOL_UNKNOWN
    closed = pool(world, closed=True)
    assert refused(world, c.AdmitAccount(closed, AccountId("account-x"))).reason is Reason.ACCOUNT_UNKNOWN
    assert refused(world, c.ExpelAccount(closed, AccountId("account-x"))).reason is Reason.ACCOUNT_UNKNOWN
