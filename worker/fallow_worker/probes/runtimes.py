"""The runtime that is installed: which build, which providers, and whether a provider really runs on a device.

Asked of short-lived children, so that the daemon never imports a runtime and a crashing driver takes nobody along.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final, cast

from fallow.bundle import Precision
from fallow.session import Device, DeviceKind, DeviceLevel
from fallow_worker.core.providers import ProgramNeeds, ProviderChoice, provider_plan
from fallow_worker.probes.machine import Machine

RUNTIME_SECONDS_MAX: Final = 15.0
"""To import the runtime on a busy machine."""
TRIAL_SECONDS_MAX: Final = 30.0
"""To run the one-operator model: drivers compile when they are first used."""
_SHARING: Final = frozenset(
    f"onnxruntime{build}"
    for build in ("", "-gpu", "-openvino", "-directml", "-migraphx", "-rocm", "-training", "-windowsml", "-cann")
)
"""Packages that all install the module `onnxruntime`: the one installed last wins, and half of the others stays."""
_VENDORS: Final = {0x10DE: "NVIDIA", 0x1002: "AMD", 0x1022: "AMD", 0x8086: "Intel", 0x4D4F4351: "Qualcomm"}
"""PCI numbers; Qualcomm's chips are not on PCI and give ACPI's "QCOM"."""


def _no_packages() -> Mapping[str, str]:
    return MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Runtime:
    """The installed runtime as it describes itself."""

    version: str = ""
    providers: frozenset[str] = frozenset()
    packages: Mapping[str, str] = field(default_factory=_no_packages)
    """Version by name of every installed package that is or drives a runtime."""
    error: str = ""
    """Why it cannot be imported; empty when it can."""
    cpu_error: str = ""
    """Why the one-operator model does not run on the CPU; empty when it does."""
    listed: tuple[Device, ...] = ()
    """GPUs and NPUs that the runtime lists by itself: the portable way on Windows."""

    @property
    def builds(self) -> tuple[str, ...]:
        """Installed packages that share the runtime's module; more than one is a mistake."""
        return tuple(sorted(_SHARING & set(self.packages)))

    @property
    def name(self) -> str:
        """For people: `onnxruntime-gpu 1.31.1`."""
        return " and ".join(f"{build} {self.packages[build]}" for build in self.builds) or self.version


def installed_runtime(machine: Machine) -> Runtime:
    """What a child says of the runtime; an empty one with its error when it does not come up."""
    answer = machine.ask("runtime", {}, deadline_s=RUNTIME_SECONDS_MAX)
    facts = answer.facts
    packages = MappingProxyType({str(name): str(version) for name, version in _mapping(facts.get("packages")).items()})
    error = answer.failure or str(facts.get("error", ""))
    if error:
        return Runtime(packages=packages, error=error)
    return Runtime(
        version=str(facts.get("version", "")),
        providers=frozenset(map(str, facts.get("providers") or ())),
        packages=packages,
        cpu_error=str(facts.get("cpu_error", "")),
        listed=_listed(facts.get("devices") or []),
    )


def trial_choices(device: Device, runtime: Runtime, *, ordinal: int) -> tuple[ProviderChoice, ...]:
    """With which providers and options to try a device: in fp32 where it can, else in fp16."""
    for precision in (Precision.FP32, Precision.FP16):
        needs = ProgramNeeds(precision, fixed_shapes=True)
        plan = provider_plan(device, needs, runtime.providers, ordinal=ordinal)
        if plan.choices:
            return plan.choices
    return ()


def trial_error(machine: Machine, choice: ProviderChoice) -> str:
    """Why the one-operator model does not run with this choice; empty when it ran and gave the right sums."""
    question = {
        "provider": choice.provider.value,
        "options": dict(choice.options),
        "session_entries": dict(choice.session_entries),
    }
    answer = machine.ask("runtime", question, deadline_s=TRIAL_SECONDS_MAX)
    return answer.failure or str(answer.facts.get("error", "the trial said nothing"))


def _listed(devices: list[Mapping[str, Any]]) -> tuple[Device, ...]:
    """One device for each piece of hardware, however many providers list it."""
    found: dict[str, Device] = {}
    for device in devices:
        kind = {"gpu": DeviceKind.GPU, "npu": DeviceKind.NPU}.get(str(device.get("kind")))
        if kind is None:
            continue
        metadata = _mapping(device.get("metadata"))
        vendor_number, number = int(device.get("vendor_id", 0)), int(device.get("device_id", 0))
        place = metadata.get("LUID") or metadata.get("DxgiAdapterNumber") or "0"
        device_id = f"{kind.value}-{vendor_number:04x}:{number:04x}-{place}"
        vendor = _VENDORS.get(vendor_number, str(device.get("vendor", "")))
        model = str(metadata.get("Description") or f"{vendor} {kind.value.upper()} {number:04x}")
        found.setdefault(device_id, Device(device_id, kind, DeviceLevel.PRESENT, vendor=vendor, model=model))
    return tuple(found.values())


def _mapping(value: Any) -> Mapping[str, Any]:
    return cast("Mapping[str, Any]", value) if isinstance(value, dict) else {}
