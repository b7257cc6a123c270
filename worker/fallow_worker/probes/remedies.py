"""Why a device that is there cannot be used, and what to install, with the size of the download: for people."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from fallow.session import Device, DeviceKind
from fallow_worker.core.providers import Provider, candidates
from fallow_worker.probes.runtimes import Runtime

CUDA_DRIVER_LEAST: Final = 580
"""The first driver for CUDA 13, which the CUDA build of the runtime brings along."""


@dataclass(frozen=True, slots=True)
class _Remedy:
    """An extra of ours that brings a provider."""

    extra: str
    size: str
    """What pip downloads beyond what is there, on the platform where the provider is used most (November 2026)."""
    also: str = ""
    replaces: bool = True
    """Whether its build takes the place of the one that is installed."""


_REMEDIES: Final = {
    Provider.CPU: _Remedy("cpu", "33 MB"),
    Provider.CUDA: _Remedy("cuda", "1.6 GB"),
    Provider.MIGRAPHX: _Remedy("migraphx", "22 MB", "and AMD's ROCm with MIGraphX from AMD's own packages"),
    Provider.OPENVINO: _Remedy("openvino", "84 MB"),
    Provider.DIRECTML: _Remedy("directml", "25 MB"),
    Provider.QNN: _Remedy("qnn", "62 MB", replaces=False),
    Provider.COREML: _Remedy("cpu", "21 MB", replaces=False),
}
_DRIVER_PACKAGES: Final = {
    (DeviceKind.GPU, "Intel"): "Intel's compute runtime (packages intel-opencl-icd and libze1)",
    (DeviceKind.NPU, "Intel"): "Intel's user-space NPU driver (package intel-driver-compiler-npu and its siblings)",
    (DeviceKind.GPU, "AMD"): "AMD's ROCm with MIGraphX, for this GPU",
    (DeviceKind.GPU, "NVIDIA"): "NVIDIA's current driver",
}


def obstacle_of(device: Device, runtime: Runtime, errors: dict[Provider, str], *, system: str) -> str:
    """What stands between a present device and work, with the way out; `errors` of the providers that were tried."""
    if device.obstacle:
        return device.obstacle
    wanted = [provider for provider in candidates(device) if system == "Windows" or provider is not Provider.DIRECTML]
    if not wanted:
        return _undriven(device)
    if len(runtime.builds) > 1:
        return (
            f"{' and '.join(runtime.builds)} are installed over one another: "
            f"pip uninstall -y {' '.join(runtime.builds)} && {_install(wanted[0])}"
        )
    if runtime.error:
        if not runtime.builds:
            return f"no runtime is installed: {_install(wanted[0])}"
        return f"the runtime {runtime.name} cannot be imported: {runtime.error}"
    for provider, error in errors.items():
        return _does_not_run(device, provider, error, runtime)
    remedy = _REMEDIES[wanted[0]]
    removal = f"pip uninstall -y {' '.join(runtime.builds)} && " if remedy.replaces and runtime.builds else ""
    too_old = _driver_is_old(device) if wanted[0] is Provider.CUDA else ""
    build = "CPU runtime" if runtime.builds == ("onnxruntime",) else f"runtime {runtime.name or 'none'}"
    return f"{device.kind.value.upper()} present, {build} installed: {removal}{_install(wanted[0])}{too_old}"


def _install(provider: Provider) -> str:
    remedy = _REMEDIES[provider]
    also = f" {remedy.also}" if remedy.also else ""
    return f"pip install 'fallow[{remedy.extra}]' ({remedy.size}){also}"


def _does_not_run(device: Device, provider: Provider, error: str, runtime: Runtime) -> str:
    package = _DRIVER_PACKAGES.get((device.kind, device.vendor))
    if provider is Provider.CUDA and (old := _driver_is_old(device)):
        return f"{provider.value} of {runtime.name} does not run here{old}"
    advice = f"; install {package}" if package else ""
    return f"{provider.value} of {runtime.name} does not run here: {error[:160]}{advice}"


def _driver_is_old(device: Device) -> str:
    major = device.driver_version.partition(".")[0]
    if major.isdigit() and int(major) < CUDA_DRIVER_LEAST:
        return f"; it needs driver {CUDA_DRIVER_LEAST} or newer, this is {device.driver_version}"
    return ""


def _undriven(device: Device) -> str:
    if device.kind is DeviceKind.NPU and device.vendor == "AMD":
        return "AMD's NPU needs the VitisAI provider of AMD's Ryzen AI software, which Fallow does not drive yet"
    return f"no provider that Fallow drives knows a {device.kind.value.upper()} of {device.vendor or 'this vendor'}"
