"""What a solver returns: the program, the factors of its optimum, and what is known of them."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from cvxlib.model.heads import Head
from cvxlib.program.certificate import Certificate, Factors, Status
from cvxlib.program.program import ConvexProgram


@dataclass(frozen=True)
class Solution:
    """The result of :func:`cvxlib.solve`.

    Args:
        program: the program that was solved.
        factors: the optimum as rank-one terms.
        certificate: the interval that holds the global optimum.
        status: how the solve ended.
        solver: which solver and which evaluation path were taken, in words.
        evaluations: how many times the predictions were evaluated.
        history: (k, 3) evaluations, primal and best dual value at each check of the gap.
    """

    program: ConvexProgram = field(repr=False)
    factors: Factors = field(repr=False)
    certificate: Certificate
    status: Status
    solver: str
    evaluations: int
    history: Tensor = field(repr=False)

    @property
    def objective(self) -> float:
        """The regularised objective at the solution (the certificate's primal value)."""
        return self.certificate.primal

    @property
    def rank(self) -> int:
        """The number of heads of the recovered network."""
        return len(self.factors)

    @property
    def lifted(self) -> Tensor:
        """(K, p, q) the lifted matrices, one per block of the program."""
        return self.program.lift(self.factors)

    def head(self) -> Head:
        """The network itself, a :class:`torch.nn.Module`: ``head(tokens)`` gives predictions."""
        return self.program.head(self.factors)
