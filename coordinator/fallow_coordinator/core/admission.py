"""Who may submit to a pool: everybody to an open one, the admitted accounts to a closed one."""

from __future__ import annotations

from fallow.errors import FallowError, Reason
from fallow.ids import AccountId, PoolId
from fallow_coordinator.core import commands as c
from fallow_coordinator.core import events as e
from fallow_coordinator.core.answers import Decision
from fallow_coordinator.core.state import Pool, State

ADMITTED_PER_POOL_MAX = 100_000


def check_admitted(state: State, account_id: AccountId, pool_id: PoolId) -> None:
    """Returns when the account may use the pool. Raises POOL_UNKNOWN, PERMISSION_DENIED."""
    pool = _pool(state, pool_id)
    if not is_admitted(state, account_id, pool):
        raise FallowError(
            Reason.PERMISSION_DENIED,
            f"this account is not admitted to pool {pool_id}",
            field="pool_id",
            limit="accounts that its operator admitted, or that joined by a token of the pool",
            hint=f"ask the operator for `fallow-coordinator pool admit {pool_id} {account_id}`, or use your own pool",
        )


def is_admitted(state: State, account_id: AccountId, pool: Pool) -> bool:
    """Whether the account may submit there: the pool's own account and the operator's always may."""
    own = account_id in (pool.account_id, state.operator_account_id)
    return own or not pool.closed or account_id in pool.admitted


def admitted_by_token(state: State, account_id: AccountId, pool_id: PoolId) -> tuple[e.Event, ...]:
    """What makes the account of somebody who joins by a token of the pool one of its own."""
    pool = state.pools[pool_id]
    if not pool.closed or account_id in pool.admitted or account_id == pool.account_id:
        return ()
    return (e.AccountAdmitted(pool_id=pool_id, account_id=account_id),)


def admit_account(state: State, command: c.AdmitAccount) -> Decision:
    """The account may submit to the pool. Raises POOL_UNKNOWN, ACCOUNT_UNKNOWN, LIMIT_EXCEEDED."""
    pool = _pool(state, command.pool_id)
    _account(state, command.account_id)
    if command.account_id in pool.admitted or not pool.closed:
        return Decision()
    if len(pool.admitted) >= ADMITTED_PER_POOL_MAX:
        raise FallowError(
            Reason.LIMIT_EXCEEDED,
            "too many accounts are admitted to the pool",
            field="account_id",
            limit=f"{ADMITTED_PER_POOL_MAX} accounts",
        )
    return Decision((e.AccountAdmitted(pool_id=command.pool_id, account_id=command.account_id),))


def expel_account(state: State, command: c.ExpelAccount) -> Decision:
    """The account submits no more to the pool; its jobs there go on. Raises POOL_UNKNOWN, ACCOUNT_UNKNOWN."""
    pool = _pool(state, command.pool_id)
    _account(state, command.account_id)
    if command.account_id not in pool.admitted:
        return Decision()
    return Decision((e.AccountExpelled(pool_id=command.pool_id, account_id=command.account_id),))


def _pool(state: State, pool_id: PoolId) -> Pool:
    pool = state.pools.get(pool_id)
    if pool is None:
        raise FallowError(Reason.POOL_UNKNOWN, f"there is no pool {pool_id}", field="pool_id")
    return pool


def _account(state: State, account_id: AccountId) -> None:
    if account_id not in state.accounts:
        raise FallowError(Reason.ACCOUNT_UNKNOWN, f"there is no account {account_id}", field="account_id")
