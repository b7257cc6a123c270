"""Every probe over recordings of machines that are not here: the code that runs on them is the code that runs here."""

from __future__ import annotations

import pytest

from fallow.limits import GIB
from fallow.session import Device, DeviceKind, DeviceLevel
from fallow_worker.executor.capability import as_offered
from fallow_worker.probe_report import report_of, report_text
from fallow_worker.probes.cpu import cores_usable, cpu_devices, instruction_set
from fallow_worker.probes.machine import HERE
from fallow_worker.probes.memory import memory_bytes_free, memory_bytes_total
from fallow_worker.probes.power import on_battery
from fallow_worker.probes.survey import present_devices, survey
from recorded_machine import FOLDER, RecordedMachine

ALL = sorted(path.stem for path in FOLDER.glob("*.json"))


def accelerators(name: str) -> list[Device]:
    return [device for device in survey(RecordedMachine.named(name)).devices if device.kind is not DeviceKind.CPU]


# ------------------------------------------------------------------------------------------------- every machine


@pytest.mark.parametrize("name", ALL)
def test_every_device_is_usable_or_says_what_stands_in_the_way(name: str) -> None:
    found = survey(RecordedMachine.named(name))
    assert found.devices[0].kind is DeviceKind.CPU
    assert len({device.device_id for device in found.devices}) == len(found.devices)
    for device in found.devices:
        assert (device.level is DeviceLevel.USABLE) == bool(device.providers)
        assert (device.level is DeviceLevel.USABLE) == (not device.obstacle)
        assert device.level is not DeviceLevel.MEASURED, "only a challenge measures"


@pytest.mark.parametrize("name", ALL)
def test_a_glance_sees_the_same_devices_and_asks_no_child(name: str) -> None:
    machine = RecordedMachine.named(name)
    seen = {device.device_id for device in present_devices(machine)}
    assert not machine.asked or (machine.system == "Darwin" and set(machine.asked) == {"sysctl"})
    surveyed = {device.device_id for device in survey(machine).devices}
    assert seen == surveyed or (machine.system == "Windows" and seen < surveyed)


@pytest.mark.parametrize("name", ALL)
def test_the_report_is_a_line_for_each_device_and_its_way_out(name: str) -> None:
    report = report_of(RecordedMachine.named(name), lock_down=False)
    text = report_text(report)
    assert text.splitlines()[0].split() == ["device", "what", "present", "usable", "measured"]
    for device in report["devices"]:
        assert device["device_id"] in text
        assert bool(device["note"]) == (not device["offered"]), "what gets no work says why"
    assert ("not used yet" in text) == (len(report["devices"]) > 1), "nobody downloads a runtime for nothing"
    assert text.count("    ! ") == sum(bool(device["note"]) for device in report["devices"])


# ------------------------------------------------------------------------------------------------- GPUs


def test_a_gpu_beside_the_cpu_runtime_is_told_what_to_install() -> None:
    (gpu,) = accelerators("nvidia_cpu_runtime")
    assert gpu.device_id == "gpu-0000:01:00.0"
    assert gpu.level is DeviceLevel.PRESENT
    assert (gpu.model, gpu.architecture, gpu.driver_version) == ("NVIDIA GeForce RTX 4090", "sm_89", "580.95.05")
    assert gpu.memory_bytes == 24564 * 1024 * 1024
    assert gpu.obstacle == (
        "GPU present, CPU runtime installed: pip uninstall -y onnxruntime && pip install 'fallow[cuda]' (1.6 GB)"
    )


def test_an_old_driver_is_told_before_gigabytes_are_downloaded() -> None:
    machine = RecordedMachine.named("nvidia_cpu_runtime")
    (smi,) = machine.commands
    machine.commands[smi]["output"] = machine.commands[smi]["output"].replace("580.95.05", "535.183.01")
    gpu = survey(machine).devices[1]
    assert gpu.obstacle.endswith("(1.6 GB); it needs driver 580 or newer, this is 535.183.01")


def test_of_two_gpus_the_one_whose_trial_crashes_is_not_usable() -> None:
    good, bad = accelerators("nvidia_cuda")
    assert good.level is DeviceLevel.USABLE and good.providers == ("CUDAExecutionProvider",)
    assert bad.level is DeviceLevel.PRESENT and "a crash with SIGSEGV" in bad.obstacle


def test_a_driver_that_does_not_match_its_libraries_is_broken_with_the_fix() -> None:
    machine = RecordedMachine.named("nvidia_broken_driver")
    gpu = survey(machine).devices[1]
    assert gpu.level is DeviceLevel.PRESENT
    assert gpu.obstacle.startswith("broken: ") and "restart the machine" in gpu.obstacle
    assert not any(asked.startswith("CUDA") for asked in machine.asked), "a broken driver is not tried"


