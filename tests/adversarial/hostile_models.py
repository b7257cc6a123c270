"""What a hostile model is, what must come of it at inspection, and the little models that most of them are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from engine_models import FEATURES, onnx_model

FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
ROWS_IN = [("x", FLOAT, ["rows", FEATURES])]
ROWS_OUT = [("y", FLOAT, ["rows", FEATURES])]
HUGE = 2**40


class Fate(StrEnum):
    """What inspection must say."""

    REFUSED_UNRUN = "refused before anything ran"
    REFUSED = "refused, or its child is killed, which refuses it too"
    ANY = "refused or accepted, but contained"
    CRASH = "brings its child down, which refuses it"
    LONE = "accepted with batch 1, or refused: rows depend on their neighbours"


@dataclass(frozen=True, slots=True)
class Hostile:
    """A model file whose column x has 6 float32 a row and whose column y has 6, unless it lies."""

    name: str
    fate: Fate
    model: bytes
    words: str = ""
    """Part of the refusal."""


_MAKERS: list[tuple[str, Fate, str, Callable[[], bytes]]] = []


def hostile(fate: Fate, words: str = "") -> Callable[[Callable[[], bytes]], Callable[[], bytes]]:
    def noted(maker: Callable[[], bytes]) -> Callable[[], bytes]:
        _MAKERS.append((maker.__name__.strip("_"), fate, words, maker))
        return maker

    return noted


def named() -> list[Hostile]:
    """All that `hostile` has noted."""
    return [Hostile(name, fate, maker(), words) for name, fate, words, maker in _MAKERS]


def simple(*nodes: Any, initializers: dict[str, Any] | None = None, **options: Any) -> bytes:
    return onnx_model(
        nodes,
        ROWS_IN,
        ROWS_OUT,
        {name: np.asarray(value) for name, value in (initializers or {}).items()},
        check=False,
        **options,
    )


def identity() -> onnx.ModelProto:
    return onnx.load_from_string(simple(helper.make_node("Identity", ["x"], ["y"])))


def model_bytes(model: onnx.ModelProto) -> bytes:
    return bytes(model.SerializeToString())


def loop(trips: Any, *body: Any, **initializers: Any) -> bytes:
    """A loop over `body` that carries x to y, `trips` times."""
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [*body, helper.make_node("Identity", ["go"], ["on"])],
        "body",
        [info("trip", INT64, []), info("go", BOOL, []), info("carried", FLOAT, None)],
        [info("on", BOOL, []), info("next", FLOAT, None)],
    )
    node = helper.make_node("Loop", ["trips", "yes", "x"], ["y"], body=graph)
    return simple(node, initializers={"trips": trips, "yes": np.array(True), **initializers})
