"""Images as tokens: data sets, backbones and the transfer experiment (needs the ``vision`` extra)."""

from cvxlib.vision.digits import digits, patch_tokens, position_features

__all__ = ["digits", "patch_tokens", "position_features"]
