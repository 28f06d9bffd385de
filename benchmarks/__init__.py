"""Measurements of cvxlib beside its competitors: ``python -m benchmarks`` (see ``benchmarks/README.md``)."""
