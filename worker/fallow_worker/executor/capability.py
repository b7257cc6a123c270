"""What nodes with engine children can do, as the worker tells the coordinator."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from fallow.session import SANDBOX_ORDER, Capability, Device, DeviceKind, DeviceLevel, SandboxLevel, TaskKind
from fallow_worker.core.providers import Provider
from fallow_worker.engine.protocol import Ready
from fallow_worker.executor.choice import ExecutorKind
from fallow_worker.executor.supervisor import Supervisor
from fallow_worker.probes.cpu import cpu_devices
from fallow_worker.probes.memory import memory_bytes_free

ENGINE_PROVIDERS: Final = frozenset({Provider.CPU.value})
"""Providers that engine children drive. A device of others is told of, and gets no work."""


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """One node: its processor, and what an engine child on it said of itself when it was locked down."""

    cores: int
    memory_bytes: int
    memory_bytes_free: int
    vendor: str
    model: str
    architecture: str
    operating_system: str
    sandbox_level: SandboxLevel
    runtime: str
    execution_class: str


def node_facts(supervisor: Supervisor, ready: Ready) -> NodeFacts:
    """The facts of the node that we are on."""
    cpu = next(iter(cpu_devices()), None)
    return NodeFacts(
        cores=supervisor.cores,
        memory_bytes=supervisor.memory_bytes,
        memory_bytes_free=memory_bytes_free(),
        vendor=cpu.vendor if cpu else "",
        model=cpu.model if cpu else "",
        architecture=cpu.architecture if cpu else platform.machine(),
        operating_system=f"{platform.system()} {platform.release()}",
        sandbox_level=ready.level,
        runtime=ready.runtime,
        execution_class=ready.execution_class,
    )


def capability_of(nodes: Sequence[NodeFacts], executor: ExecutorKind) -> Capability:
    """What a worker of these nodes offers: each processor is a device of one slot, usable because a canary ran on it.

    The sandbox level is the weakest of all nodes.
    """
    assert nodes
    return Capability(
        devices=tuple(replace(_cpu(facts), device_id=f"cpu-{index}") for index, facts in enumerate(nodes)),
        sandbox_level=min((facts.sandbox_level for facts in nodes), key=SANDBOX_ORDER.index),
        memory_bytes_free=sum(facts.memory_bytes_free for facts in nodes),
        executor=executor.value,
        nodes=len(nodes),
        operating_system=nodes[0].operating_system,
        task_kinds=frozenset({TaskKind.MAP}),
    )


def as_offered(device: Device) -> Device:
    """An accelerator as it is advertised: one that works, and that engine children do not drive yet, is present only.

    The coordinator counts slots of usable devices: a slot that is not driven would be work for the processor.
    """
    if device.level is DeviceLevel.PRESENT or ENGINE_PROVIDERS & set(device.providers):
        return device
    obstacle = f"works with {', '.join(device.providers)}; engine children of this version drive the CPU only"
    return replace(device, level=DeviceLevel.PRESENT, obstacle=obstacle)


def _cpu(facts: NodeFacts) -> Device:
    return Device(
        device_id="cpu",
        kind=DeviceKind.CPU,
        level=DeviceLevel.USABLE,
        vendor=facts.vendor,
        model=facts.model,
        memory_bytes=facts.memory_bytes,
        providers=(Provider.CPU.value,),
        driver_version=facts.runtime,
        cores=facts.cores,
        architecture=facts.architecture,
        execution_class=facts.execution_class,
    )
