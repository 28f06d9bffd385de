r"""Transformers as optimisation: energies whose descent steps are the layers of a transformer.

Tokens are rows of Y, with any leading axes; everything runs on the device and in the precision of the tokens.

An application: may import the rest of the package, but neither ``vision`` nor ``spatial``.
"""

from cvxlib.energy.attention import (
    attention_energy,
    attention_gradient,
    attention_majoriser,
    attention_step,
    attention_weights,
    pair_energy,
)
from cvxlib.energy.feedforward import feedforward_energy, feedforward_gradient, feedforward_step
from cvxlib.energy.layers import EnergyLayer, EnergyTransformer, matched_step, minimise, trajectory

__all__ = [
    "EnergyLayer",
    "EnergyTransformer",
    "attention_energy",
    "attention_gradient",
    "attention_majoriser",
    "attention_step",
    "attention_weights",
    "feedforward_energy",
    "feedforward_gradient",
    "feedforward_step",
    "matched_step",
    "minimise",
    "pair_energy",
    "trajectory",
]
