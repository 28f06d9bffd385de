"""Images as tokens: data sets, backbones and the transfer experiment (needs the ``vision`` extra).

An application: may import the rest of the package, but neither ``spatial`` nor ``energy``.
"""

from cvxlib.vision.backbones import Backbone, backbone
from cvxlib.vision.datasets import ImageSplit, cache_folder, images
from cvxlib.vision.digits import digits, patch_tokens, position_features
from cvxlib.vision.features import Features, extract_features
from cvxlib.vision.preparation import Preparation, prepare

__all__ = [
    "Backbone",
    "Features",
    "ImageSplit",
    "Preparation",
    "backbone",
    "cache_folder",
    "digits",
    "extract_features",
    "images",
    "patch_tokens",
    "position_features",
    "prepare",
]
