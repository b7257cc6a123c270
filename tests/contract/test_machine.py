"""What every `Machine` keeps: nothing raises, nothing waits longer than its deadline. The real one and the recorded."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fallow.session import DeviceLevel
from fallow_worker.probes.machine import FILE_BYTES_MAX, HERE, LocalMachine, Machine
from fallow_worker.probes.nvidia import nvidia_gpus
from fallow_worker.probes.pci import pci_devices
from fallow_worker.probes.runtimes import installed_runtime, trial_error
from fallow_worker.probes.survey import survey
from recorded_machine import RecordedMachine

FILES = {
    "/sys/devices/pci0/vendor": "0x8086",
    "/sys/devices/pci0/empty": "",
    "/proc/self/cgroup": "0::/",
}
LINKS = {
    "/sys/bus/devices/0": "/sys/devices/pci0",
    "/sys/devices/pci0/driver": "/sys/drivers/intel_vpu",
}


def recorded(folder: Path) -> Machine:
    return RecordedMachine(files=dict(FILES), links=dict(LINKS))


def local(folder: Path) -> Machine:
    (folder / "sys/drivers/intel_vpu").mkdir(parents=True)
    for path, text in FILES.items():
        place = folder / path.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text + "\n" if text else "")
    for path, target in LINKS.items():
        place = folder / path.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(os.path.relpath(folder / target.lstrip("/"), place.parent))
    return LocalMachine(str(folder))


@pytest.fixture(params=[recorded, local])
def machine(request: pytest.FixtureRequest, tmp_path: Path) -> Machine:
    make: Callable[[Path], Machine] = request.param
    return make(tmp_path)


def test_files_are_read_through_links_without_their_last_line_feed(machine: Machine) -> None:
    assert machine.read("/sys/devices/pci0/vendor") == "0x8086"
    assert machine.read("/sys/bus/devices/0/vendor") == "0x8086"
    assert machine.read("/sys/devices/pci0/empty") == ""


def test_what_is_not_there_is_none_and_no_error(machine: Machine) -> None:
    assert machine.read("/sys/none") is None
    assert machine.read("/sys/devices/pci0") is None, "a folder is no file"
    assert machine.names("/none") == ()
    assert machine.names("/proc/self/cgroup") == ()
    assert machine.target("/none/at/all") is None


def test_names_are_sorted_and_targets_real(machine: Machine) -> None:
    assert machine.names("/sys/bus/devices/0") == ("driver", "empty", "vendor")
    assert machine.target("/sys/bus/devices/0/driver") == "/sys/drivers/intel_vpu"
    assert machine.target("/sys/bus/devices/0") == "/sys/devices/pci0"


def test_a_command_that_is_not_installed_is_a_failure_in_words(machine: Machine) -> None:
    ran = machine.run(("no-such-command-anywhere",), deadline_s=5)
    assert ran.status != 0
    assert "no-such-command-anywhere: No such file or directory" in ran.failure


def test_an_unknown_child_is_a_failure_in_words(machine: Machine) -> None:
    answer = machine.ask("no-such-child", {}, deadline_s=20)
    assert answer.failure and not answer.facts


# ------------------------------------------------------------------------------------------------- the real one


def test_an_endless_file_is_read_up_to_its_limit(tmp_path: Path) -> None:
    (tmp_path / "long").write_bytes(b"x" * (FILE_BYTES_MAX + 10))
    text = LocalMachine(str(tmp_path)).read("/long")
    assert text is not None and len(text) == FILE_BYTES_MAX


@pytest.mark.processes
def test_a_command_that_hangs_ends_at_its_deadline_with_its_children() -> None:
    started = time.monotonic()
    hang = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"
    ran = HERE.run((sys.executable, "-c", hang), deadline_s=0.5)
    assert ran.failure == "no answer within 0.5 s"
    assert time.monotonic() - started < 10


@pytest.mark.processes
def test_a_command_that_fails_says_what_it_said() -> None:
    ran = HERE.run((sys.executable, "-c", "import sys; print('half'); sys.exit('broken thing')"), deadline_s=30)
    assert (ran.status, ran.output, ran.failure) == (1, "half\n", "broken thing")


PYNVML = {
    "mismatch": "def nvmlInit(): raise NVMLError('Driver/library version mismatch')",
    "hangs": "import time\ndef nvmlInit(): time.sleep(600)",
    "crashes": "import os\ndef nvmlInit(): os.abort()",
    "chatty": "def nvmlInit(): raise SystemExit(0)",
    "works": """
