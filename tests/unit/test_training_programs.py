"""Training programs: made of JAX, sent as data, looked into, and run. Each needs the extra `federated`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fallow.errors import FallowError, Reason
from fallow.federated.authoring import adamw, named_weights, sgd, training_program, tree_of
from fallow.federated.partition import Shuffle, by, iid
from fallow.federated.program import TrainingProgram
from fallow.federated.rounds import Study
from fallow.federated.runner import Runner
from fallow.federated.simulation import Simulation
from fallow.federated.stablehlo import check_artifact, jax_modules
from fallow.wire.training import decode_training_program, encode_training_program

jax = pytest.importorskip("jax")
jnp = jax.numpy
COLUMNS: dict[str, tuple[str, tuple[int, ...]]] = {"x": ("float32", (3,)), "y": ("float32", ())}
WEIGHTS: dict[str, Any] = {"line": {"slope": np.zeros(3, np.float32)}, "offset": np.zeros((), np.float32)}


def residual(weights: Any, batch: Any) -> Any:
    return batch["x"] @ weights["line"]["slope"] + weights["offset"] - batch["y"]


def loss(weights: Any, batch: Any) -> Any:
    return residual(weights, batch) ** 2 / 2


def absolute(weights: Any, batch: Any) -> Any:
    return jnp.abs(residual(weights, batch))


@pytest.fixture(scope="module")
def program() -> TrainingProgram:
    return training_program(
        loss, WEIGHTS, columns=COLUMNS, batch_rows=4, optimizer=sgd(0.1), metrics={"absolute": absolute}
    )


@pytest.fixture(scope="module")
def runner(program: TrainingProgram) -> Runner:
    return Runner(program)


def data(rows: int, seed: int = 0) -> dict[str, NDArray[Any]]:
    chance = np.random.default_rng(seed)
    x = chance.normal(size=(rows, 3)).astype(np.float32)
    return {"x": x, "y": (x @ np.array([1, -2, 0.5], np.float32) + 0.25).astype(np.float32)}


def by_hand(columns: dict[str, NDArray[Any]], batches: list[list[int]]) -> tuple[NDArray[np.float64], float]:
    """Plain descent in NumPy, in float64."""
    slope, offset = np.zeros(3), 0.0
    for batch in batches:
        x, y = columns["x"][batch].astype(np.float64), columns["y"][batch].astype(np.float64)
        error = x @ slope + offset - y
        slope, offset = slope - 0.1 * (error @ x) / len(batch), offset - 0.1 * error.mean()
    return slope, float(offset)


# ------------------------------------------------------------------------------------------------- running


def test_a_step_does_what_the_same_arithmetic_does_by_hand(program: TrainingProgram, runner: Runner) -> None:
    columns = data(3)
    out = runner.train(program.layout.flat(named_weights(WEIGHTS)), columns)
    slope, offset = by_hand(columns, [[0, 1, 2]])
    found = program.layout.arrays(out.weights)
    np.testing.assert_allclose(found["line/slope"], slope, rtol=1e-5)
    assert float(found["offset"]) == pytest.approx(offset, rel=1e-5)
    assert out.rows == 3
    assert out.metrics["loss"] == pytest.approx(float((columns["y"] ** 2).mean() / 2), rel=1e-5)
    assert out.metrics["absolute"] == pytest.approx(float(np.abs(columns["y"]).mean()), rel=1e-5)


def test_rows_of_padding_never_count(program: TrainingProgram, runner: Runner) -> None:
    """Five rows in batches of four: three places of padding in the second, and batches of padding after it."""
    columns = data(5)
    start = program.layout.flat(named_weights(WEIGHTS))
    found = runner.evaluate(start, columns)
    assert found["loss"] == pytest.approx(float((columns["y"] ** 2).mean() / 2), rel=1e-5)
    moved = {bytes([n]): runner.train(start, columns, seed=bytes([n])).weights for n in range(5)}
    assert len({weights.tobytes() for weights in moved.values()}) > 1
    for seed, weights in moved.items():
        order = Shuffle(seed).order("epoch 0", 5).tolist()
        slope, _ = by_hand(columns, [order[:4], order[4:]])
        np.testing.assert_allclose(program.layout.arrays(weights)["line/slope"], slope, rtol=1e-4)
        assert runner.train(start, columns, seed=seed).weights.tobytes() == weights.tobytes()


@pytest.mark.parametrize("optimizer", [adamw(0.05), sgd(0.1, proximal=0.5)])
def test_state_begins_anew_each_round_and_batches_of_padding_leave_it(optimizer: Any) -> None:
    made = training_program(loss, WEIGHTS, columns=COLUMNS, batch_rows=4, optimizer=optimizer)
    assert made.init and made.state
    run = Runner(made)
    start = made.layout.flat(named_weights(WEIGHTS))
    columns = data(12)
    # Twelve rows are three batches, padded to four; the same rows again in another call give the same bits.
    one = run.train(start, columns, epochs=2, seed=b"s")
    two = run.train(start, columns, epochs=2, seed=b"s")
    assert one.weights.tobytes() == two.weights.tobytes()
    assert one.metrics["loss"] < float((columns["y"] ** 2).mean() / 2)


def test_hyperparameters_are_set_by_name(program: TrainingProgram, runner: Runner) -> None:
    start = program.layout.flat(named_weights(WEIGHTS))
    still = runner.train(start, data(4), hyperparameters={"learning_rate": 0.0})
    assert still.weights.tobytes() == start.tobytes()
    with pytest.raises(FallowError, match="no hyper-parameter 'rate'"):
        runner.train(start, data(4), hyperparameters={"rate": 1.0})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda columns: columns.pop("y"), "column 'y' is missing"),
        (lambda columns: columns.update(x=columns["x"].astype(np.float64)), r"column 'x' is float64\[3\] a row"),
        (lambda columns: columns.update(x=columns["x"][:, :2]), r"column 'x' is float32\[2\] a row"),
        (lambda columns: columns["x"].__setitem__((2, 1), np.nan), "no finite value in row 2"),
    ],
)
def test_rows_of_another_form_are_named(
    program: TrainingProgram, runner: Runner, change: Callable[[Any], Any], words: str
) -> None:
    columns = data(4)
    change(columns)
    with pytest.raises(FallowError, match=words):
        runner.train(program.layout.flat(named_weights(WEIGHTS)), columns)


# ------------------------------------------------------------------------------------------------- simulating


def test_a_simulation_learns_and_is_the_same_again(runner: Runner) -> None:
    def study() -> list[Any]:
        simulation = Simulation(
            runner,
            named_weights(WEIGHTS),
            data(64),
            clients=8,
            partition=iid,
            study=Study(b"seed", clients_per_round=4),
            epochs=2,
            test=data(16, seed=1),
        )
        return list(simulation.rounds(10))

    rounds, again = study(), study()
    assert [each.number for each in rounds] == list(range(1, 11))
    assert rounds[-1].metrics["loss"] < 0.1 < rounds[0].metrics["loss"]
    assert all(len(each.clients) == 4 and not each.refused for each in rounds)
    assert [dict(each.metrics) for each in rounds] == [dict(each.metrics) for each in again]
    assert rounds[-1].weights["line/slope"].tobytes() == again[-1].weights["line/slope"].tobytes()


def test_clients_may_be_sites_and_may_lie(runner: Runner) -> None:
    columns = {**data(30), "site": np.arange(30) % 3}

    def lie(changes: Any, number: int) -> Any:
        return {**changes, 1: np.full_like(changes[1], np.nan)}

    simulation = Simulation(
        runner, named_weights(WEIGHTS), columns, clients=0, partition=by("site"), study=Study(b"s"), tampering=lie
    )
    (done,) = simulation.rounds(1)
    assert done.clients == (0, 2) and done.refused == {1: "number 0 is nan"}


# ------------------------------------------------------------------------------------------------- as data


def test_a_program_is_kilobytes_and_comes_back_as_it_went(program: TrainingProgram) -> None:
    sent = encode_training_program(program)
    assert decode_training_program(sent) == program
    assert len(sent) < 16_384
    assert program.platforms == ("cpu", "cuda", "rocm", "tpu") and program.metrics == ("absolute", "loss")
    with pytest.raises(FallowError, match="no training program"):
        decode_training_program(b"\xff" * 9)


def test_trees_of_weights_come_back_from_their_names() -> None:
    named = named_weights(WEIGHTS)
    assert list(named) == ["line/slope", "offset"]
    tree = tree_of(named, WEIGHTS)
    assert tree["line"]["slope"] is named["line/slope"]
    with pytest.raises(FallowError, match="weight 'n' is int64"):
        named_weights({"n": np.zeros(2, np.int64)})


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (lambda weights, batch: residual(weights, batch).mean(), r"gives the shape \[\]"),
        (lambda weights, batch: jax.pure_callback(lambda x: x, jax.ShapeDtypeStruct((4,), np.float32), batch["y"]),
         "cannot be made data"),
    ],
)  # fmt: skip
def test_what_cannot_travel_is_refused_as_it_is_made(bad: Any, words: str) -> None:
    with pytest.raises(FallowError, match=words):
        training_program(bad, WEIGHTS, columns=COLUMNS, batch_rows=4)


def test_a_loss_may_use_chance(program: TrainingProgram) -> None:
    def noisy(weights: Any, batch: Any, key: Any) -> Any:
        kept = 1.0 if key is None else jax.random.bernoulli(key, 0.5, (4,)).astype(np.float32)
        return loss(weights, batch) * kept

    made = training_program(noisy, WEIGHTS, columns=COLUMNS, batch_rows=4)
    run = Runner(made)
    start = made.layout.flat(named_weights(WEIGHTS))
    several = {run.train(start, data(4), seed=bytes([n])).weights.tobytes() for n in range(6)}
    assert len(several) > 1
    assert (
        run.train(start, data(4), seed=b"1").weights.tobytes() == run.train(start, data(4), seed=b"1").weights.tobytes()
    )


# ------------------------------------------------------------------------------------------------- looking into them


def artifact(text: str) -> bytes:
    modules = jax_modules()
    written: bytes = modules.stablehlo.serialize_portable_artifact_str(text, "1.9.0")
    return written


HOSTILE = {
    "python callback": (
        """func.func @main(%a: tensor<4xf32>) -> tensor<4xf32> {
             %0 = stablehlo.custom_call @xla_ffi_python_cpu_callback(%a) {api_version = 4 : i32}
                  : (tensor<4xf32>) -> tensor<4xf32>
             return %0 : tensor<4xf32> }""",
        "custom_call",
    ),
    "bomb": (
        """func.func @main(%a: tensor<f32>) -> tensor<65536x65536xf32> {
             %0 = stablehlo.broadcast_in_dim %a, dims = [] : (tensor<f32>) -> tensor<65536x65536xf32>
             return %0 : tensor<65536x65536xf32> }""",
        "a tensor takes 17179869184 bytes",
    ),
    "endless": (
        """func.func @main(%a: tensor<i32>) -> tensor<i32> {
             %0 = stablehlo.while(%x = %a) : tensor<i32>
               cond { %t = stablehlo.constant dense<true> : tensor<i1>
                      stablehlo.return %t : tensor<i1> }
               do { stablehlo.return %x : tensor<i32> }
             return %0 : tensor<i32> }""",
        "how often a loop runs",
    ),
    "long": (
        """func.func @main(%a: tensor<i32>) -> tensor<i32> {
             %z = stablehlo.constant dense<0> : tensor<i32>
             %0 = stablehlo.while(%x = %z) : tensor<i32>
               cond { %n = stablehlo.constant dense<2147483647> : tensor<i32>
                      %t = stablehlo.compare LT, %x, %n : (tensor<i32>, tensor<i32>) -> tensor<i1>
                      stablehlo.return %t : tensor<i1> }
               do { %1 = stablehlo.constant dense<1> : tensor<i32>
                    %y = stablehlo.add %x, %1 : tensor<i32>
                    stablehlo.return %y : tensor<i32> }
             return %0 : tensor<i32> }""",
        "a loop runs 2147483647 times",
    ),
    "argument as limit": (
        """func.func @main(%a: tensor<i32>) -> tensor<i32> {
             %z = stablehlo.constant dense<0> : tensor<i32>
             %0:2 = stablehlo.while(%x = %z, %n = %a) : tensor<i32>, tensor<i32>
               cond { %t = stablehlo.compare LT, %x, %n : (tensor<i32>, tensor<i32>) -> tensor<i1>
                      stablehlo.return %t : tensor<i1> }
               do { %1 = stablehlo.constant dense<1> : tensor<i32>
                    %y = stablehlo.add %x, %1 : tensor<i32>
                    stablehlo.return %y, %n : tensor<i32>, tensor<i32> }
             return %0#0 : tensor<i32> }""",
        "how often a loop runs",
    ),
    "counter that stands": (
        """func.func @main(%a: tensor<i32>) -> tensor<i32> {
             %z = stablehlo.constant dense<0> : tensor<i32>
             %0 = stablehlo.while(%x = %z) : tensor<i32>
               cond { %n = stablehlo.constant dense<5> : tensor<i32>
                      %t = stablehlo.compare LT, %x, %n : (tensor<i32>, tensor<i32>) -> tensor<i1>
                      stablehlo.return %t : tensor<i1> }
               do { %1 = stablehlo.constant dense<0> : tensor<i32>
                    %y = stablehlo.add %x, %1 : tensor<i32>
                    stablehlo.return %y : tensor<i32> }
             return %0 : tensor<i32> }""",
        "how often a loop runs",
    ),
    "recursion": (
        """func.func @main(%a: tensor<f32>) -> tensor<f32> {
             %0 = func.call @again(%a) : (tensor<f32>) -> tensor<f32>
             return %0 : tensor<f32> }
           func.func private @again(%a: tensor<f32>) -> tensor<f32> {
             %0 = func.call @again(%a) : (tensor<f32>) -> tensor<f32>
             return %0 : tensor<f32> }""",
        "calls 'again', which calls itself",
    ),
    "free shape": (
        """func.func @main(%a: tensor<?xf32>) -> tensor<?xf32> {
             %0 = stablehlo.add %a, %a : tensor<?xf32>
             return %0 : tensor<?xf32> }""",
        "shape is not fixed",
    ),
    "numbers nobody can redo": (
        """func.func @main(%a: tensor<f32>, %b: tensor<f32>) -> tensor<4xf32> {
             %s = stablehlo.constant dense<[4]> : tensor<1xi64>
             %0 = stablehlo.rng %a, %b, %s, distribution = UNIFORM
                  : (tensor<f32>, tensor<f32>, tensor<1xi64>) -> tensor<4xf32>
             return %0 : tensor<4xf32> }""",
        "it uses stablehlo.rng",
    ),
    "talk to others": (
        """func.func @main(%a: tensor<4xf32>) -> tensor<4xf32> {
             %0 = "stablehlo.all_reduce"(%a) ({
               ^bb0(%x: tensor<f32>, %y: tensor<f32>):
                 %s = stablehlo.add %x, %y : tensor<f32>
                 stablehlo.return %s : tensor<f32>
             }) {replica_groups = dense<[[0]]> : tensor<1x1xi64>} : (tensor<4xf32>) -> tensor<4xf32>
             return %0 : tensor<4xf32> }""",
        "it uses stablehlo.all_reduce",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_artifacts_are_refused_by_name(name: str) -> None:
    text, words = HOSTILE[name]
    with pytest.raises(FallowError, match=words) as caught:
        check_artifact("train", artifact(text))
    assert caught.value.reason is Reason.PROGRAM_REFUSED


def test_loops_of_known_length_may_run() -> None:
    def scanned(weights: Any, batch: Any) -> Any:
        def one(carried: Any, _: Any) -> Any:
            return carried * 1.5, None

        return jax.lax.scan(one, loss(weights, batch), None, length=7)[0]

    made = training_program(scanned, WEIGHTS, columns=COLUMNS, batch_rows=4)
    assert check_artifact("evaluate", made.evaluate).trips_max == 7


@pytest.mark.parametrize("bytes_", [b"", b"ML\xefR", b"no artifact", b"\x00" * 100])
def test_what_is_no_artifact_is_said(bytes_: bytes) -> None:
    with pytest.raises(FallowError, match="no StableHLO artifact"):
        check_artifact("train", bytes_)


def test_a_header_that_disagrees_with_its_artifact_is_refused(program: TrainingProgram) -> None:
    with pytest.raises(FallowError, match="train takes something else"):
        Runner(replace(program, batch_rows=8))
    with pytest.raises(FallowError, match="evaluate takes something else"):
        Runner(replace(program, evaluate=program.train))
    with pytest.raises(FallowError, match="metric 'loss'"):
        replace(program, metrics=("absolute",))
    with pytest.raises(FallowError, match="state and init go together"):
        replace(program, init=program.train)
    with pytest.raises(FallowError, match="order of their names"):
        replace(program, weights=tuple(reversed(program.weights)))
