"""Weights that lie beside a model's file, taken into it: a program is one file, and exporters often write two."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath
from typing import Any, cast

from fallow.errors import FallowError, Reason
from fallow.limits import PROGRAM_BYTES_MAX

_SAVE_INSIDE = "save it with its data inside, for instance torch.onnx.export(…, external_data=False)"


def with_weights_inside(path: Path) -> bytes:
    """The model at `path` with all its weights in one message.

    Only plain files in the model's own folder, or below it, are read: a model made by a stranger could name any file
    of this machine, and whoever computes the bundle would see it. Raises BUNDLE_INVALID.
    """
    try:
        import onnx
        from onnx import external_data_helper
    except ImportError:
        raise _invalid(
            f"{path} keeps weights outside the file", f"`pip install onnx`, and they are taken in; or {_SAVE_INSIDE}"
        ) from None
    try:
        model: Any = onnx.ModelProto()
        model.ParseFromString(path.read_bytes())
        total_bytes = path.stat().st_size
        for location in dict.fromkeys(_locations(model)):
            total_bytes += _checked_bytes(path.parent, location)
            if total_bytes > PROGRAM_BYTES_MAX:
                raise FallowError(
                    Reason.BUNDLE_INVALID,
                    f"{path} and the weights beside it are {total_bytes} bytes or more",
                    field="model",
                    limit=f"{PROGRAM_BYTES_MAX} bytes a program",
                )
        external_data_helper.load_external_data_for_model(model, str(path.parent))
        return cast("bytes", model.SerializeToString())
    except FallowError:
        raise
    except Exception as error:
        raise _invalid(f"the weights beside {path} cannot be taken in: {error}", _SAVE_INSIDE) from error


def _locations(model: Any) -> Iterator[str]:
    """Where weights lie, of every tensor in the model, those of nodes and inner graphs too."""
    pending: list[Any] = [model]
    while pending:
        message = pending.pop()
        if getattr(message, "data_location", 0) == 1:
            yield next((entry.value for entry in message.external_data if entry.key == "location"), "")
            continue
        for field, value in message.ListFields():
            if field.message_type is not None:
                pending.extend(value if field.is_repeated else (value,))


def _checked_bytes(folder: Path, location: str) -> int:
    """Length of the file that `location` names, when it may be read."""
    told = f"the model names {location!r} as the place of its weights"
    windows = PureWindowsPath(location)
    if not location or windows.is_absolute() or windows.drive or location.startswith("/") or ".." in windows.parts:
        raise _invalid(told, "a plain file in the model's folder is allowed")
    place = folder / location
    try:
        if not Path(os.path.realpath(place)).is_relative_to(os.path.realpath(folder)):
            raise _invalid(f"{told}, which leads elsewhere", "copy it into the model's folder if it is meant")
        facts = place.stat()
    except OSError as error:
        raise _invalid(f"{told}: {error.strerror or error}", "keep both files in one folder") from error
    if not stat.S_ISREG(facts.st_mode):
        raise _invalid(f"{told}, which is no plain file", "a plain file in the model's folder is allowed")
    return facts.st_size


def _invalid(message: str, hint: str) -> FallowError:
    return FallowError(Reason.BUNDLE_INVALID, message, field="model", limit="one file", hint=hint)