def test_a_stuck_driver_and_the_wrong_driver_are_told_apart() -> None:
    stuck, wrong = accelerators("nvidia_stuck_driver")
    assert stuck.obstacle.startswith("broken: ") and "no answer within 5 s" in stuck.obstacle
    assert wrong.obstacle == "the driver nouveau is bound, which cannot compute: install NVIDIA's own"


def test_an_amd_gpu_with_rocm_is_usable_and_named_by_its_instruction_set() -> None:
    (gpu,) = accelerators("amd_rocm")
    assert (gpu.vendor, gpu.model, gpu.architecture) == ("AMD", "Radeon RX 7900 XTX", "gfx1100")
    assert gpu.memory_bytes == 25753026560
    assert gpu.providers == ("MIGraphXExecutionProvider",)


def test_without_dev_kfd_an_amd_gpu_needs_rocm() -> None:
    machine = RecordedMachine.named("amd_rocm")
    del machine.files["/dev/kfd"]
    assert "/dev/kfd" in survey(machine).devices[1].obstacle


# ------------------------------------------------------------------------------------------------- NPUs


def test_intels_npu_is_told_by_its_driver_link_and_needs_its_user_space_driver() -> None:
    gpu, npu = accelerators("intel_arc_npu")
    assert gpu.providers == ("OpenVINOExecutionProvider",)
    assert (npu.kind, npu.vendor, npu.device_id) == (DeviceKind.NPU, "Intel", "npu-0000:00:0b.0")
    assert npu.level is DeviceLevel.PRESENT
    assert "NPU is not registered" in npu.obstacle and "intel-driver-compiler-npu" in npu.obstacle


def test_amds_npu_shares_the_class_and_is_not_taken_for_intels() -> None:
    gpu, npu = accelerators("amd_xdna")
    assert (npu.vendor, npu.model) == ("AMD", "RyzenAI-npu4")
    assert npu.driver_version == "amdxdna 1.0.0.63"
    assert "VitisAI" in npu.obstacle
    assert "/dev/kfd" in gpu.obstacle


@pytest.mark.parametrize(("name", "driver"), [("intel_arc_npu", "intel_vpu"), ("amd_xdna", "amdxdna")])
def test_an_npu_without_its_driver_is_still_present(name: str, driver: str) -> None:
    machine = RecordedMachine.named(name)
    machine.links = {
        path: target for path, target in machine.links.items() if driver not in target and "accel" not in path
    }
    npu = survey(machine).devices[-1]
    assert npu.kind is DeviceKind.NPU
    assert f"sudo modprobe {driver}" in npu.obstacle


def test_apples_chip_has_a_gpu_and_a_neural_engine() -> None:
    machine = RecordedMachine.named("apple_m3")
    cpu, gpu, engine = survey(machine).devices
    assert cpu.architecture == "aarch64+asimddp+i8mm+bf16+fphp"
    assert cpu.vendor == "Apple" and cpu.memory_bytes == 36 * GIB
    assert gpu.model == "Apple M3 Pro GPU, 18 cores" and gpu.providers == ("CoreMLExecutionProvider",)
    assert engine.kind is DeviceKind.NPU and engine.providers == ("CoreMLExecutionProvider",)


def test_on_windows_the_runtime_lists_what_no_file_shows() -> None:
    gpu, npu = accelerators("windows_snapdragon")
    assert gpu.vendor == npu.vendor == "Qualcomm"
    assert gpu.providers == ("DmlExecutionProvider",)
    assert npu.providers == ("QNNExecutionProvider",) and "Hexagon" in npu.model


# ------------------------------------------------------------------------------------------------- the runtime


def test_two_builds_over_one_another_are_to_be_removed_first() -> None:
    machine = RecordedMachine.named("nvidia_cuda")
    machine.answers["runtime"]["packages"] = {"onnxruntime": "1.31.1", "onnxruntime-gpu": "1.31.1"}
    gpu = survey(machine).devices[1]
    assert gpu.obstacle == (
        "onnxruntime and onnxruntime-gpu are installed over one another: "
        "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'fallow[cuda]' (1.6 GB)"
    )


def test_without_any_runtime_even_the_processor_says_what_to_install() -> None:
    machine = RecordedMachine.named("headless_vm")
    machine.answers["runtime"] = {"packages": {}, "error": "ModuleNotFoundError: No module named 'onnxruntime'"}
    (cpu,) = survey(machine).devices
    assert cpu.level is DeviceLevel.PRESENT
    assert cpu.obstacle == "no runtime is installed: pip install 'fallow[cpu]' (33 MB)"


