"""Where a solve stands: what a method reports after a step, and what the driver and the checkpoint keep of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cvxlib.program.certificate import Factors, relative_gap
from cvxlib.program.program import ConvexProgram


@dataclass(frozen=True)
class Step:
    r"""What a method knows after a step.

    Args:
        point: a candidate, lifted blocks (K, p, q) or factors.
        value: the regularised objective there, an upper bound on the optimum.
        rays: pairs of a residual (rows, c), loss gradients at any predictions, and its dual norm
            :math:`\max_k \|\tfrac1n A_k^*\rho\|`; the driver takes the best feasible point along each.
        evaluations: how many evaluations of the predictions the step took.
        note: for the bar.
    """

    point: Tensor | Factors
    value: float
    rays: list[tuple[Tensor, float]]
    evaluations: int
    note: str = ""


@dataclass
class Run:
    """Where a solve stands: the driver writes it, methods read it.

    Args:
        program: what is solved.
        tol: the certified relative gap asked for.
        limit: on the evaluations.
        aim: the relative gap at which to stop; below ``tol`` once an audit has found the gap a little wider.
        point: the best candidate.
        primal: its objective.
        dual: the best lower bound.
        dual_point: (rows, c) where it is attained.
        history: evaluations, primal and dual after every step.
        saved: tensors and numbers that the method wrote down (:meth:`Method.state`), if the solve goes on from a file.
    """

    program: ConvexProgram
    tol: float
    limit: int
    aim: float
    point: Tensor | Factors | None = None
    primal: float = math.inf
    dual: float = -math.inf
    dual_point: Tensor | None = None
    history: list[tuple[int, float, float]] = field(default_factory=list)
    saved: tuple[dict[str, Tensor], dict] | None = None

    @property
    def gap(self) -> float:
        """The relative gap, in the arithmetic of the tokens."""
        return relative_gap(self.primal, self.dual)

    @property
    def evaluations(self) -> int:
        """So far."""
        return self.history[-1][0] if self.history else 0

    @property
    def left(self) -> int:
        """Evaluations up to the limit."""
        return self.limit - self.evaluations

    def take(self, step: Step) -> None:
        """Keep what is better than before."""
        if step.value < self.primal:
            self.point, self.primal = step.point, step.value
        for residual, norm in step.rays:
            dual, point = self.program.feasible_dual(residual, norm, rounding(residual.dtype))
            if dual > self.dual:
                self.dual, self.dual_point = dual, point
        self.history.append((self.evaluations + step.evaluations, self.primal, self.dual))


def rounding(dtype: torch.dtype) -> float | None:
    """The slack of dual bounds during a solve: in single precision a small one, because the audit has the last word."""
    return None if dtype == torch.float64 else 16 * torch.finfo(dtype).eps
