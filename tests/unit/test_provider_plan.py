"""Which provider may run a program on a device: one pure function, checked over every combination."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fallow.bundle import Precision, ProgramFormat
from fallow.session import Device, DeviceKind, DeviceLevel
from fallow_worker.core.providers import NO_FALLBACK, ProgramNeeds, Provider, candidates, obeys, provider_plan

ALL = frozenset(provider.value for provider in Provider)
VNNI = "x86-64-v3+avx_vnni"


def device(kind: DeviceKind, vendor: str = "", *, architecture: str = "", memory_bytes: int = 0) -> Device:
    return Device("d", kind, DeviceLevel.PRESENT, vendor=vendor, architecture=architecture, memory_bytes=memory_bytes)


CPU = device(DeviceKind.CPU, "GenuineIntel", architecture=VNNI)
ADA = device(DeviceKind.GPU, "NVIDIA", architecture="sm_89", memory_bytes=24 << 30)
TURING = device(DeviceKind.GPU, "NVIDIA", architecture="sm_75")

devices = st.builds(
    device,
    st.sampled_from(DeviceKind),
    st.sampled_from(["NVIDIA", "AMD", "Intel", "Apple", "Qualcomm", "GenuineIntel", "", "unheard of"]),
    architecture=st.sampled_from(["", VNNI, "x86-64-v3", "sm_75", "sm_89", "sm_", "gfx1100", "aarch64+asimddp"]),
    memory_bytes=st.sampled_from([0, 1 << 30, 1 << 40]),
)
needs = st.builds(
    ProgramNeeds,
    st.sampled_from(Precision),
    format=st.sampled_from(ProgramFormat),
    fixed_shapes=st.booleans(),
    seven_bit_weights=st.booleans(),
    memory_bytes=st.sampled_from([0, 1, 1 << 35]),
)
runtimes = st.frozensets(st.sampled_from([*sorted(ALL), "AzureExecutionProvider", "TensorrtExecutionProvider"]))


@given(devices, needs, runtimes, st.integers(0, 7))
def test_no_choice_computes_more_coarsely_than_declared(
    on: Device, asked: ProgramNeeds, installed: frozenset[str], ordinal: int
) -> None:
    for choice in provider_plan(on, asked, installed, ordinal=ordinal).choices:
        assert obeys(choice, asked.precision)
        options = dict(choice.options)
        if asked.precision is Precision.FP32:
            assert choice.computes is Precision.FP32
            assert options.get("use_tf32", "0") == "0"
            assert options.get("migraphx_fp16_enable", "0") == "0"
            assert options.get("precision", "FP32") == "FP32"
            assert options.get("disable_metacommands", "true") == "true"


@given(devices, needs, runtimes)
def test_only_installed_providers_that_know_the_device_are_chosen(
    on: Device, asked: ProgramNeeds, installed: frozenset[str]
) -> None:
    plan = provider_plan(on, asked, installed)
    chosen = [choice.provider for choice in plan.choices]
    assert {provider.value for provider in chosen} <= installed
    known = candidates(on)
    assert [provider for provider in known if provider in chosen] == chosen, "best first"
    refused = {refusal.provider for refusal in plan.refused}
    assert refused == {None} or refused | set(chosen) == set(known), "each candidate is chosen or refused"
    assert bool(plan.choices) != bool(plan.why_not)


@given(devices, needs, runtimes)
def test_no_accelerator_falls_back_to_the_processor_in_silence(
    on: Device, asked: ProgramNeeds, installed: frozenset[str]
) -> None:
    for choice in provider_plan(on, asked, installed).choices:
        assert (choice.provider is Provider.CPU) == (on.kind is DeviceKind.CPU)
        assert (NO_FALLBACK in choice.session_entries) == (on.kind is not DeviceKind.CPU)


@given(devices, needs, runtimes)
def test_npus_get_fixed_shapes_in_fp16_or_int8_alone(
    on: Device, asked: ProgramNeeds, installed: frozenset[str]
) -> None:
    if on.kind is DeviceKind.NPU and provider_plan(on, asked, installed).choices:
        assert asked.fixed_shapes
        assert asked.precision in {Precision.FP16, Precision.INT8}


@given(runtimes, st.booleans(), st.sampled_from([VNNI, "x86-64-v1", "aarch64", ""]))
def test_the_processor_runs_every_fp32_program(installed: frozenset[str], fixed: bool, architecture: str) -> None:
    on = device(DeviceKind.CPU, architecture=architecture)
    plan = provider_plan(on, ProgramNeeds(Precision.FP32, fixed_shapes=fixed), installed | {Provider.CPU.value})
    assert [choice.provider for choice in plan.choices] == [Provider.CPU]


@given(devices, needs, st.lists(st.sampled_from(sorted(ALL))))
def test_the_order_in_which_runtimes_are_listed_does_not_matter(
    on: Device, asked: ProgramNeeds, installed: list[str]
) -> None:
    backwards = frozenset(reversed(installed))
    assert provider_plan(on, asked, frozenset(installed)) == provider_plan(on, asked, backwards)


@given(devices, needs, runtimes)
def test_a_finer_declaration_never_opens_a_provider(on: Device, asked: ProgramNeeds, installed: frozenset[str]) -> None:
    fp16 = ProgramNeeds(Precision.FP16, asked.format, asked.fixed_shapes, asked.seven_bit_weights, asked.memory_bytes)
    fp32 = ProgramNeeds(Precision.FP32, asked.format, asked.fixed_shapes, asked.seven_bit_weights, asked.memory_bytes)
    loose = {choice.provider for choice in provider_plan(on, fp16, installed).choices}
    strict = {choice.provider for choice in provider_plan(on, fp32, installed).choices}
    assert strict <= loose


@pytest.mark.parametrize(
    ("on", "precision", "flag"),
    [
        (ADA, Precision.FP32, "0"),
        (ADA, Precision.TF32, "1"),
        (TURING, Precision.TF32, "0"),
        (ADA, Precision.FP16, "0"),
        (ADA, Precision.INT8, "0"),
    ],
)
def test_tf32_is_off_unless_declared_and_there(on: Device, precision: Precision, flag: str) -> None:
    (choice,) = provider_plan(on, ProgramNeeds(precision), frozenset({Provider.CUDA.value}), ordinal=3).choices
    assert dict(choice.options) == {"device_id": "3", "use_tf32": flag}


def test_intels_gpu_is_kept_from_its_own_fp16() -> None:
    gpu = device(DeviceKind.GPU, "Intel")
    (choice,) = provider_plan(gpu, ProgramNeeds(Precision.FP32), frozenset({Provider.OPENVINO.value})).choices
    assert dict(choice.options) == {"device_type": "GPU.0", "precision": "FP32"}


def test_a_cpu_that_saturates_refuses_8_bit_weights_and_takes_7_bit_ones() -> None:
    old = device(DeviceKind.CPU, architecture="x86-64-v3")
    refused = provider_plan(old, ProgramNeeds(Precision.INT8), ALL)
    assert refused.choices == () and "7-bit weights" in refused.why_not
    assert provider_plan(old, ProgramNeeds(Precision.INT8, seven_bit_weights=True), ALL).choices
    assert provider_plan(CPU, ProgramNeeds(Precision.INT8), ALL).choices


@pytest.mark.parametrize(
    ("on", "asked", "words"),
    [
        (ADA, ProgramNeeds(Precision.FP32, memory_bytes=25 << 30), "the device has"),
        (CPU, ProgramNeeds(Precision.FP32, ProgramFormat.STABLEHLO), "stablehlo"),
        (device(DeviceKind.NPU, "AMD"), ProgramNeeds(Precision.INT8, fixed_shapes=True), "npu of AMD"),
        (device(DeviceKind.NPU, "Intel"), ProgramNeeds(Precision.FP32, fixed_shapes=True), "declares fp32"),
        (device(DeviceKind.NPU, "Apple"), ProgramNeeds(Precision.INT8), "fixed shapes"),
        (device(DeviceKind.GPU, "Matrox"), ProgramNeeds(Precision.FP32), "gpu of Matrox"),
    ],
)
def test_what_is_infeasible_says_why(on: Device, asked: ProgramNeeds, words: str) -> None:
    plan = provider_plan(on, asked, ALL)
    assert plan.choices == ()
    assert words in plan.why_not


def test_the_same_gpu_has_another_provider_where_the_first_is_not_installed() -> None:
    plan = provider_plan(ADA, ProgramNeeds(Precision.FP32), frozenset({Provider.DIRECTML.value}))
    assert [choice.provider for choice in plan.choices] == [Provider.DIRECTML]
    assert plan.refused[0].provider is Provider.CUDA
