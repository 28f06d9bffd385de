"""Solvers of convex programs, one file each, behind one door.

The AdamW baseline that they are compared with is here too. May import everything from the ground to ``parallel``.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from cvxlib.ground.checks import instance, positive_float, positive_int, require
from cvxlib.model.activations import ReLU
from cvxlib.program.program import ConvexProgram
from cvxlib.program.solution import Solution
from cvxlib.solvers import proximal, relu, splitting, staircase
from cvxlib.solvers._checkpoint import Checkpoint
from cvxlib.solvers.cost import choose
from cvxlib.solvers.scaling import Scaling

#: name of a solver, and the function that runs it
SOLVERS = {
    "splitting": splitting.solve,
    "staircase": staircase.solve,
    "proximal": proximal.solve,
    "relu": relu.solve,
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

    Ctrl-C ends the solve early with the best certified iterate and the status ``INTERRUPTED``; with a ``checkpoint`` a later call goes on.

    Args:
        program: what to solve.
        tol: certified relative gap at which to stop, greater than 0.
        max_iterations: limit on the evaluations of the predictions.
        solver: ``"splitting"`` (few iterations, factors a Gram matrix), ``"staircase"`` (on factors, forms no design tensor) or
            ``"proximal"`` (first order, matrix products only); by default splitting or the staircase, by the operations and the memory
            that they are expected to take. ``"relu"`` (column generation over cones) is for ReLU, and only it.
        start: a solution of the same program, perhaps at another beta, to start from.
        checkpoint: a file that the state of a long solve is written to, whole or not at all: after every round of the staircase, every
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
    options = {"tol": tol, "max_iterations": max_iterations, "start": start}
    options["progress"] = progress if program.reduce.rank == 0 else False
    if checkpoint is not None:
        require(not cones, "checkpoint", "None for ReLU", str(checkpoint))
        options["checkpoint"] = Checkpoint(checkpoint, program, solver)
    with program.reduce.held():
        solution = scaling.back(SOLVERS[solver](program, **options))
    return replace(solution, solver=f"{solution.solver} ({reason})") if reason else solution
