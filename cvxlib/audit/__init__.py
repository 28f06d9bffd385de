"""The audit: what can be said of a head or a gate without trusting a solver.

Certificates of trained heads, gap-safe screening of gates, and the same programs written down for CVXPY. May import the program and what
is below it.
"""
