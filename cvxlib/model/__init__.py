"""The model: a network and its parts.

Mixers and the contractions that some of them bring, their stacked data, activations, losses; heads, which are built of these, and the
baselines beside them; the way from gated to ReLU networks. May import geometry and the ground.
"""
