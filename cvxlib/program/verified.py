r"""Rigorous lower bounds: what a float dual point proves in exact arithmetic.

Any point proves something. Let x be the point of the loss's domain that floats :math:`\rho` stand for, and :math:`\sigma` a number that
no :math:`\|\tfrac1n A_k^* x\|_2` exceeds. Then s x is feasible for :math:`s = \min(1, \beta / \sigma)`, and since the dual objective D is concave

.. math:: p^\star \ge D(s\,x) \ge s\, D(x) + (1 - s)\, D(0).

Every number on the right is rounded to the safe side. The statement is about tokens, targets and gate masks as they are stored.

Source: Jansson, Chaykin and Keil 2007 (rigorous bounds by post-processing a solver's answer); book, chapter "Certificates".
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cvxlib.ground.one_process import OneProcess

EPS = torch.finfo(torch.float64).eps


def mean_below(values: Tensor, samples: int, processes: OneProcess) -> float:
    """A number that minus the mean of upper bounds (rows,) over the samples of all processes does not fall below."""
    mine = math.fsum(values.double().cpu().tolist()) if bool(torch.isfinite(values).all()) else math.inf
    # the sum of each process is rounded once; adding them up rounds again
    total, size = processes(torch.tensor([mine, abs(mine)], dtype=torch.float64, device=values.device)).tolist()
    above = total + 4 * EPS * size
    return -(above / samples + 4 * EPS * abs(above) / samples) - math.ulp(0.0)


def scaled_below(value: float, zero: float, norm: float, beta: float) -> tuple[float, float]:
    r"""A lower bound on the optimum from those on D(x) and D(0), and the factor s; ``norm`` is at least :math:`\max_k \|\tfrac1n A_k^* x\|_2`."""
    if not math.isfinite(norm) or not math.isfinite(value):
        return zero, 0.0
    s = 1.0 if norm <= beta else beta / norm * (1 - 4 * EPS)
    mixed = s * value + (1 - s) * zero
    below = mixed - 8 * EPS * (abs(s * value) + abs(zero))
    return max((below, s), (zero, 0.0))


def norm_above(norms: Tensor, distances: Tensor, samples: int) -> float:
    r"""A number that :math:`\max_k \|\tfrac1n A_k^* x\|` does not exceed, from bounds on the norms of float adjoints, and their distances (K,)."""
    return float((norms + distances).max()) / samples * (1 + 8 * EPS)
