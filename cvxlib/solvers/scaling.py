r"""Data of ordinary size: a program whose tokens or targets are huge or tiny is solved in other units, and its solution is brought back.

A mixer whose maps are homogeneous of degree g in the tokens has :math:`A(aX) = a^g A(X)`, and so

.. math:: p^\star(aX, by, \beta) = b^2\, p^\star\Big(X, y, \frac{\beta}{b\,a^g}\Big), \qquad Z^\star = \frac{b}{a^g}\, Z'^\star

for the squared loss, and the same with b = 1 for a loss whose targets have no units. Both numbers are powers of two, so that no token or
target is rounded and no gate changes.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from cvxlib.ground.checks import require
from cvxlib.model.losses import SquaredLoss
from cvxlib.program.certificate import Certificate, Factors
from cvxlib.program.program import ConvexProgram
from cvxlib.program.solution import Solution

#: binary orders of magnitude that data may be away from 1 without being scaled
ORDINARY = 20


@dataclasses.dataclass(frozen=True)
class Scaling:
    """The units of a program.

    Args:
        program: in its own units.
        tokens: a, a power of two; 1 where nothing is scaled.
        targets: b, likewise.
    """

    program: ConvexProgram
    tokens: float
    targets: float

    @classmethod
    def of(cls, program: ConvexProgram) -> Scaling:
        """Units in which the largest token and, for the squared loss, the largest target are of ordinary size."""
        if program.mixer.homogeneous is None:
            return cls(program, 1.0, 1.0)
        b = _unit(program, program.targets) if isinstance(program.loss, SquaredLoss) else 1.0
        return cls(program, _unit(program, program.tokens), b)

    @property
    def factor(self) -> float:
        """b over a to the degree of the mixer: Z in units of the scaled Z."""
        return self.targets / self.tokens ** (self.program.mixer.homogeneous or 0)

    def scaled(self) -> ConvexProgram:
        """The program in ordinary units, or the program itself where those are its own."""
        if self.tokens == self.targets == 1.0:
            return self.program
        program = self.program
        beta = program.beta / self.targets * self.factor / self.targets
        require(0 < beta < math.inf, "beta", "one that fits the size of tokens and targets", program.beta)
        targets = program.targets if self.targets == 1.0 else program.targets / self.targets
        return program.on(program.tokens / self.tokens, targets, beta)

    def there(self, start: Solution | None) -> Solution | None:
        """A solution of the program, to start from, in ordinary units."""
        if start is None or self.tokens == self.targets == 1.0:
            return start
        certificate = start.certificate
        if certificate.dual_point is not None:
            certificate = dataclasses.replace(certificate, dual_point=certificate.dual_point / self.targets)
        return dataclasses.replace(start, factors=_times(start.factors, self.factor**-0.5), certificate=certificate)

    def back(self, solution: Solution) -> Solution:
        """A solution of the scaled program in the program's own units, certified there."""
        if self.tokens == self.targets == 1.0:
            return solution
        program, square = self.program, self.targets**2
        factors = _times(solution.factors, self.factor**0.5)
        for name, before, after in (("u", solution.factors.u, factors.u), ("v", solution.factors.v, factors.v)):
            require(
                bool(torch.isfinite(after).all()) and int((after != 0).sum()) == int((before != 0).sum()),
                "tokens",
                f"a size for which {after.dtype} can hold the weights (float64 holds more)",
                f"tokens around {self.tokens:.0e}, whose {name} over- or underflows",
            )
        found = solution.certificate
        point = None if found.dual_point is None else self.targets * found.dual_point
        if program.activation.fixed and point is not None:
            certificate = program.certify_point(square * found.primal, point, found.dtype)
        else:
            certificate = Certificate(square * found.primal, square * found.dual, point, found.dtype, found.assurance)
        history = solution.history * torch.tensor([1.0, square, square], dtype=torch.float64)
        history[:, 2].clamp_(max=certificate.dual)
        return dataclasses.replace(solution, program=program, factors=factors, certificate=certificate, history=history)


def _unit(program: ConvexProgram, data: Tensor) -> float:
    """The power of two next to the largest entry over all processes, or 1 where that is of ordinary size."""
    largest = program.reduce.gather(data.abs().max().double().reshape(1))
    exponent = math.frexp(float(largest.max()))[1] if float(largest.max()) > 0 else 0
    return 2.0**exponent if abs(exponent) > ORDINARY else 1.0


def _times(factors: Factors, number: float) -> Factors:
    return dataclasses.replace(factors, u=factors.u * number, v=factors.v * number)
