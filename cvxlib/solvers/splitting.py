r"""Operator splitting (ADMM): the loss, the norm and the data each handled exactly, in turn.

The program is split as :math:`\min F(f) + \beta N(W)` subject to :math:`(f, W) = (A Z, Z)`. Each iteration takes the proximal
points of the loss (row by row) and of the norm (singular value thresholding), and projects onto the graph of A by one
triangular solve with a matrix that is factored once. Attention's features are cubic in the tokens and badly conditioned: the exact
projection makes the iteration count insensitive to that, which is where gradient methods crawl.

Source: Parikh and Boyd 2014, "Block splitting for distributed optimization" (graph form); residual balancing as in Boyd et al. 2011,
section 3.4; book, chapter "Self-attention".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from cvxlib.factored import CoreOperator
from cvxlib.lifting import ALONE, LiftedOperator, OneProcess
from cvxlib.norms import BlockNuclearNorm
from cvxlib.programs import ConvexProgram
from cvxlib.solution import Certificate, Solution, Status
from cvxlib.solvers._checkpoint import Checkpoint
from cvxlib.solvers._finish import finish

CHECK_EVERY = 10
RELAXATION = 1.6


class GraphProjection:
    r"""The nearest point :math:`(AZ, Z)` to a given (f, W): :math:`\min_Z \|AZ - f\|^2 + r \|Z - W\|^2`, by Cholesky.

    Args:
        operator: A.
        ratio: r, greater than 0.
    """

    def __init__(self, operator: LiftedOperator | CoreOperator, ratio: float) -> None:
        self.operator = operator
        self.designs = [design.flatten(1) for design in operator.designs]
        # the smaller of the two Gram matrices carries the same information; only that of the columns is a sum over processes
        self.wide = [operator.reduce is ALONE and len(design) <= design.shape[1] for design in self.designs]
        self.grams = [
            t @ t.mT if wide else operator.reduce(t.mT @ t) for t, wide in zip(self.designs, self.wide, strict=True)
        ]
        self.set_ratio(ratio)

    def set_ratio(self, ratio: float) -> None:
        """Factor afresh for another r."""
        self.ratio = ratio
        self.factors = []
        for gram in self.grams:
            shifted = gram.clone()
            shifted.diagonal().add_(ratio)
            self.factors.append(torch.linalg.cholesky(shifted))

    def __call__(self, f: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """(rows, c) A Z and (K, p, q) Z, for f (rows, c) and W (K, p, q)."""
        targets = f.reshape(len(self.designs[0]), -1).chunk(len(self.designs), 1)
        blocks = w.split([design.shape[1] for design in self.operator.designs])
        predictions, solutions = [], []
        for t, wide, factor_, target, block in zip(self.designs, self.wide, self.factors, targets, blocks, strict=True):
            start = block.reshape(t.shape[1], -1)
            error = target - t @ start
            if wide:
                multiplier = torch.cholesky_solve(error, factor_)
                z, prediction = start + t.mT @ multiplier, target - self.ratio * multiplier
            else:
                z = start + torch.cholesky_solve(self.operator.reduce(t.mT @ error), factor_)
                prediction = t @ z
            predictions.append(prediction)
            solutions.append(z.reshape(block.shape))
        return torch.cat(predictions, 1).reshape(f.shape), torch.cat(solutions)


@dataclass(frozen=True)
class Iterate:
    """Where operator splitting stands: W, a point of low rank, its norm, and f, whose loss gradient is a dual point."""

    w: Tensor
    penalty: Tensor
    f: Tensor


@torch.no_grad()
def iterates(
    program: ConvexProgram, operator: LiftedOperator | CoreOperator, z: Tensor, residual: Tensor
) -> Iterator[Iterate]:
    r"""Operator splitting without end, from lifted blocks z and a residual (rows, c): every tenth iterate.

    Args:
        program: supplies loss, targets and beta.
        operator: A, the program's own or its restriction to a core.
        z: where to start.
        residual: the loss gradient that starts the multipliers.
    """
    loss, rows, n, reduce = program.loss, program.rows, program.samples, operator.reduce
    norm = BlockNuclearNorm()
    az = operator.forward(z)

    # penalties: rho_f of the loss's own curvature; rho_w from the size of the features
    rho_f = 0.2 * loss.smoothness / n
    size = max(float(reduce(design.square().sum())) for design in operator.designs)
    rho_w = rho_f * 0.02 * size / float(reduce(z.new_tensor(len(operator.designs[0]))))
    rho_w = rho_w or rho_f  # no gate lets anything pass: any penalty will do
    project = GraphProjection(operator, rho_w / rho_f)
    # the scaled multipliers of the two constraints, from the residual that the start implies
    dual_f = -residual / (n * rho_f)
    dual_w = operator.adjoint(residual) / (n * rho_w)
    f, count, next_balance = az, 0, 10
    while True:
        for _ in range(CHECK_EVERY):
            f = loss.prox(az - dual_f, rows, n * rho_f, start=f)
            w, penalty = norm.prox(z - dual_w, program.beta / rho_w)
            relaxed_f = RELAXATION * f + (1 - RELAXATION) * az
            relaxed_w = RELAXATION * w + (1 - RELAXATION) * z
            last_z, last_az = z, az
            az, z = project(relaxed_f + dual_f, relaxed_w + dual_w)
            dual_f, dual_w = dual_f + relaxed_f - az, dual_w + relaxed_w - z
        z, dual_w, w, penalty = reduce.agree(z, dual_w, w, penalty)
        yield Iterate(w, penalty, f)

        count += CHECK_EVERY
        if count >= next_balance:
            next_balance *= 2
            scale_f = _balance(f - az, az - last_az, az, dual_f, reduce)
            scale_w = _balance(w - z, z - last_z, z, dual_w)
            rho_f, dual_f = rho_f * scale_f, dual_f / scale_f
            rho_w, dual_w = rho_w * scale_w, dual_w / scale_w
            project.set_ratio(rho_w / rho_f)


@torch.no_grad()
def solve(
    program: ConvexProgram,
    *,
    tol: float,
    max_iterations: int,
    start: Solution | None = None,
    checkpoint: Checkpoint | None = None,
    progress: bool | None = None,
) -> Solution:
    """Solve a program by operator splitting; arguments as :func:`cvxlib.solve`."""
    operator, loss, rows, norm, n = program.operator, program.loss, program.rows, program.norm, program.samples
    best = operator.zeros() if start is None else start.lifted.to(program.tokens)
    saved = checkpoint.read_lifted() if checkpoint else None
    if saved:
        best = saved[0]
    best, penalty = program.reduce.agree(best, norm.value(best))
    az = operator.forward(best)
    value = program.data_loss(az) + program.beta * float(penalty)
    residual = loss.gradient(az, rows)
    best_dual, best_point = program.feasible_dual(residual, float(norm.dual(program.gradient(az))))
    history, evaluations, status = [(1, value, best_dual)], 1, Status.ITERATION_LIMIT
    if saved:
        _, best_dual, best_point, evaluations, history = saved
    steps = iterates(program, operator, best, residual)
    bar = tqdm(
        total=max_iterations, desc="operator splitting", disable=None if progress is None else not progress, delay=1
    )
    try:
        while True:
            gap = Certificate(value, best_dual).relative_gap
            bar.set_postfix_str(f"gap {gap:.1e}")
            if gap <= tol:
                status = Status.CERTIFIED
                break
            if evaluations >= max_iterations:
                break
            step = next(steps)
            evaluations += CHECK_EVERY + 1
            bar.update(CHECK_EVERY + 1)

            new_value = program.data_loss(operator.forward(step.w)) + program.beta * float(step.penalty)
            if new_value < value:
                best, value = step.w, new_value
            residual = loss.gradient(step.f, rows)
            dual, point = program.feasible_dual(residual, float(norm.dual(operator.adjoint(residual))) / n)
            if dual > best_dual:
                best_dual, best_point = dual, point
            history.append((evaluations, value, best_dual))
            if checkpoint and checkpoint.due:
                checkpoint.write_lifted(best, best_dual, best_point, evaluations, history)
    except KeyboardInterrupt:
        status = Status.INTERRUPTED
    finally:
        bar.close()
    if checkpoint:
        checkpoint.write_lifted(best, best_dual, best_point, evaluations, history)

    k, p, q = operator.shape
    name = f"operator splitting on {k} blocks of {p} x {q}, design tensor of {operator.rows} rows"
    certificate = Certificate(value, best_dual, best_point, best.dtype)
    return finish(program, best, certificate, status, name, evaluations, history, tol)


def _balance(primal: Tensor, dual: Tensor, point: Tensor, multiplier: Tensor, reduce: OneProcess = ALONE) -> float:
    """The factor on a penalty that evens out its relative primal and dual residuals."""
    tiny = torch.finfo(point.dtype).tiny
    squares = torch.stack([t.square().sum() for t in (primal, dual, point, multiplier)])
    primal, dual, point, multiplier = reduce(squares).sqrt()
    ratio = (primal / (point + tiny)) / (dual / (multiplier + tiny) + tiny)
    return float(ratio.clamp(1e-2, 1e2).sqrt())
