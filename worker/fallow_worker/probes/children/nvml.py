"""Asks NVIDIA's management library about its GPUs and writes one line of JSON. Started by its path, alone.

Stands by itself: the standard library and nvidia-ml-py, when that is installed. What hangs or crashes in a driver hangs
or crashes here.
"""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any


def main() -> None:
    """Answers the question in the first argument."""
    question = json.loads(sys.argv[1])
    sys.path += [path for path in question["search_paths"] if path not in sys.path]
    print(json.dumps(_answer(energy=bool(question.get("energy")))), flush=True)  # noqa: T201 - this is the answer


def _answer(*, energy: bool) -> dict[str, Any]:
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return {"error": "not-installed"}
    try:
        nvml.nvmlInit()
        driver = _text(nvml.nvmlSystemGetDriverVersion())
        count = int(nvml.nvmlDeviceGetCount())
    except nvml.NVMLError as error:
        return {"error": str(error)}
    gpus: list[dict[str, Any]] = []
    trouble = ""
    if energy:
        return {"energies": [_energy(nvml, index) for index in range(count)], "trouble": ""}
    for index in range(count):
        try:
            gpus.append({**_gpu(nvml, nvml.nvmlDeviceGetHandleByIndex(index)), "driver": driver})
        except nvml.NVMLError as error:
            # A GPU that fell off the bus does not take the others with it.
            trouble = f"broken: {error}; restart the machine"
    return {"gpus": gpus, "trouble": trouble}


def _gpu(nvml: Any, handle: Any) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "address": _text(nvml.nvmlDeviceGetPciInfo(handle).busId),
        "name": _text(nvml.nvmlDeviceGetName(handle)),
        "uuid": _text(nvml.nvmlDeviceGetUUID(handle)),
        "memory_bytes": int(nvml.nvmlDeviceGetMemoryInfo(handle).total),
    }
    try:
        major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
        facts["capability"] = f"{major}.{minor}"
    except nvml.NVMLError:
        pass
    try:
        if nvml.nvmlDeviceGetMigMode(handle)[0]:
            facts["obstacle"] = "cut into MIG instances, which Fallow does not drive: `sudo nvidia-smi -mig 0`"
    except nvml.NVMLError:
        pass  # most GPUs cannot be cut
    return facts


def _energy(nvml: Any, index: int) -> dict[str, Any]:
    """What a GPU has spent since its driver was loaded, or spends now; neither from one that tells neither."""
    facts: dict[str, Any] = {}
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        facts["address"] = _text(nvml.nvmlDeviceGetPciInfo(handle).busId)
        facts["milliwatts"] = int(nvml.nvmlDeviceGetPowerUsage(handle))
        facts["millijoules"] = int(nvml.nvmlDeviceGetTotalEnergyConsumption(handle))
    except nvml.NVMLError:
        pass  # GPUs before Volta count no energy, some laptops' tell nothing
    return facts


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


if __name__ == "__main__":
    main()
