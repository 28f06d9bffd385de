r"""The regularisation path: one program solved at many beta, from :math:`\beta_{\max}` down, each point certified.

Every point starts from the one before, on the gates that matter there; its certificate is that of the program with all gates.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path as File

import torch
from torch import Tensor
from tqdm import tqdm

from cvxlib.audit.certificates import certify, predict
from cvxlib.audit.screening import GapSafeRule, move, restrict, separable
from cvxlib.ground.checks import float_tensor, instance, positive_float, positive_int, require
from cvxlib.ground.one_process import require_alone
from cvxlib.model.activations import GatedReLU
from cvxlib.program.certificate import Factors, Status
from cvxlib.program.program import ConvexProgram
from cvxlib.program.solution import Solution
from cvxlib.solvers import solve
from cvxlib.workflow.points import Point, Points

#: gates whose constraint is within this factor of the boundary join the gates that a point is solved on
NEAR = 0.95
#: a solve on fewer gates must leave out this share of them to be worth its own design tensor
WORTH = 0.2
#: lifted blocks with more entries are not decomposed for screening
LARGEST_BLOCK = 1_000_000


@dataclasses.dataclass(frozen=True)
class Path:
    """The result of :func:`path`: certified solutions along beta.

    Args:
        betas: (m,) weight decays of the finished points, largest first.
        solutions: one for each, of the given program at that beta.
        screened: (m,) lifted blocks that the point's certificate proves to be zero (0 without screening).
        solved: (m,) lifted blocks that the point was solved on; 0 where the point before was still within the tolerance.
        complete: whether every requested beta is there; false after an interrupt.
    """

    betas: Tensor
    solutions: list[Solution] = dataclasses.field(repr=False)
    screened: Tensor = dataclasses.field(repr=False)
    solved: Tensor = dataclasses.field(repr=False)
    complete: bool = True

    def __len__(self) -> int:
        return len(self.solutions)

    def __iter__(self) -> Iterator[Solution]:
        return iter(self.solutions)

    @property
    def rank(self) -> Tensor:
        """(m,) heads of each recovered network."""
        return torch.tensor([solution.rank for solution in self.solutions])

    @property
    def objective(self) -> Tensor:
        """(m,) regularised objectives."""
        return torch.tensor([solution.objective for solution in self.solutions], dtype=torch.float64)

    @property
    def relative_gap(self) -> Tensor:
        """(m,) certified relative gaps."""
        return torch.tensor([s.certificate.relative_gap for s in self.solutions], dtype=torch.float64)

    def accuracy(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """(m,) share of labels that each network predicts as its largest output.

        Args:
            tokens: (n', s, d), of test samples say.
            labels: (n',) class indices, or (n', a) per token.
        """
        labels = torch.as_tensor(labels)
        shares = []
        for solution in self.solutions:
            program = solution.program
            found = predict(solution.head(), program.mixer.check(tokens).to(program.tokens)).argmax(-1)
            require(found.shape == labels.shape, "labels", f"shape {tuple(found.shape)}", labels)
            shares.append((found == labels.to(found.device)).double().mean())
        return torch.stack(shares).cpu() if shares else torch.zeros(0, dtype=torch.float64)


def path(
    program: ConvexProgram,
    *,
    betas: Sequence[float] | Tensor | None = None,
    count: int = 20,
    ratio: float = 1e-3,
    tol: float = 1e-3,
    solver: str | None = None,
    screen: bool = True,
    checkpoint: str | os.PathLike | None = None,
    progress: bool | None = None,
) -> Path:
    r"""Solve a program along a sequence of weight decays, each point to the same certified relative gap.

    A point starts from the solution before it, whose dual point, scaled to the new beta, is a lower bound before anything is solved.

    With ``screen`` a point is solved on the gates that carry weight or are near their constraint, without those that the gap-safe
    rule (:func:`cvxlib.screen`) proves to be zero; its dual point is then checked against *all* gates, and gates that it violates
    join. Ctrl-C ends the path with the points finished so far.

    Args:
        program: what to solve; its own beta plays no part.
        betas: weight decays, largest first; by default ``count`` of them, geometrically from beta_max to ``ratio`` times beta_max.
        count: number of points.
        ratio: last beta over the first, between 0 and 1.
        tol: certified relative gap of each point.
        solver: as in :func:`cvxlib.solve`.
        screen: solve on fewer gates where that pays; only a gated ReLU has gates to leave out.
        checkpoint: a folder for the finished points; a second call with the same arguments goes on after the last of them.
        progress: show a bar over the points; by default only on a terminal.

    Returns:
        The path.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: an argument out of range, or a checkpoint of another program, other betas or other options.

    Source: book, chapter "The regularisation path".
    """
    instance("program", program, ConvexProgram, "a ConvexProgram")
    require_alone("program", program.reduce)
    tol = positive_float("tol", tol)
    instance("screen", screen, bool, "True or False")
    if checkpoint is not None:
        instance("checkpoint", checkpoint, (str, os.PathLike), "the path of a folder, or None")
    grid, points, complete = [], [], False
    bar = tqdm(desc="path", disable=None if progress is None else not progress, delay=1)
    try:
        grid, folder = _grid(program, betas, count, ratio), None
        if checkpoint is not None:
            options = {"betas": grid, "tol": tol, "solver": solver, "screen": screen}
            folder = Points(File(checkpoint), program, options)
            points = folder.read()
        walk = _Walk(program, tol, solver, screen)
        bar.reset(len(grid))
        bar.update(len(points))
        for beta in grid[len(points) :]:
            point = walk.step(program.with_beta(beta), points[-1].solution if points else None)
            if point.solution.status is Status.INTERRUPTED:
                break
            if folder:
                folder.write(len(points), point)
            points.append(point)
            bar.update()
            bar.set_postfix_str(f"beta {beta:.2e}, rank {point.solution.rank}")
        complete = len(points) == len(grid)
    except KeyboardInterrupt:
        pass  # the points finished so far are the answer
    finally:
        bar.close()
    return Path(
        betas=torch.tensor(grid[: len(points)], dtype=torch.float64),
        solutions=[point.solution for point in points],
        screened=torch.tensor([point.screened for point in points], dtype=torch.long),
        solved=torch.tensor([point.solved for point in points], dtype=torch.long),
        complete=complete,
    )


def _grid(program: ConvexProgram, betas: object, count: int, ratio: float) -> list[float]:
    """The weight decays, largest first."""
    if betas is None:
        count = positive_int("count", count)
        ratio = positive_float("ratio", ratio)
        require(ratio < 1, "ratio", "a number between 0 and 1", ratio)
        top = program.beta_max()
        require(0 < top < math.inf, "program", "one with a finite beta_max above 0 (or give betas)", f"{top}")
        return [top * ratio ** (k / max(count - 1, 1)) for k in range(count)]
    if not isinstance(betas, (list, tuple)):
        betas = float_tensor("betas", betas, ("m",)).tolist()
    betas = [positive_float("betas", beta) for beta in betas]
    falling = all(one > other for one, other in itertools.pairwise(betas))
    require(len(betas) > 0 and falling, "betas", "one or more numbers, each less than the one before", betas)
    return betas


class _Walk:
    """One point after another."""

    def __init__(self, program: ConvexProgram, tol: float, solver: str | None, screen: bool) -> None:
        self.tol, self.solver = tol, solver
        fixed = isinstance(program.activation, GatedReLU)
        #: the lifted blocks K, where they are known
        self.blocks = program.operator.shape[0] if program.enumerated else program.mixer.blocks
        self.small = program.mixer.p * program.mixer.q <= LARGEST_BLOCK
        self.rule = GapSafeRule(program) if screen and fixed and self.small and separable(program) else None
        self.last: tuple[list[int], ConvexProgram] = ([], program)

    def step(self, program: ConvexProgram, previous: Solution | None) -> Point:
        """The next point, from the one before."""
        if not self.small:
            return Point(self.solve(program, self.tol, previous), 0, self.blocks)
        if previous is None:
            warm = _zero(program)
        else:
            warm = _certified(program, previous.factors, previous.certificate.dual_point)
        if warm.certificate.relative_gap <= self.tol:
            solution, solved = warm, 0
        elif self.rule is None:
            solution, solved = _better(self.solve(program, self.tol, warm), warm, self.tol), self.blocks
        else:
            solution, solved = self.on_few_gates(program, warm)
        screened = 0 if self.rule is None else int(self.rule(program, solution.certificate).sum())
        return Point(solution, screened, solved)

    def solve(self, program: ConvexProgram, tol: float, start: Solution | None) -> Solution:
        start = start if start is not None and len(start.factors) else None
        return solve(program, tol=tol, solver=self.solver, start=start, progress=False)

    def on_few_gates(self, program: ConvexProgram, start: Solution) -> tuple[Solution, int]:
        """The solution from the gates that matter, and the number of its lifted blocks: gates whose constraint it violates join."""
        zero = self.rule(program, start.certificate)
        norms = _constraints(program, start.certificate.dual_point)
        keep = norms >= NEAR * norms.max()
        keep[start.factors.block] = True
        keep &= ~zero
        evaluations, history = 0, []
        while True:
            some = self.part(program, keep)
            # what is left of the tolerance is for the dual point's way back to all gates
            tol = 0.8 * self.tol if some is not program else self.tol
            found = self.solve(some, tol, move(start, some))
            evaluations += found.evaluations
            bound = _better(_on_all_gates(found, program), start, self.tol)
            history.append((evaluations, bound.certificate.primal, bound.certificate.dual))
            solution = dataclasses.replace(
                bound,
                evaluations=evaluations,
                history=torch.tensor(history, dtype=torch.float64),
                solver=found.solver if some is program else f"{found.solver}, certified on all {self.blocks}",
            )
            certified = solution.certificate.relative_gap <= self.tol
            if certified or some is program or found.status is not Status.CERTIFIED:
                return solution, some.operator.shape[0]
            violated = _constraints(program, found.certificate.dual_point) > program.beta
            more = keep | (violated & ~zero)
            keep = more if bool((more != keep).any()) else torch.ones_like(keep)
            start = solution

    def part(self, program: ConvexProgram, keep: Tensor) -> ConvexProgram:
        """The program with the gates of some lifted blocks (K,) only, or as it is where too few are left out."""
        gates = program.operator.gate[keep].unique()
        few = 0 < len(gates) <= (1 - WORTH) * len(program.operator.gate.unique())
        if not few:
            return program
        if gates.tolist() != self.last[0]:  # neighbouring points often need the same gates
            self.last = gates.tolist(), restrict(program, gates)
        return self.last[1].with_beta(program.beta)


def _zero(program: ConvexProgram) -> Solution:
    """The program's point 0, with the bound that its residual gives."""
    mixer, tokens = program.mixer, program.tokens
    factors = Factors(
        tokens.new_zeros(0, *mixer.shape),
        tokens.new_zeros(0, mixer.width, mixer.block_outputs),
        torch.zeros(0, dtype=torch.long, device=tokens.device),
    )
    predictions = tokens.new_zeros(len(program.rows), mixer.outputs)
    return _certified(program, factors, program.loss.gradient(predictions, program.rows))


def _certified(program: ConvexProgram, factors: Factors, point: Tensor) -> Solution:
    """Factors as a solution, certified with a dual point that is scaled to feasibility for all gates of the program."""
    certificate = certify(program, program.head(factors), point)
    history = torch.tensor([[0, certificate.primal, certificate.dual]], dtype=torch.float64)
    return Solution(program, factors, certificate, Status.CERTIFIED, "the point before", 0, history)


def _better(found: Solution, warm: Solution, tol: float) -> Solution:
    """A solution with the better of its own lower bound and that of another point of the same program."""
    best, other = found.certificate, warm.certificate
    if other.dual > best.dual:
        best = dataclasses.replace(best, dual=other.dual, dual_point=other.dual_point, assurance=other.assurance)
    short = found.status in (Status.ITERATION_LIMIT, Status.STALLED) and best.relative_gap <= tol
    return dataclasses.replace(found, certificate=best, status=Status.CERTIFIED if short else found.status)


def _on_all_gates(found: Solution, program: ConvexProgram) -> Solution:
    """A solution on some gates of a program as one of the program, certified on all of them."""
    if found.program is program:
        return found
    moved = move(found, program)
    bound = _certified(program, moved.factors, found.certificate.dual_point)
    return dataclasses.replace(moved, certificate=bound.certificate)


def _constraints(program: ConvexProgram, point: Tensor) -> Tensor:
    r"""(K,) the sizes :math:`\|\tfrac1n A_k^*\rho\|_2` that beta limits."""
    return program.norm.spectral(program.adjoint(point.to(program.tokens))) / program.samples
