"""Geometry: mathematics that knows no mixer.

Arrangements of hyperplanes and their sign patterns, cones and the norms that they give, the nuclear norm of blocks. Everything here takes
plain matrices of rows. May import the ground.
"""
