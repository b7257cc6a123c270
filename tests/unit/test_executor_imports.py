"""What a daemon loads to run an executor stays small."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["on_processes", "on_ray"])
def test_the_daemons_side_of_an_executor_loads_no_runtime(module: str) -> None:
    script = f"import sys, fallow_worker.executor.{module}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout.split()
    assert {"ray", "numpy", "onnxruntime", "pyarrow", "onnx"}.isdisjoint(loaded)
