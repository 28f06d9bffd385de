r"""Solvers of convex programs, one file each, behind one door.

A method only steps. It is a :class:`cvxlib.solvers.drive.Method` whose generator ``steps`` yields, from a given point on, one
:class:`cvxlib.solvers.run.Step` after another: a candidate (lifted blocks or factors) with its objective, residuals with their dual norms,
and the evaluations that this took. It may read where the solve stands (the gap, the aim, the evaluations left), and says in ``state`` what
its next step depends on if that is more than the best point. All the rest is the driver's and written once: the best candidate and bound,
the slack for rounding and the audit that has the last word, the tighter aim after an audit that failed, the limit, stalling, history, bar,
checkpoint, and Ctrl-C from the first preparation to the audit.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from cvxlib.ground.checks import instance, positive_float, positive_int, require
from cvxlib.model.activations import ReLU
from cvxlib.program.certificate import Factors
from cvxlib.program.program import ConvexProgram
from cvxlib.program.solution import Solution
from cvxlib.solvers.cost import choose
from cvxlib.solvers.drive import Method, solve_by
from cvxlib.solvers.proximal import Proximal
from cvxlib.solvers.relu import ColumnGeneration
from cvxlib.solvers.scaling import Scaling
from cvxlib.solvers.splitting import Splitting
from cvxlib.solvers.staircase import Staircase

#: name of a solver, and the method that it drives
SOLVERS: dict[str, type[Method]] = {
    "splitting": Splitting,
    "staircase": Staircase,
    "proximal": Proximal,
    "relu": ColumnGeneration,
}


def solve(
    program: ConvexProgram,
    *,
    tol: float = 1e-4,
    max_iterations: int = 20_000,
    solver: str | None = None,
    start: Solution | None = None,
    checkpoint: str | Path | None = None,
    progress: bool | None = None,
) -> Solution:
    r"""Solve a convex program to a certified relative gap.

    .. math:: \frac{\text{primal} - \text{dual}}{\max(|\text{primal}|, |\text{dual}|)} \le \text{tol}

    Ctrl-C ends the solve early with the best certified iterate (Z = 0 while it still prepares) and the status ``INTERRUPTED``; with a
    ``checkpoint`` a later call goes on.

    Args:
        program: what to solve.
        tol: certified relative gap at which to stop, greater than 0.
        max_iterations: limit on the evaluations of the predictions.
        solver: ``"splitting"`` (few iterations, factors a Gram matrix), ``"staircase"`` (on factors, forms no design tensor) or
            ``"proximal"`` (first order, matrix products only); by default splitting or the staircase, by the operations and the memory
            that they are expected to take. ``"relu"`` (column generation over cones) is for ReLU, and only it.
        start: a solution of the same program, perhaps at another beta, to start from.
        checkpoint: a file that the state of a long solve is written to, whole or not at all: after every step of the staircase, every
            half minute by the others, and at the end or on Ctrl-C. A solve that finds the file goes on from there. Not for ReLU.
        progress: show a bar; by default only on a terminal.

    Returns:
        The solution with its certificate; ``status`` tells how the solve ended.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or range, or a checkpoint of another solve.
    """
    instance("program", program, ConvexProgram, "a ConvexProgram")
    tol = positive_float("tol", tol)
    max_iterations = positive_int("max_iterations", max_iterations)
    require(solver is None or solver in SOLVERS, "solver", f"one of {', '.join(map(repr, SOLVERS))} or None", solver)
    cones = isinstance(program.activation, ReLU)
    require(
        solver is None or cones == (solver == "relu"),
        "solver",
        "'relu' for ReLU(), and another for fixed gates",
        solver,
    )
    if start is not None:
        instance("start", start, Solution, "a Solution or None")
        require(
            cones == isinstance(start.program.activation, ReLU),
            "start",
            f"one with {program.activation!r}",
            f"one with {start.program.activation!r}",
        )
    if start is not None and not cones:
        require(
            start.program.operator.shape == program.operator.shape,
            "start",
            f"a solution with lifted blocks {program.operator.shape}",
            f"one with lifted blocks {start.program.operator.shape}",
        )
    scaling, reason = Scaling.of(program), None
    program, start = scaling.scaled(), scaling.there(start)
    if solver is None:
        solver, reason = ("relu", None) if cones else choose(program)
    require(checkpoint is None or not cones, "checkpoint", "None for ReLU", str(checkpoint))
    exact = program.double() if cones else program  # cones are searched through in double precision only
    with program.reduce.held():
        solution = solve_by(
            SOLVERS[solver],
            exact,
            tol=tol,
            max_iterations=max_iterations,
            start=start,
            checkpoint=checkpoint,
            solver=solver,
            progress=progress if program.reduce.rank == 0 else False,
        )
    if exact is not program:
        found = solution.factors
        factors = Factors(found.u.to(program.tokens), found.v.to(program.tokens), found.block)
        solution = replace(solution, program=program, factors=factors)
    solution = scaling.back(solution)
    return replace(solution, solver=f"{solution.solver} ({reason})") if reason else solution