def test_a_runtime_that_crashes_on_import_leaves_everything_present() -> None:
    machine = RecordedMachine.named("intel_arc_npu")
    machine.answers["runtime"] = {"failure": "a crash with SIGILL"}
    assert {device.level for device in survey(machine).devices} == {DeviceLevel.PRESENT}


def test_a_processor_on_which_the_operator_fails_is_not_usable() -> None:
    machine = RecordedMachine.named("headless_vm")
    machine.answers["runtime"]["cpu_error"] = "wrong sums: [[0.0]]"
    (cpu,) = survey(machine).devices
    assert "wrong sums" in cpu.obstacle


def test_what_engines_do_not_drive_is_told_and_gets_no_slot() -> None:
    good, _ = accelerators("nvidia_cuda")
    offered = as_offered(good)
    assert offered.level is DeviceLevel.PRESENT
    assert "works with CUDAExecutionProvider" in offered.obstacle
    (cpu,) = survey(RecordedMachine.named("headless_vm")).devices
    assert as_offered(cpu) == cpu


# ------------------------------------------------------------------------------------------------- limits and power


@pytest.mark.parametrize(("name", "cores"), [("container_v2", 1), ("container_v1", 2)])
def test_a_container_has_what_its_control_group_gives(name: str, cores: int) -> None:
    machine = RecordedMachine.named(name)
    assert cores_usable(machine) == cores
    assert memory_bytes_total(machine) == 2 * GIB
    # 1.5 GiB are in use, and half of that is file cache that the kernel drops when asked.
    assert memory_bytes_free(machine) == GIB + GIB // 4


def test_a_limit_of_a_group_above_holds_too() -> None:
    machine = RecordedMachine.named("nvidia_cpu_runtime")
    machine.files |= {
        "/sys/fs/cgroup/user.slice/user-1000.slice/cpu.max": "max 100000",
        "/sys/fs/cgroup/user.slice/cpu.max": "400000 100000",
        "/sys/fs/cgroup/user.slice/memory.max": str(8 * GIB),
        "/sys/fs/cgroup/user.slice/memory.current": str(3 * GIB),
    }
    assert cores_usable(machine) == 4
    assert memory_bytes_free(machine) == 5 * GIB


@pytest.mark.parametrize("text", ["", "max", "max 100000", "-1 100000", "nonsense", "100000 0", "1 2 3"])
def test_odd_quotas_leave_at_least_one_core(text: str) -> None:
    machine = RecordedMachine.named("container_v2")
    machine.files["/sys/fs/cgroup/cpu.max"] = text
    assert cores_usable(machine) >= 1


def test_a_version_1_group_without_limits_has_the_whole_machine() -> None:
    machine = RecordedMachine.named("headless_vm")
    assert cores_usable(machine) == 2
    assert memory_bytes_total(machine) == 24 * GIB
    assert memory_bytes_free(machine) == 22 * GIB


@pytest.mark.parametrize(
    ("name", "battery"), [("intel_arc_npu", True), ("amd_xdna", False), ("apple_m3", True), ("headless_vm", False)]
)
def test_the_battery_counts_when_it_feeds_the_machine(name: str, battery: bool) -> None:
    assert on_battery(RecordedMachine.named(name)) is battery


def test_a_mouse_on_its_battery_is_no_laptop() -> None:
    machine = RecordedMachine.named("intel_arc_npu")
    machine.files["/sys/class/power_supply/BAT0/status"] = "Full"
    assert not on_battery(machine)


# ------------------------------------------------------------------------------------------------- here


def test_this_machine_has_a_cpu_and_memory() -> None:
    cpu = present_devices()[0]
    assert cpu.kind is DeviceKind.CPU
    assert cpu == cpu_devices(HERE)[0]
    assert cpu.cores >= 1
    assert cpu.model
    assert 0 < memory_bytes_free() <= memory_bytes_total() == cpu.memory_bytes


@pytest.mark.parametrize(
    ("machine", "flags", "name"),
    [
        ("x86_64", "sse2", "x86-64-v1"),
        ("x86_64", "cx16 lahf_lm popcnt pni sse4_1 sse4_2 ssse3", "x86-64-v2"),
        (
            "x86_64",
            "cx16 lahf_lm popcnt pni sse4_1 sse4_2 ssse3 avx avx2 bmi1 bmi2 f16c fma abm movbe xsave avx_vnni",
            "x86-64-v3+avx_vnni",
        ),
        ("x86_64", "avx avx2 avx512f", "x86-64-v1"),
        ("aarch64", "fp asimd bf16 i8mm", "aarch64+i8mm+bf16"),
        ("riscv64", "", "riscv64"),
    ],
)
def test_instruction_sets_are_named_by_level(machine: str, flags: str, name: str) -> None:
    assert instruction_set(machine, flags) == name
