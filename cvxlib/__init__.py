"""Convex duals of attention heads: global optima, and certificates for any trained head."""

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

__version__ = "0.1.0"

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
    "solve",
]

#: loaded on first use, since they need scikit-learn; left out of ``__all__`` so that a star import does not
_ESTIMATORS = ("ConvexHeadClassifier", "ConvexHeadRegressor")


def __getattr__(name: str) -> type:
    if name in _ESTIMATORS:
        from cvxlib import estimators

        return getattr(estimators, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_ESTIMATORS})
