"""Measurements of cvxlib beside its competitors; ``python -m benchmarks`` runs them."""
