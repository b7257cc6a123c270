"""Which executor a worker runs: a plain decision from what it owns and what its owner said."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import assert_never

from fallow.roles import Tier


class ExecutorSetting(StrEnum):
    """What an owner may write into the worker's configuration."""

    AUTO = "auto"
    RAY = "ray"
    PROCESS = "process"


class ExecutorKind(StrEnum):
    """The executors there are."""

    RAY = "ray"
    PROCESS = "process"


@dataclass(frozen=True, slots=True)
class Choice:
    """The executor to run and the reason, for `fallow-worker why` and the log."""

    kind: ExecutorKind
    why: str


def chosen_executor(setting: ExecutorSetting, *, devices: int, ray_address: str, tier: Tier) -> Choice:
    """The executor for a worker of `devices` usable devices (a CPU counts as one, however many cores it has).

    `ray_address` is the owner's cluster, or empty. Auto takes Ray where there is something to spread over: two devices
    or more, or a cluster. Operators' workers serve the coordinator's own small tasks and stay on processes.
    """
    match setting:
        case ExecutorSetting.RAY:
            return Choice(ExecutorKind.RAY, "the configuration says so")
        case ExecutorSetting.PROCESS:
            return Choice(ExecutorKind.PROCESS, "the configuration says so")
        case ExecutorSetting.AUTO:
            if ray_address:
                return Choice(ExecutorKind.RAY, f"a Ray cluster is named: {ray_address}")
            if tier is Tier.OPERATOR:
                return Choice(ExecutorKind.PROCESS, "operators' workers default to processes")
            if devices >= 2:
                return Choice(ExecutorKind.RAY, f"{devices} devices are usable")
            return Choice(ExecutorKind.PROCESS, "one device needs no scheduler of its own")
        case _:
            assert_never(setting)
