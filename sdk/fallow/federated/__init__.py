"""Federated learning: training steps as data, rounds, aggregation, and simulation over virtual clients.

Only `authoring`, `stablehlo` and `runner` need JAX (the extra `federated`); they ask for it when they are used.
"""

from fallow.federated.aggregation import (
    CentredClipping,
    ClippedMean,
    FLTrust,
    GeometricMedian,
    Mean,
    Median,
    MultiKrum,
    TrimmedMean,
)
from fallow.federated.authoring import adamw, named_weights, sgd, training_program, tree_of
from fallow.federated.outer import Momentum, Plain, diloco, fedadagrad, fedadam, fedyogi
from fallow.federated.partition import by, dirichlet, iid
from fallow.federated.program import TrainingProgram
from fallow.federated.rounds import Study
from fallow.federated.simulation import Round, Simulation

__all__ = [
    "CentredClipping",
    "ClippedMean",
    "FLTrust",
    "GeometricMedian",
    "Mean",
    "Median",
    "Momentum",
    "MultiKrum",
    "Plain",
    "Round",
    "Simulation",
    "Study",
    "TrainingProgram",
    "TrimmedMean",
    "adamw",
    "by",
    "diloco",
    "dirichlet",
    "fedadagrad",
    "fedadam",
    "fedyogi",
    "iid",
    "named_weights",
    "sgd",
    "training_program",
    "tree_of",
]
