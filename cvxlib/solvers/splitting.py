r"""Operator splitting (ADMM): the loss, the norm and the data each handled exactly, in turn.

The program is split as :math:`\min F(f) + \beta N(W)` subject to :math:`(f, W) = (A Z, Z)`. Each iteration takes the proximal
points of the loss (row by row) and of the norm (singular value thresholding), and projects onto the graph of A by one
triangular solve with a matrix that is factored once. The squared loss is minimised within that projection, so that only
:math:`Z = W` is split; where A is tall an iteration then needs no more of it than :math:`A^\top A` and :math:`A^\top Y`.
Attention's features are cubic in the tokens and badly conditioned: the exact projection makes the iteration count insensitive to
that, which is where gradient methods crawl.

Source: Parikh and Boyd 2014, "Block splitting for distributed optimization" (graph form); residual balancing as in Boyd et al. 2011,
section 3.4; book, chapter "Self-attention".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cvxlib.geometry.norms import BlockNuclearNorm
from cvxlib.ground.one_process import ALONE, OneProcess
from cvxlib.model.losses import SquaredLoss
from cvxlib.operators.maps import BlockOperator
from cvxlib.operators.projections import GraphProjection
from cvxlib.program.program import ConvexProgram
from cvxlib.solvers.drive import CHECK_EVERY, Method
from cvxlib.solvers.run import Run, Step

RELAXATION = 1.6
PENALTY = 0.2  # on the loss's arguments, as a fraction of its curvature


class GraphForm:
    r"""Any loss: :math:`\min F(f)` subject to :math:`f = AZ`, by turns of the loss's proximal point and the projection onto the graph.

    Args:
        program: supplies loss and targets.
        operator: the linear map A.
        projections: onto the graphs of its maps.
        z: where to start.
        residual: (rows, c) the loss gradient that starts the multipliers.
    """

    #: the first penalty on Z - W, in units of the penalty on predictions and of the features' squares
    ridge = 0.02

    def __init__(
        self,
        program: ConvexProgram,
        operator: BlockOperator,
        projections: list[GraphProjection],
        z: Tensor,
        residual: Tensor,
    ) -> None:
        self.loss, self.rows, self.n = program.loss, program.rows, program.samples
        self.operator, self.projections = operator, projections
        self.weight = PENALTY * self.loss.smoothness / self.n
        self.az = self.last = self.f = operator.forward(z)
        self.dual = -residual / (self.n * self.weight)

    def set_weight(self, weight: float) -> None:
        r"""Take another penalty :math:`\rho_w` on Z - W."""
        for projection in self.projections:
            projection.set_ratio(weight / self.weight)

    def balance(self) -> None:
        """Better the penalty on f - A Z; the projections need :meth:`set_weight` again."""
        scale = _balance(self.f - self.az, self.az - self.last, self.az, self.dual, self.operator.reduce)
        self.weight, self.dual = self.weight * scale, self.dual / scale

    def __call__(self, w: Tensor) -> Tensor:
        """Z, for W plus its scaled multiplier."""
        self.f = self.loss.prox(self.az - self.dual, self.rows, self.n * self.weight, start=self.f)
        relaxed = RELAXATION * self.f + (1 - RELAXATION) * self.az
        self.last = self.az
        targets, starts = (relaxed + self.dual).chunk(len(self.projections), 1), self.operator.split(w)
        pairs = [project(*at) for project, *at in zip(self.projections, targets, starts, strict=True)]
        self.az = torch.cat([az for az, _ in pairs], 1)
        self.dual = self.dual + relaxed - self.az
        return torch.cat([z for _, z in pairs])

    def predictions(self, z: Tensor) -> Tensor:
        """Predictions (rows, c) at which the loss gradient is a dual point."""
        return self.f


class LeastSquares:
    r"""The squared loss: :math:`\min \tfrac1{2n}\|AZ - Y\|^2 + \tfrac{\rho_w}2\|Z - W\|^2` is itself a projection, with nothing left to split.

    Args:
        program: supplies the targets Y.
        operator: the linear map A.
        projections: onto the graphs of its maps.
    """

    ridge = 1.0

    def __init__(self, program: ConvexProgram, operator: BlockOperator, projections: list[GraphProjection]) -> None:
        self.operator, self.projections, self.n = operator, projections, program.samples
        targets = program.rows.chunk(len(projections), 1)
        self.project = [projection.at(y) for projection, y in zip(projections, targets, strict=True)]

    def set_weight(self, weight: float) -> None:
        r"""Take another penalty :math:`\rho_w` on Z - W."""
        for projection in self.projections:
            projection.set_ratio(self.n * weight)

    def balance(self) -> None:
        """There is no other penalty."""

    def __call__(self, w: Tensor) -> Tensor:
        """Z, for W plus its scaled multiplier."""
        return torch.cat([project(mine) for project, mine in zip(self.project, self.operator.split(w), strict=True)])

    def predictions(self, z: Tensor) -> Tensor:
        """Predictions (rows, c) at which the loss gradient is a dual point."""
        return self.operator.forward(z)


@dataclass(frozen=True)
class Iterate:
    """Where operator splitting stands: W, a point of low rank, its norm, and f, whose loss gradient is a dual point."""

    w: Tensor
    penalty: Tensor
    f: Tensor


@torch.no_grad()
def iterates(program: ConvexProgram, operator: BlockOperator, z: Tensor, residual: Tensor) -> Iterator[Iterate]:
    r"""Operator splitting without end, from lifted blocks z and a residual (rows, c): every tenth iterate.

    Args:
        program: supplies loss, targets and beta.
        operator: A, the program's own or its restriction to a core.
        z: where to start.
        residual: the loss gradient that starts the multipliers.
    """
    n, reduce, norm = program.samples, operator.reduce, BlockNuclearNorm()
    projections = [GraphProjection(block, reduce) for block in operator.maps]
    if isinstance(program.loss, SquaredLoss):
        fit = LeastSquares(program, operator, projections)
    else:
        fit = GraphForm(program, operator, projections, z, residual)
    # the penalty, from the loss's curvature and the size of the features; where no gate lets anything pass any penalty will do
    size = max(float(projection.gram.trace()) for projection in projections)
    size /= float(reduce(z.new_tensor(operator.maps[0].rows)))
    weight = PENALTY * program.loss.smoothness / n * (fit.ridge * size or 1.0)
    fit.set_weight(weight)
    # the scaled multiplier of Z = W, from the residual that the start implies
    dual = operator.adjoint(residual) / (n * weight)
    count, next_balance = 0, 10
    while True:
        for _ in range(CHECK_EVERY):
            w, penalty = norm.prox(z - dual, program.beta / weight)
            relaxed, last = RELAXATION * w + (1 - RELAXATION) * z, z
            z = fit(relaxed + dual)
            dual = dual + relaxed - z
        z, dual, w, penalty = reduce.agree(z, dual, w, penalty)
        yield Iterate(w, penalty, fit.predictions(z))

        count += CHECK_EVERY
        if count >= next_balance:
            next_balance *= 2
            scale = _balance(w - z, z - last, z, dual)
            weight, dual = weight * scale, dual / scale
            fit.balance()
            fit.set_weight(weight)


class Splitting(Method):
    """Operator splitting; a step is ten of its iterations."""

    title = "operator splitting"

    def steps(self, point: Tensor, run: Run) -> Iterator[Step]:
        """Ten iterations at a time, from lifted blocks."""
        program, operator, loss, norm = self.program, self.program.operator, self.program.loss, self.program.norm
        z, penalty = program.reduce.agree(point, norm.value(point))
        az = operator.forward(z)
        residual = loss.gradient(az, program.rows)
        if not run.history:
            value = program.data_loss(az) + program.beta * float(penalty)
            yield Step(z, value, [(residual, float(norm.dual(program.gradient(az))))], 1)
        for at in iterates(program, operator, z, residual):
            value = program.data_loss(operator.forward(at.w)) + program.beta * float(at.penalty)
            residual = loss.gradient(at.f, program.rows)
            spectral = float(norm.dual(operator.adjoint(residual))) / program.samples
            yield Step(at.w, value, [(residual, spectral)], CHECK_EVERY + 1)

    def words(self) -> str:
        """The sizes of blocks and design tensor."""
        k, p, q = self.program.operator.shape
        return f"{self.title} on {k} blocks of {p} x {q}, design tensor of {self.program.operator.rows} rows"


def _balance(primal: Tensor, dual: Tensor, point: Tensor, multiplier: Tensor, reduce: OneProcess = ALONE) -> float:
    """The factor on a penalty that evens out its relative primal and dual residuals."""
    tiny = torch.finfo(point.dtype).tiny
    squares = torch.stack([t.square().sum() for t in (primal, dual, point, multiplier)])
    primal, dual, point, multiplier = reduce(squares).sqrt()
    ratio = (primal / (point + tiny)) / (dual / (multiplier + tiny) + tiny)
    return float(ratio.clamp(1e-2, 1e2).sqrt())
