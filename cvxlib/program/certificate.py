"""What is known of a solve: a status that is a sentence, a certificate, and the factors of the optimum."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

#: roundings of its own type that a primal value may carry, in units of its size
ROUNDINGS = 4096


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


def relative_gap(primal: float, dual: float) -> float:
    """The gap of two bounds over the larger of their magnitudes; infinite where there is no lower or no upper bound."""
    if math.isinf(dual) or math.isinf(primal):
        return math.inf
    return (primal - dual) / max(abs(primal), abs(dual), torch.finfo(torch.float64).tiny)


class Assurance(enum.StrEnum):
    """What a lower bound rests on, as a sentence."""

    RIGOROUS = "Rigorous: true in exact arithmetic for the tokens, targets and gate masks as they are stored."
    ROUNDING = "To rounding: true but for rounding errors that nothing here bounds."


class CrossedBounds(ArithmeticError):
    """A lower bound above an upper one: one of the two is wrong."""


@dataclass(frozen=True, repr=False)
class Certificate:
    r"""A pair of values between which the global optimum lies.

    .. math:: \text{dual} \le p^\star \le \text{primal}

    Args:
        primal: objective of the point that is certified; an upper bound on the optimum.
        dual: Fenchel dual value at a feasible dual point; a lower bound at any iterate.
        dual_point: (rows, c) the feasible dual point that gives ``dual``.
        dtype: arithmetic in which both values were computed.
        assurance: what the lower bound rests on.

    Raises:
        CrossedBounds: the dual value exceeds the primal one by more than the rounding of the latter.

    Source: Fenchel duality; book, chapters "Self-attention" and "Certificates".
    """

    primal: float
    dual: float
    dual_point: Tensor | None = field(default=None, repr=False, compare=False)
    dtype: torch.dtype = torch.float64
    assurance: Assurance = Assurance.ROUNDING

    def __post_init__(self) -> None:
        size = max(abs(self.primal), abs(self.dual))
        if not self.gap >= -ROUNDINGS * torch.finfo(self.dtype).eps * size:  # also where either is not a number
            raise CrossedBounds(
                f"certificate: expected dual <= primal; got dual={self.dual!r}, primal={self.primal!r} in {self.dtype}. "
                "The likely cause is rounding where sizes differ by many orders (rescale tokens or targets, or use float64), "
                "or gates, a loss or a mixer of your own that are not what they claim to be (cvxlib.testing tells)"
            )

    def __repr__(self) -> str:
        level = self.assurance.split(":")[0].lower()
        return f"Certificate(dual={self.dual:.6g}, primal={self.primal:.6g}, relative_gap={self.relative_gap:.1e}, {level})"

    @property
    def gap(self) -> float:
        """The absolute gap, primal minus dual."""
        return self.primal - self.dual

    @property
    def relative_gap(self) -> float:
        """The gap over the larger of the two magnitudes; infinite where there is no lower bound."""
        return relative_gap(self.primal, self.dual)


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
