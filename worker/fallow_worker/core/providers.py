"""Which providers may run a program on a device, in which order and with which options; or why none may.

One decision for all vendors: `provider_plan`. The declared precision is the coarsest arithmetic that the submitter
accepts: a provider may always compute more finely (a CPU runs an fp16 program in fp32), never more coarsely. What a
provider does by default does not count, only what its options make sure of:

===========  ====================  =============================================================================
provider     finest, on what       how it is held to it
===========  ====================  =============================================================================
CPU          fp32                  it knows nothing else
CUDA         fp32                  `use_tf32` off unless tf32 or coarser is declared and the GPU has it (sm_80)
MIGraphX     fp32                  `migraphx_fp16_enable` only when fp16 is declared; never its own quantisation
OpenVINO     fp32 GPU, fp16 NPU    `precision` named: a GPU would take fp16 by itself
CoreML       fp32 GPU, fp16 NPU    ML programs keep their types; the Neural Engine knows fp16 only
DirectML     fp32                  metacommands off (vendors' own kernels) unless fp16 is declared
QNN          fp16 NPU              `enable_htp_fp16_precision` for float parts
===========  ====================  =============================================================================

An int8 program carries its quantisation in its graph; the declaration lets the float parts around it be fp16.
Accelerators run with the silent fallback to the CPU forbidden, so a plan never means another device than it names.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from fallow.bundle import Precision, ProgramFormat
from fallow.session import Device, DeviceKind


class Provider(StrEnum):
    """Execution providers of ONNX Runtime, by the names it gives them."""

    CUDA = "CUDAExecutionProvider"
    MIGRAPHX = "MIGraphXExecutionProvider"
    OPENVINO = "OpenVINOExecutionProvider"
    COREML = "CoreMLExecutionProvider"
    QNN = "QNNExecutionProvider"
    DIRECTML = "DmlExecutionProvider"
    CPU = "CPUExecutionProvider"


NO_FALLBACK: Final = ("session.disable_cpu_ep_fallback", "1")
"""A session entry: nodes that the provider does not take are an error, not a slow surprise on the CPU."""

_FINENESS: Final = {Precision.FP32: 3, Precision.TF32: 2, Precision.FP16: 1, Precision.INT8: 1}
"""How fine the float arithmetic of each declaration must at least be."""

_CANDIDATES: Final[dict[tuple[DeviceKind, str], tuple[Provider, ...]]] = {
    (DeviceKind.GPU, "NVIDIA"): (Provider.CUDA, Provider.DIRECTML),
    (DeviceKind.GPU, "AMD"): (Provider.MIGRAPHX, Provider.DIRECTML),
    (DeviceKind.GPU, "Intel"): (Provider.OPENVINO, Provider.DIRECTML),
    (DeviceKind.GPU, "Qualcomm"): (Provider.DIRECTML,),
    (DeviceKind.GPU, "Apple"): (Provider.COREML,),
    (DeviceKind.NPU, "Apple"): (Provider.COREML,),
    (DeviceKind.NPU, "Intel"): (Provider.OPENVINO,),
    (DeviceKind.NPU, "Qualcomm"): (Provider.QNN,),
}
"""By kind and vendor, best first. AMD's NPU needs the VitisAI provider, which is not driven yet."""

_INT8_DOT_PRODUCTS: Final = frozenset({"avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"})
"""CPU features without which sums of int8 products saturate in 16 bits and go wrong unless weights keep to 7 bits."""
_TF32_SINCE: Final = 80
"""Compute capability sm_80."""


@dataclass(frozen=True, slots=True)
class ProgramNeeds:
    """What a program asks of a provider."""

    precision: Precision
    format: ProgramFormat = ProgramFormat.ONNX
    fixed_shapes: bool = False
    """Every dimension of every input is a number: a compiled form for one batch and bucket."""
    seven_bit_weights: bool = False
    """An int8 program whose weights keep to 7 bits, right on every CPU."""
    memory_bytes: int = 0
    """What it takes on the device; 0: nobody knows."""


@dataclass(frozen=True, slots=True)
class ProviderChoice:
    """A provider with the options that hold it to the declared precision on this very device."""

    provider: Provider
    options: tuple[tuple[str, str], ...] = ()
    """Provider options, sorted by name."""
    session_entries: tuple[tuple[str, str], ...] = ()
    computes: Precision = Precision.FP32
    """The coarsest float arithmetic that these options allow."""


@dataclass(frozen=True, slots=True)
class WhyNot:
    """Why a provider, or the device as a whole (None), is out."""

    provider: Provider | None
    reason: str


@dataclass(frozen=True, slots=True)
class ProviderPlan:
    """What to try, best first, and what is out. Nothing to try: the device is infeasible for the program."""

    choices: tuple[ProviderChoice, ...]
    refused: tuple[WhyNot, ...] = ()

    @property
    def why_not(self) -> str:
        """In one line why there is no choice; empty when there is one."""
        return "" if self.choices else "; ".join(refusal.reason for refusal in self.refused)


def provider_plan(device: Device, needs: ProgramNeeds, installed: Set[str], *, ordinal: int = 0) -> ProviderPlan:
    """The providers among `installed` (their names) that may run a program with these needs on `device`.

    `ordinal` counts the devices of the same kind and vendor before this one, in the order of their bus addresses:
    providers know devices by number.
    """
    out = _device_is_out(device, needs)
    if out:
        return ProviderPlan((), (WhyNot(None, out),))
    choices: list[ProviderChoice] = []
    refused: list[WhyNot] = []
    for provider in candidates(device):
        found = _judged(provider, device, needs, installed, ordinal)
        if isinstance(found, ProviderChoice):
            choices.append(found)
        else:
            refused.append(found)
    return ProviderPlan(tuple(choices), tuple(refused))


