"""Spatial structure: what positional attention learns of the sets in which patches belong together.

Import it as ``from cvxlib import spatial``. Jelassi, Sander and Li 2022 (arXiv 2210.09221); book, chapter "Spatial structure".

An application: may import the rest of the package, but neither ``vision`` nor ``energy``.
"""

from cvxlib.spatial.association import (
    Scalars,
    attention_scalars,
    chance_association,
    patch_association,
    set_coherence,
)
from cvxlib.spatial.convex import PopulationOptimum, mixer_program, mixing_matrix, patch_targets, population_optimum
from cvxlib.spatial.data import SpatialSample, SpatialTask
from cvxlib.spatial.positional import PositionalModel, Trace, deranged_scores, merged_scores, train_positional
from cvxlib.spatial.training import (
    classification_error,
    crop_and_flip,
    permute_patches,
    small_cnn,
    train_classifier,
)
from cvxlib.spatial.vit import PositionalAttention, VisionTransformer

__all__ = [
    "PopulationOptimum",
    "PositionalAttention",
    "PositionalModel",
    "Scalars",
    "SpatialSample",
    "SpatialTask",
    "Trace",
    "VisionTransformer",
    "attention_scalars",
    "chance_association",
    "classification_error",
    "crop_and_flip",
    "deranged_scores",
    "merged_scores",
    "mixer_program",
    "mixing_matrix",
    "patch_association",
    "patch_targets",
    "permute_patches",
    "population_optimum",
    "set_coherence",
    "small_cnn",
    "train_classifier",
    "train_positional",
]
