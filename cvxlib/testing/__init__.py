"""Batteries for parts of your own: each claim of a part is held to the light, and a failure is one sentence.

May import everything but the applications.
"""

from cvxlib.testing.mixers import MixerError, check_mixer, network_objective

__all__ = ["MixerError", "check_mixer", "network_objective"]
