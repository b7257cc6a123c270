"""What a node with engine children can do, as the worker tells the coordinator."""

from __future__ import annotations

from fallow.session import Capability, Device, DeviceKind, DeviceLevel, TaskKind
from fallow_worker.engine.protocol import Ready
from fallow_worker.executor.choice import ExecutorKind
from fallow_worker.executor.machine import memory_bytes_free
from fallow_worker.executor.supervisor import Supervisor

CPU_PROVIDER = "CPUExecutionProvider"


def node_capability(supervisor: Supervisor, ready: Ready, *, executor: ExecutorKind) -> Capability:
    """The processor of this node as one device of one slot, usable because a canary ran on it in the sandbox."""
    machine = supervisor.machine
    device = Device(
        device_id="cpu-0",
        kind=DeviceKind.CPU,
        level=DeviceLevel.USABLE,
        vendor=machine.vendor,
        model=machine.model,
        memory_bytes=supervisor.memory_bytes,
        providers=(CPU_PROVIDER,),
        driver_version=ready.runtime,
        cores=supervisor.cores,
        architecture=machine.architecture,
        execution_class=ready.execution_class,
    )
    return Capability(
        devices=(device,),
        sandbox_level=ready.level,
        memory_bytes_free=memory_bytes_free(),
        executor=executor.value,
        operating_system=machine.operating_system,
        task_kinds=frozenset({TaskKind.MAP}),
    )
