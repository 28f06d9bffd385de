r"""Accelerated proximal gradient on the lifted blocks: monotone, with backtracking and adaptive restart.

The right solver where the blocks p x q are small enough for their singular value decompositions to be cheap.
Sources: Beck and Teboulle 2009 (monotone FISTA); O'Donoghue and Candes 2015 (adaptive restart).
"""

from __future__ import annotations

import torch
from tqdm import tqdm

from cvxlib.program.certificate import Certificate, Status
from cvxlib.program.program import ConvexProgram
from cvxlib.program.solution import Solution
from cvxlib.solvers._checkpoint import Checkpoint
from cvxlib.solvers._finish import finish

CHECK_EVERY = 10


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
    """Solve a program by monotone FISTA; arguments as :func:`cvxlib.solve`."""
    operator, loss, rows, n, agree = program.operator, program.loss, program.rows, program.samples, program.reduce.agree
    eps = torch.finfo(program.tokens.dtype).eps

    x = operator.zeros() if start is None else start.lifted.to(program.tokens)
    saved = checkpoint.read_lifted() if checkpoint else None
    if saved:
        x = saved[0]
    x, penalty = agree(x, program.norm.value(x))
    ax = operator.forward(x)
    value = program.data_loss(ax) + program.beta * float(penalty)
    y, ay, momentum = x, ax, 1.0
    lipschitz = _first_lipschitz(program)
    residual = loss.gradient(ax, rows)
    best_dual, best_point = program.feasible_dual(residual, float(program.norm.dual(program.gradient(ax))))
    history = [(1, value, best_dual)]
    evaluations, status = 1, Status.ITERATION_LIMIT
    if saved:
        _, best_dual, best_point, evaluations, history = saved

    bar = tqdm(
        total=max_iterations, desc="proximal gradient", disable=None if progress is None else not progress, delay=1
    )
    try:
        while evaluations < max_iterations:
            residual = loss.gradient(ay, rows)
            gradient = operator.adjoint(residual) / n
            if evaluations >= history[-1][0] + CHECK_EVERY:
                # the residual at any point gives a feasible dual point, so the one at y serves x as well
                dual, point = program.feasible_dual(residual, float(program.norm.dual(gradient)))
                if dual > best_dual:
                    best_dual, best_point = dual, point
                history.append((evaluations, value, best_dual))
                if checkpoint and checkpoint.due:
                    checkpoint.write_lifted(x, best_dual, best_point, evaluations, history)
                gap = Certificate(value, best_dual).relative_gap
                bar.set_postfix_str(f"gap {gap:.1e}")
                if gap <= tol:
                    status = Status.CERTIFIED
                    break

            at_y = program.data_loss(ay)
            while True:
                z, penalty = program.norm.prox(y - gradient / lipschitz, program.beta / lipschitz)
                step = z - y
                products = torch.stack([(gradient * step).sum(), step.square().sum(), (step * (z - x)).sum()])
                z, penalty, products = agree(z, penalty, products)
                az = operator.forward(z)
                evaluations += 1
                bar.update()
                at_z = program.data_loss(az)
                bound = float(products[0]) + lipschitz / 2 * float(products[1])
                if at_z <= at_y + bound + 8 * eps * abs(at_y) or evaluations >= max_iterations:
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
    except KeyboardInterrupt:
        status = Status.INTERRUPTED
    finally:
        bar.close()
    if checkpoint:
        checkpoint.write_lifted(x, best_dual, best_point, evaluations, history)

    k, p, q = operator.shape
    name = f"proximal gradient on {k} blocks of {p} x {q}, design tensor of {operator.rows} rows"
    certificate = Certificate(value, best_dual, best_point, x.dtype)
    return finish(program, x, certificate, status, name, evaluations, history, tol)


def _first_lipschitz(program: ConvexProgram) -> float:
    """A lower estimate of the gradient's Lipschitz constant by a few power iterations; backtracking does the rest."""
    operator = program.operator
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(operator.shape, generator=generator, dtype=torch.float64).to(program.tokens)
    for _ in range(5):
        z = operator.adjoint(operator.forward(z / z.norm()))
    (norm,) = program.reduce.agree(z.norm())
    return max(program.loss.smoothness * float(norm) / program.samples, torch.finfo(z.dtype).tiny)