class Pci: busId = b'00000000:01:00.0'
class Memory: total = 8 << 30
def nvmlInit(): print('hello from a driver')
def nvmlSystemGetDriverVersion(): return b'580.1'
def nvmlDeviceGetCount(): return 2
def nvmlDeviceGetHandleByIndex(index):
    if index: raise NVMLError('GPU is lost')
    return index
def nvmlDeviceGetPciInfo(handle): return Pci
def nvmlDeviceGetName(handle): return 'Tesla T4'
def nvmlDeviceGetUUID(handle): return 'GPU-1'
def nvmlDeviceGetMemoryInfo(handle): return Memory
def nvmlDeviceGetCudaComputeCapability(handle): return (7, 5)
def nvmlDeviceGetMigMode(handle): raise NVMLError('Not Supported')
""",
}


class _WithRealChildren(RecordedMachine):
    """Two NVIDIA GPUs on a recorded bus; children really run here."""

    def ask(self, child, question, *, deadline_s):  # type: ignore[no-untyped-def]
        return HERE.ask(child, question, deadline_s=min(deadline_s, 2.0))


@pytest.mark.processes
@pytest.mark.parametrize(
    ("driver", "obstacles"),
    [
        ("mismatch", ["broken: the driver in the kernel"] * 2),
        ("hangs", ["broken: NVIDIA's management library gave no answer within 2 s"] * 2),
        ("crashes", ["broken: NVIDIA's management library gave a crash with SIGABRT"] * 2),
        ("chatty", ["broken: NVIDIA's management library gave the probe's child said nothing"] * 2),
        ("works", ["", "broken: GPU is lost; restart the machine"]),
    ],
)
def test_a_broken_driver_stalls_nothing_and_is_told(
    driver: str, obstacles: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pynvml.py").write_text("class NVMLError(Exception): pass\n" + PYNVML[driver])
    monkeypatch.syspath_prepend(str(tmp_path))
    cuda = RecordedMachine.named("nvidia_cuda")
    started = time.monotonic()
    machine = _WithRealChildren(files=cuda.files, links=cuda.links)
    gpus = nvidia_gpus(machine, pci_devices(machine))
    assert time.monotonic() - started < 10
    assert len(gpus) == 2
    for gpu, obstacle in zip(gpus, obstacles, strict=True):
        assert gpu.obstacle.startswith(obstacle) and bool(gpu.obstacle) == bool(obstacle)
    if driver == "works":
        assert (gpus[0].model, gpus[0].architecture, gpus[0].memory_bytes) == ("Tesla T4", "sm_75", 8 << 30)


@pytest.mark.processes
def test_the_installed_runtime_really_runs_its_operator_on_the_processor() -> None:
    runtime = installed_runtime(HERE)
    assert not runtime.error and not runtime.cpu_error
    assert "CPUExecutionProvider" in runtime.providers
    assert runtime.builds and runtime.version in runtime.name
    assert survey(HERE).devices[0].level is DeviceLevel.USABLE


@pytest.mark.processes
def test_a_provider_that_is_not_there_does_not_pass_for_the_processor() -> None:
    from fallow_worker.core.providers import NO_FALLBACK, Provider, ProviderChoice

    runtime = installed_runtime(HERE)
    if Provider.CUDA.value in runtime.providers:
        pytest.skip("this machine has the CUDA build")
    assert trial_error(HERE, ProviderChoice(Provider.CUDA, (("device_id", "0"),), (NO_FALLBACK,)))
    assert trial_error(HERE, ProviderChoice(Provider.CUDA, (("device_id", "0"),)))


@pytest.mark.processes
def test_a_survey_imports_no_runtime_into_its_process() -> None:
    code = (
        "import sys; from fallow_worker.probes.survey import survey; survey(); "
        "print(sorted({'numpy', 'onnxruntime', 'pynvml'} & set(sys.modules)))"
    )
    paths = os.pathsep.join(path for path in sys.path if path)
    ran = HERE.run(
        (sys.executable, "-c", f"import sys; sys.path[:0] = {paths!r}.split({os.pathsep!r}); {code}"), deadline_s=60
    )
    assert (ran.status, ran.output) == (0, "[]\n"), ran.failure
