"""How events about admission, and about programs under suspicion, change the state."""

from __future__ import annotations

from typing import assert_never

from fallow.session import TaskKind
from fallow_coordinator.core import events as e
from fallow_coordinator.core.state import State

DoorEvent = e.AccountAdmitted | e.AccountExpelled | e.BundleCleared | e.BundleReleased | e.InspectionRowsGiven


def evolve_door(state: State, event: DoorEvent) -> None:
    """Applies one event about who may use what."""
    match event:
        case e.AccountAdmitted():
            assert event.account_id in state.accounts, "who is admitted is known"
            state.pools[event.pool_id].admitted[event.account_id] = None
        case e.AccountExpelled():
            del state.pools[event.pool_id].admitted[event.account_id]
        case e.BundleCleared():
            bundle = state.bundles[event.bundle_digest]
            assert bundle.inspection_task_id == event.task_id, "an open inspection clears"
            bundle.crashed_accounts = {}
            bundle.clearances += 1
        case e.InspectionRowsGiven():
            task = state.tasks[event.task_id]
            assert task.kind is TaskKind.INSPECT and task.lease_id is None, "rows are given before anybody inspects"
            task.input, task.input_inline, task.rows = event.input, event.inline, event.rows
        case e.BundleReleased():
            bundle = state.bundles[event.bundle_digest]
            bundle.held_reason, bundle.crashed_accounts, bundle.clearances = "", {}, 0
        case _:
            assert_never(event)