def candidates(device: Device) -> tuple[Provider, ...]:
    """The providers that know devices of this kind and vendor, best first."""
    if device.kind is DeviceKind.CPU:
        return (Provider.CPU,)
    return _CANDIDATES.get((device.kind, device.vendor), ())


def _device_is_out(device: Device, needs: ProgramNeeds) -> str:
    if needs.format is not ProgramFormat.ONNX:
        return f"no provider here runs {needs.format.value} programs"
    if not candidates(device):
        return f"no provider that Fallow drives knows a {device.kind.value} of {device.vendor or 'this vendor'}"
    if needs.memory_bytes > device.memory_bytes > 0:
        return f"the program takes {needs.memory_bytes} bytes, the device has {device.memory_bytes}"
    return ""


def _judged(
    provider: Provider, device: Device, needs: ProgramNeeds, installed: Set[str], ordinal: int
) -> ProviderChoice | WhyNot:
    if provider.value not in installed:
        return WhyNot(provider, f"{provider.value} is not in the installed runtime")
    match provider:
        case Provider.CPU:
            return _on_cpu(device, needs)
        case Provider.CUDA:
            return _on_cuda(device, needs, ordinal)
        case Provider.MIGRAPHX:
            half = needs.precision is Precision.FP16
            options = {"device_id": str(ordinal), "migraphx_fp16_enable": _flag(half), "migraphx_int8_enable": "0"}
            return _choice(provider, options, Precision.FP16 if half else Precision.FP32)
        case Provider.OPENVINO:
            return _on_openvino(device, needs, ordinal)
        case Provider.COREML:
            return _on_coreml(device, needs)
        case Provider.DIRECTML:
            half = needs.precision is Precision.FP16
            options = {"device_id": str(ordinal), "disable_metacommands": "false" if half else "true"}
            return _choice(provider, options, Precision.FP16 if half else Precision.FP32)
        case Provider.QNN:
            if refusal := _npu_refusal(provider, needs):
                return refusal
            return _choice(provider, {"backend_type": "htp", "enable_htp_fp16_precision": "1"}, Precision.FP16)


def _on_cpu(device: Device, needs: ProgramNeeds) -> ProviderChoice | WhyNot:
    if needs.precision is Precision.INT8 and not needs.seven_bit_weights:
        features = frozenset(device.architecture.split("+"))
        if not features & _INT8_DOT_PRODUCTS:
            return WhyNot(
                Provider.CPU, "this CPU saturates int8 sums (no VNNI or dot products): the program needs 7-bit weights"
            )
    return ProviderChoice(Provider.CPU)


def _on_cuda(device: Device, needs: ProgramNeeds, ordinal: int) -> ProviderChoice:
    level = device.architecture.removeprefix("sm_")
    coarse = needs.precision is Precision.TF32 and level.isdigit() and int(level) >= _TF32_SINCE
    options = {"device_id": str(ordinal), "use_tf32": _flag(coarse)}
    return _choice(Provider.CUDA, options, Precision.TF32 if coarse else Precision.FP32)


def _on_openvino(device: Device, needs: ProgramNeeds, ordinal: int) -> ProviderChoice | WhyNot:
    if device.kind is DeviceKind.NPU:
        if refusal := _npu_refusal(Provider.OPENVINO, needs):
            return refusal
        options = {"device_type": "NPU", "precision": "FP16", "disable_dynamic_shapes": "true"}
        return _choice(Provider.OPENVINO, options, Precision.FP16)
    half = needs.precision is Precision.FP16
    options = {"device_type": f"GPU.{ordinal}", "precision": "FP16" if half else "FP32"}
    return _choice(Provider.OPENVINO, options, Precision.FP16 if half else Precision.FP32)


def _on_coreml(device: Device, needs: ProgramNeeds) -> ProviderChoice | WhyNot:
    options = {"ModelFormat": "MLProgram", "AllowLowPrecisionAccumulationOnGPU": "0"}
    if device.kind is DeviceKind.NPU:
        if refusal := _npu_refusal(Provider.COREML, needs):
            return refusal
        options |= {"MLComputeUnits": "CPUAndNeuralEngine", "RequireStaticInputShapes": "1"}
        return _choice(Provider.COREML, options, Precision.FP16)
    return _choice(Provider.COREML, options | {"MLComputeUnits": "CPUAndGPU"}, Precision.FP32)


def _npu_refusal(provider: Provider, needs: ProgramNeeds) -> WhyNot | None:
    """NPUs compute in fp16 or int8 and take compiled shapes alone."""
    if _FINENESS[needs.precision] > _FINENESS[Precision.FP16]:
        return WhyNot(provider, f"the NPU computes in fp16 or int8, the program declares {needs.precision.value}")
    if not needs.fixed_shapes:
        return WhyNot(provider, "the NPU takes programs of fixed shapes alone")
    return None


def obeys(choice: ProviderChoice, declared: Precision) -> bool:
    """Whether a choice computes at least as finely as declared."""
    return _FINENESS[choice.computes] >= _FINENESS[declared]


def _choice(provider: Provider, options: dict[str, str], computes: Precision) -> ProviderChoice:
    return ProviderChoice(provider, tuple(sorted(options.items())), (NO_FALLBACK,), computes)


def _flag(value: bool) -> str:
    return "1" if value else "0"
