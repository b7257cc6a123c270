"""How many kinds of workers are told apart: what strangers say of themselves may not multiply matching's groups."""

from __future__ import annotations

from dataclasses import replace

from fallow.errors import FallowError, Reason
from fallow.region import REGION_BYTES_MAX, REGION_RULE, is_region
from fallow.session import Capability
from fallow_coordinator.core.groups import ability_of_worker
from fallow_coordinator.core.limits import GROUPS_MAX, REGIONS_UNKNOWN_MAX
from fallow_coordinator.core.state import NO_GROUP, State, Worker

OTHER_REGION = "other"
"""Where workers stand whose regions are too many to be told apart."""


def told_apart(state: State, worker: Worker, capability: Capability) -> Capability:
    """The capability as it is counted: in region `other` when too many regions that no forecast knows are in use.

    Raises FIELD_INVALID for what names no region, OVERLOADED for one kind of worker too many.
    """
    region = capability.region.lower()
    if region and not is_region(region):
        raise FallowError(
            Reason.FIELD_INVALID,
            f"{capability.region[:REGION_BYTES_MAX]!r} is no name of a region",
            field="capability.region",
            limit=REGION_RULE,
            hint="start it with `--region` and such a name, or without",
        )
    if region and not _is_told_apart(state, region):
        capability = replace(capability, region=OTHER_REGION)
    if _has_room(state, worker, capability):
        return capability
    folded = replace(capability, region=OTHER_REGION)
    if region and _has_room(state, worker, folded):
        return folded
    raise FallowError(
        Reason.OVERLOADED,
        "workers of too many different kinds are connected",
        field="capability",
        limit=f"{GROUPS_MAX} kinds at a time: of memory, device kinds, tasks, region, ask, pool and tier",
        hint="try again later, or with the ask, the region and the tasks that other workers have",
    )


def _is_told_apart(state: State, region: str) -> bool:
    if region in state.forecasts or region == OTHER_REGION:
        return True
    in_use = {group.ability.region for group in state.groups.values()} - state.forecasts.keys()
    return region in in_use or len(in_use) < REGIONS_UNKNOWN_MAX


def _has_room(state: State, worker: Worker, capability: Capability) -> bool:
    """Whether the worker's kind is there already, or one more may be."""
    if len(state.groups) < GROUPS_MAX:
        return True
    ability = ability_of_worker(state, replace(worker, capability=capability))
    return ability in state.group_numbers or _is_alone(state, worker)


def _is_alone(state: State, worker: Worker) -> bool:
    """Whether the worker makes a group by itself, which goes when it changes."""
    if worker.group == NO_GROUP:
        return False
    group = state.groups[worker.group]
    return len(group.members) == 1 and not group.stock
