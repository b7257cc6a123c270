"""Looks at the installed ONNX Runtime, or tries one provider with a one-operator model; writes one line of JSON.

Started by its path, alone, because it imports the runtime and loads drivers: what hangs or crashes there hangs or
crashes here. Stands by itself: the standard library, NumPy and the runtime.
"""

from __future__ import annotations

import base64
import importlib
import importlib.metadata
import json
import re
import sys
import warnings
from collections.abc import Callable
from typing import Any

MODEL = base64.b64decode(
    "CAgSADqCAQoRCgF4CgF3EgF5IgZNYXRNdWwSBnVzYWJsZSo7CAQIAxABQgF3SjAAAIA/AAAAQAAAQEAAAIDAAAAAPwAAAD8AAAAAAACAPwAAAM"
    "AAAIA+AACAvwAAgEBaEwoBeBIOCgwIARIICgIIAgoCCARiEwoBeRIOCgwIARIICgIIAgoCCANCBAoAEA0="
)
"""x float32[2, 4] → MatMul with w float32[4, 3] → y float32[2, 3]."""
ROWS = [[1.0, 2.0, 3.0, 4.0], [-1.0, 0.5, 8.0, -2.0]]
WEIGHTS = [[1.0, 2.0, 3.0], [-4.0, 0.5, 0.5], [0.0, 1.0, -2.0], [0.25, -1.0, 4.0]]
"""Few bits each, so that fp32, tf32 and fp16 give the very same sums and a wrong one is a fault, not a rounding."""
PACKAGES = re.compile(r"onnxruntime([-_].+)?|openvino|windowsml|coremltools")
PLUGINS = {"QNNExecutionProvider": "onnxruntime_qnn"}
"""Providers that come as a library of their own beside the runtime, and the module that knows where it lies."""


def main() -> None:
    """Answers the question in the first argument."""
    question = json.loads(sys.argv[1])
    sys.path += [path for path in question["search_paths"] if path not in sys.path]
    warnings.simplefilter("ignore")
    answer = _tried(question) if "provider" in question else _installed()
    print(json.dumps(answer), flush=True)  # noqa: T201 - this is the answer


def _installed() -> dict[str, Any]:
    packages = {
        name.lower().replace("_", "-"): distribution.version
        for distribution in importlib.metadata.distributions()
        if (name := distribution.metadata["Name"] or "") and PACKAGES.fullmatch(name)
    }
    try:
        ort = _runtime()
        providers = list(ort.get_available_providers())
    except Exception as error:  # a wheel for another machine, missing libraries, two wheels over one another …
        return {"packages": packages, "error": _told(error)}
    providers += [provider for provider, module in PLUGINS.items() if _plugin(module)]
    devices = _devices(ort) if hasattr(ort, "get_ep_devices") else []
    cpu = _tried({"provider": "CPUExecutionProvider", "options": {}, "session_entries": {}})
    return {
        "packages": packages,
        "version": ort.__version__,
        "providers": providers,
        "devices": devices,
        "cpu_error": cpu["error"],
    }


def _devices(ort: Any) -> list[dict[str, Any]]:
    """What the runtime itself sees: the one portable list on Windows."""
    seen: list[dict[str, Any]] = []
    for found in ort.get_ep_devices():
        device = found.device
        seen.append(
            {
                "provider": str(found.ep_name),
                "kind": str(device.type).rpartition(".")[2].lower(),
                "vendor": str(device.vendor),
                "vendor_id": int(device.vendor_id),
                "device_id": int(device.device_id),
                "metadata": {str(key): str(value) for key, value in dict(device.metadata).items()},
            }
        )
    return seen


def _tried(question: dict[str, Any]) -> dict[str, Any]:
    """Whether the model runs on the provider and gives the right sums; `error` is empty when it does."""
    provider = str(question["provider"])
    try:
        ort = _runtime()
        numpy: Any = importlib.import_module("numpy")
        if provider == "CUDAExecutionProvider" and hasattr(ort, "preload_dlls"):
            ort.preload_dlls()
        session = _session(ort, provider, question)
        if provider not in session.get_providers():
            return {"error": f"the runtime left {provider} out"}
        (sums,) = session.run(None, {"x": numpy.array(ROWS, numpy.float32)})
        if not numpy.array_equal(sums, numpy.array(ROWS, numpy.float32) @ numpy.array(WEIGHTS, numpy.float32)):
            return {"error": f"wrong sums: {sums.tolist()}"}
    except Exception as error:  # whatever a driver or a runtime raises is the answer
        return {"error": _told(error)}
    return {"error": "", "version": ort.__version__}


def _session(ort: Any, provider: str, question: dict[str, Any]) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    if provider == "DmlExecutionProvider":
        options.enable_mem_pattern = False
    for name, value in question["session_entries"].items():
        options.add_session_config_entry(name, value)
    if provider not in PLUGINS:
        return ort.InferenceSession(MODEL, sess_options=options, providers=[(provider, question["options"])])
    library = _plugin(PLUGINS[provider])
    if library is None:
        raise RuntimeError(f"{PLUGINS[provider]} is not installed")
    ort.register_execution_provider_library(provider, library())
    devices = [found for found in ort.get_ep_devices() if found.ep_name == provider]
    if not devices:
        raise RuntimeError(f"{provider} sees no device")
    options.add_provider_for_devices(devices, question["options"])
    return ort.InferenceSession(MODEL, sess_options=options)


def _runtime() -> Any:
    ort: Any = importlib.import_module("onnxruntime")
    ort.disable_telemetry_events()
    ort.set_default_logger_severity(4)
    return ort


def _plugin(module: str) -> Callable[[], str] | None:
    """The function that says where a plugin's library lies, when the plugin is installed."""
    try:
        return getattr(importlib.import_module(module), "get_library_path", None)
    except Exception:  # a plugin that cannot even be imported is none
        return None


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


if __name__ == "__main__":
    main()
