"""What every solver does last: factor the best iterate, and certify it in double precision."""

from __future__ import annotations

import torch
from torch import Tensor

from cvxlib.audit.certificates import certify
from cvxlib.program.certificate import Certificate, Factors, Status
from cvxlib.program.program import ConvexProgram
from cvxlib.program.recovery import factor
from cvxlib.program.solution import Solution

#: evaluations that single precision has in any case
PATIENCE = 1000


def rounding(dtype: torch.dtype) -> float | None:
    """The slack of dual bounds during a solve: in single precision a small one, because the audit has the last word."""
    return None if dtype == torch.float64 else 16 * torch.finfo(dtype).eps


class Stall:
    """Whether single precision has come as far as it can: the second half of many evaluations has brought nothing."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.exact, self.gap, self.evaluations = dtype == torch.float64, float("inf"), 0

    def __call__(self, gap: float, evaluations: int) -> bool:
        """Whether to give up, at a relative gap after so many evaluations."""
        if gap < 0.99 * self.gap:
            self.gap, self.evaluations = gap, evaluations
        return not self.exact and evaluations > max(PATIENCE, 2 * self.evaluations)


def finish(
    program: ConvexProgram,
    best: Tensor,
    certificate: Certificate,
    status: Status,
    solver: str,
    evaluations: int,
    history: list[tuple[int, float, float]],
    tol: float,
) -> Solution:
    """The solution at the best lifted iterate (K, p, q); one iterated in float32 is audited in float64."""
    factors = factor(program.mixer, best)
    factors = Factors(*program.reduce.agree(factors.u, factors.v, factors.block))
    if best.dtype != torch.float64:
        certificate = certify(program, program.head(factors), certificate.dual_point)
        if status is Status.CERTIFIED and certificate.relative_gap > tol:
            status = Status.STALLED
        elif status in (Status.ITERATION_LIMIT, Status.STALLED) and certificate.relative_gap <= tol:
            status = Status.CERTIFIED
    return Solution(
        program=program,
        factors=factors,
        certificate=certificate,
        status=status,
        solver=solver,
        evaluations=evaluations,
        history=torch.tensor(history, dtype=torch.float64).reshape(-1, 3),
    )
