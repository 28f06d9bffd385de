"""Convex duals of attention heads: global optima, and certificates for any trained head."""

from importlib import import_module
from importlib.metadata import version

from cvxlib.activations import Activation, GatedReLU, Linear, ReLU
from cvxlib.certify import certify
from cvxlib.conversion import gated_to_relu
from cvxlib.heads import Head
from cvxlib.losses import CrossEntropy, Loss, SquaredLoss
from cvxlib.mixers import (
    FNO,
    MLP,
    BlockFNO,
    CausalSelfAttention,
    Convolution,
    CrossAttention,
    Mixer,
    MLPMixer,
    SelfAttention,
    circulant_hidden,
)
from cvxlib.norms import BlockNuclearNorm
from cvxlib.path import path
from cvxlib.programs import ConvexProgram
from cvxlib.recovery import factor
from cvxlib.screening import screen
from cvxlib.solution import Certificate, Factors, Solution, Status
from cvxlib.solvers import solve
from cvxlib.storage import load, save

__version__ = version("cvxlib")

__all__ = [
    "FNO",
    "MLP",
    "Activation",
    "BlockFNO",
    "BlockNuclearNorm",
    "CausalSelfAttention",
    "Certificate",
    "ConvexProgram",
    "Convolution",
    "CrossAttention",
    "CrossEntropy",
    "Factors",
    "GatedReLU",
    "Head",
    "Linear",
    "Loss",
    "MLPMixer",
    "Mixer",
    "ReLU",
    "SelfAttention",
    "Solution",
    "SquaredLoss",
    "Status",
    "certify",
    "circulant_hidden",
    "factor",
    "gated_to_relu",
    "load",
    "path",
    "save",
    "screen",
    "show_versions",
    "solve",
]

#: loaded on first use, by the module that has it: a module that is run as a program must not be imported before
_LATER = {"show_versions": "versions"}
#: the same, since they need scikit-learn; left out of ``__all__`` so that a star import does not
_ESTIMATORS = {"ConvexHeadClassifier": "estimators", "ConvexHeadRegressor": "estimators"}


def __getattr__(name: str) -> object:
    place = (_LATER | _ESTIMATORS).get(name)
    if place is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{place}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER, *_ESTIMATORS})
