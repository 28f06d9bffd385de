"""What is known of a solve: a status that is a sentence, a certificate, and the factors of the optimum."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

import torch
from torch import Tensor


class Status(enum.StrEnum):
    """How a solve ended, as a sentence to act on."""

    CERTIFIED = "The certified relative gap is within the tolerance."
    ITERATION_LIMIT = "The iteration limit was reached first: raise max_iterations or loosen tol."
    STALLED = "Rounding stopped the progress before the tolerance was met: use float64 or loosen tol."
    EXACT = "Exact: all cones were searched, and both bounds agree within the tolerance."
    INTERVAL = "Interval: all cones were searched, but no network was found that meets the lower bound; raise max_iterations or loosen tol."
    INTERVAL_CONES = (
        "Interval: the search through some cone stopped at its limit of faces, so the lower bound is not tight."
    )
    INTERVAL_PATTERNS = (
        "Interval: more sign patterns than ReLU's limit, so the lower bound is one that holds for any pattern."
    )
    UPPER_BOUND = "Upper bound only: the lower bound says no more than that the loss is not negative."
    INTERRUPTED = "The solve was interrupted: this is the best certified iterate so far."


@dataclass(frozen=True, repr=False)
class Certificate:
    r"""A pair of values between which the global optimum lies.

    .. math:: \text{dual} \le p^\star \le \text{primal}

    Args:
        primal: objective of the point that is certified; an upper bound on the optimum.
        dual: Fenchel dual value at a feasible dual point; a lower bound at any iterate.
        dual_point: (rows, c) the feasible dual point that gives ``dual``.
        dtype: arithmetic in which both values were computed.

    Source: Fenchel duality; book, chapter "Self-attention".
    """

    primal: float
    dual: float
    dual_point: Tensor | None = field(default=None, repr=False, compare=False)
    dtype: torch.dtype = torch.float64

    def __repr__(self) -> str:
        return f"Certificate(dual={self.dual:.6g}, primal={self.primal:.6g}, relative_gap={self.relative_gap:.1e})"

    @property
    def gap(self) -> float:
        """The absolute gap, primal minus dual."""
        return self.primal - self.dual

    @property
    def relative_gap(self) -> float:
        """The gap over the larger of the two magnitudes."""
        return self.gap / max(abs(self.primal), abs(self.dual), torch.finfo(self.dtype).tiny)


@dataclass(frozen=True)
class Factors:
    r"""Rank-one terms of the lifted blocks: block ``block[j]`` of the optimum holds ``u[j] vec(v[j])^T``.

    Args:
        u: (m, \*u-shape) left factors, one head each.
        v: (m, w, c / B) right factors.
        block: (m,) index of the lifted block a term belongs to; for ReLU, whose pattern follows from u, of the mixer's block.
    """

    u: Tensor
    v: Tensor
    block: Tensor

    def __len__(self) -> int:
        return self.u.shape[0]

    @property
    def norm(self) -> Tensor:
        r"""The bound :math:`\sum_j \|u_j\| \|V_j\|_F` on the sum of the blocks' nuclear norms."""
        return (self.u.flatten(1).norm(dim=1) * self.v.flatten(1).norm(dim=1)).sum()
