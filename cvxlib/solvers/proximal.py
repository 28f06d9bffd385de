r"""Accelerated proximal gradient on the lifted blocks: monotone, with backtracking and adaptive restart.

The right solver where the blocks p x q are small enough for their singular value decompositions to be cheap.
Sources: Beck and Teboulle 2009 (monotone FISTA); O'Donoghue and Candes 2015 (adaptive restart).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from cvxlib.program.program import ConvexProgram
from cvxlib.solvers.drive import CHECK_EVERY, Method
from cvxlib.solvers.run import Run, Step


class Proximal(Method):
    """Monotone FISTA; a step is ten of its iterations."""

    title = "proximal gradient"

    def steps(self, point: Tensor, run: Run) -> Iterator[Step]:
        """Ten iterations at a time, from lifted blocks."""
        program, operator, loss, norm = self.program, self.program.operator, self.program.loss, self.program.norm
        agree, n, eps = program.reduce.agree, program.samples, torch.finfo(point.dtype).eps

        x, penalty = agree(point, norm.value(point))
        ax = operator.forward(x)
        value = program.data_loss(ax) + program.beta * float(penalty)
        if not run.history:
            yield Step(x, value, [(loss.gradient(ax, program.rows), float(norm.dual(program.gradient(ax))))], 1)
        y, ay, momentum, taken = x, ax, 1.0, 0
        lipschitz = _first_lipschitz(program)
        while True:
            residual = loss.gradient(ay, program.rows)
            gradient = operator.adjoint(residual) / n
            if taken >= min(CHECK_EVERY, run.left):
                # the residual at any point gives a feasible dual point, so the one at y serves x as well
                yield Step(x, value, [(residual, float(norm.dual(gradient)))], taken)
                taken = 0

            at_y = program.data_loss(ay)
            while True:
                z, penalty = norm.prox(y - gradient / lipschitz, program.beta / lipschitz)
                step = z - y
                products = torch.stack([(gradient * step).sum(), step.square().sum(), (step * (z - x)).sum()])
                z, penalty, products = agree(z, penalty, products)
                az = operator.forward(z)
                taken += 1
                at_z = program.data_loss(az)
                bound = float(products[0]) + lipschitz / 2 * float(products[1])
                if at_z <= at_y + bound + 8 * eps * abs(at_y) or taken >= run.left:
                    break
                lipschitz *= 2
            new_value = at_z + program.beta * float(penalty)

            if float(products[2]) < 0:  # momentum points uphill: start it afresh
                momentum = 1.0
            next_momentum = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
            pull, push = momentum / next_momentum, (momentum - 1) / next_momentum
            if new_value <= value:
                y, ay = z + push * (z - x), az + push * (az - ax)
                x, ax, value = z, az, new_value
            else:
                y, ay = x + pull * (z - x), ax + pull * (az - ax)
            momentum = next_momentum
            lipschitz *= 0.98  # a step size once cut may grow again

    def words(self) -> str:
        """The sizes of blocks and design tensor."""
        k, p, q = self.program.operator.shape
        return f"{self.title} on {k} blocks of {p} x {q}, design tensor of {self.program.operator.rows} rows"


def _first_lipschitz(program: ConvexProgram) -> float:
    """A lower estimate of the gradient's Lipschitz constant by a few power iterations; backtracking does the rest.

    Where nothing comes through the operator the gradient is constant, and any number will do.
    """
    operator = program.operator
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(operator.shape, generator=generator, dtype=torch.float64).to(program.tokens)
    size = z.norm()
    for _ in range(5):
        z = operator.adjoint(operator.forward(z / size))
        size = z.double().norm()  # squares may overflow single precision
        if not 0 < float(size) < float("inf"):
            return 1.0
    (size,) = program.reduce.agree(size)
    return max(program.loss.smoothness * float(size) / program.samples, torch.finfo(z.dtype).tiny)
