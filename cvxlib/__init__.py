"""Convex duals of attention heads: global optima, and certificates for any trained head."""

import importlib

from cvxlib import _moved
from cvxlib.audit.certificates import certify
from cvxlib.audit.screening import screen
from cvxlib.geometry.norms import BlockNuclearNorm
from cvxlib.ground.provenance import VERSION as __version__  # noqa: F401
from cvxlib.model.activations import Activation, GatedReLU, Linear, ReLU
from cvxlib.model.conversion import gated_to_relu
from cvxlib.model.heads import Head
from cvxlib.model.losses import CrossEntropy, Loss, SquaredLoss
from cvxlib.model.mixers import (
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
from cvxlib.program.certificate import Certificate, Factors, Status
from cvxlib.program.program import ConvexProgram
from cvxlib.program.recovery import factor
from cvxlib.program.solution import Solution
from cvxlib.solvers import solve
from cvxlib.workflow.proof import save_certificate
from cvxlib.workflow.regularisation import path
from cvxlib.workflow.storage import load, save

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
    "save_certificate",
    "screen",
    "show_versions",
    "solve",
]

#: loaded on first use, by the module that has it: a module that is run as a program must not be imported before
_LATER = {"show_versions": "versions"}
#: the same, since they need scikit-learn; left out of ``__all__`` so that a star import does not
_ESTIMATORS = dict.fromkeys(("ConvexHeadClassifier", "ConvexHeadRegressor"), "workflow.estimators")


_moved.install()


def __getattr__(name: str) -> object:
    if place := (_LATER | _ESTIMATORS).get(name):
        return getattr(importlib.import_module(f"{__name__}.{place}"), name)
    if f"{__name__}.{name}" in _moved.MOVED:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER, *_ESTIMATORS})
