"""Images as tokens: data sets, backbones and the transfer experiment (needs the ``vision`` extra)."""

from cvxlib.vision.datasets import ImageSplit, cache_folder, images
from cvxlib.vision.digits import digits, patch_tokens, position_features

__all__ = ["ImageSplit", "cache_folder", "digits", "images", "patch_tokens", "position_features"]
