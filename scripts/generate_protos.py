#!/usr/bin/env python3
"""Generates `sdk/fallow/v1` and `sdk/fallow/journal/v1` from `protos/`; with --check, only says whether they are fresh.

The generator is pinned low on purpose (the `generate` extra): generated code refuses runtimes older than itself.
"""

from __future__ import annotations

import argparse
import filecmp
import os
import sys
import tempfile
from importlib import resources
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos"
OUTPUT = ROOT / "sdk"
PACKAGES = ("fallow/v1", "fallow/journal/v1")


def generate(output: Path) -> None:
    """Writes modules and type stubs of every proto below `output`; service stubs only for `*_service.proto`."""
    from grpc_tools import protoc

    # The mypy plugin lies beside this interpreter, whether or not its environment is activated.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    well_known = str(resources.files("grpc_tools") / "_proto")
    for package in PACKAGES:
        for path in sorted((PROTOS / package).glob("*.proto")):
            name = path.relative_to(PROTOS).as_posix()
            arguments = ["protoc", f"-I{PROTOS}", f"-I{well_known}", f"--python_out={output}", f"--mypy_out={output}"]
            if path.stem.endswith("_service"):
                arguments += [f"--grpc_python_out={output}", f"--mypy_grpc_out={output}"]
            if protoc.main([*arguments, name]) != 0:
                raise SystemExit(f"protoc failed on {name}")
        (output / package / "__init__.py").touch()
    (output / "fallow/journal/__init__.py").touch()


def stale_files(fresh: Path) -> list[str]:
    """Names of generated files that differ from the committed ones, are missing or are left over."""
    stale: list[str] = []
    for package in PACKAGES:
        made = {path.name for path in (fresh / package).iterdir() if path.is_file()}
        kept = (
            {path.name for path in (OUTPUT / package).iterdir() if path.is_file()}
            if (OUTPUT / package).is_dir()
            else set()
        )
        for name in sorted(made | kept):
            ours, theirs = OUTPUT / package / name, fresh / package / name
            if not (ours.is_file() and theirs.is_file() and filecmp.cmp(ours, theirs, shallow=False)):
                stale.append(f"{package}/{name}")
    return stale


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when the committed code is stale")
    options = parser.parse_args()
    if not options.check:
        for package in PACKAGES:
            (OUTPUT / package).mkdir(parents=True, exist_ok=True)
        generate(OUTPUT)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        fresh = Path(folder)
        for package in PACKAGES:
            (fresh / package).mkdir(parents=True)
        generate(fresh)
        stale = stale_files(fresh)
    for name in stale:
        print(f"stale: sdk/{name} (run scripts/generate_protos.py)", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
