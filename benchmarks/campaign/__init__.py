"""The adversary: ill-scaled programs, and a search for a certificate whose dual lies above the optimum.

``python -m benchmarks.campaign`` runs it. ``exact`` evaluates heads without rounding, ``optima`` solves the programs that have a formula to fifty
digits, ``data`` draws what is hard for floats, ``adversary`` looks for better heads, ``kinds`` makes the cases and ``judge`` compares and counts.
"""
