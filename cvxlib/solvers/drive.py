r"""The one loop behind every solver: a method only steps, and everything else is here.

A :class:`Method` yields one :class:`Step` after another: a candidate with its objective, and residuals along which a feasible dual point may
lie. :func:`solve_by` keeps the best candidate and the best bound, writes history, bar and checkpoint, and decides when to stop: at the
tolerance, confirmed by an audit in double precision; at the limit; where rounding allows no progress; or on Ctrl-C, whatever was going on.

Source: the split into a driver and methods that step is that of optimistix (Rader, Lyons and Kidger 2024).
"""

from __future__ import annotations

import abc
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from tqdm import tqdm

from cvxlib.programs import ConvexProgram
from cvxlib.recovery import factor
from cvxlib.solution import Certificate, Factors, Solution, Status
from cvxlib.solvers._checkpoint import Checkpoint

#: evaluations between two steps of a method whose iterations are short: a bound costs as much as an iteration
CHECK_EVERY = 10
#: steps that single precision has in any case, of methods whose steps are short
STALL_STEPS = 90
#: a step brings something if it leaves less than this fraction of the relative gap
PROGRESS = 0.99


@dataclass(frozen=True)
class Step:
    r"""What a method knows after a step.

    Args:
        point: a candidate, lifted blocks (K, p, q) or factors.
        value: the regularised objective there, an upper bound on the optimum.
        rays: pairs of a residual (rows, c), loss gradients at any predictions, and its dual norm
            :math:`\max_k \|\tfrac1n A_k^*\rho\|`; the driver takes the best feasible point along each.
        evaluations: how many evaluations of the predictions the step took.
        note: for the bar.
    """

    point: Tensor | Factors
    value: float
    rays: list[tuple[Tensor, float]]
    evaluations: int
    note: str = ""


@dataclass
class Run:
    """Where a solve stands: the driver writes it, methods read it.

    Args:
        program: what is solved.
        tol: the certified relative gap asked for.
        limit: on the evaluations.
        aim: the relative gap at which to stop; below ``tol`` once an audit has found the gap a little wider.
        point: the best candidate.
        primal: its objective.
        dual: the best lower bound.
        dual_point: (rows, c) where it is attained.
        history: evaluations, primal and dual after every step.
        saved: tensors and numbers that the method wrote down (:meth:`Method.state`), if the solve goes on from a file.
    """

    program: ConvexProgram
    tol: float
    limit: int
    aim: float
    point: Tensor | Factors | None = None
    primal: float = math.inf
    dual: float = -math.inf
    dual_point: Tensor | None = None
    history: list[tuple[int, float, float]] = field(default_factory=list)
    saved: tuple[dict[str, Tensor], dict] | None = None

    @property
    def gap(self) -> float:
        """The relative gap, in the arithmetic of the tokens."""
        return Certificate(self.primal, self.dual).relative_gap

    @property
    def evaluations(self) -> int:
        """So far."""
        return self.history[-1][0] if self.history else 0

    @property
    def left(self) -> int:
        """Evaluations up to the limit."""
        return self.limit - self.evaluations

    def take(self, step: Step) -> None:
        """Keep what is better than before."""
        if step.value < self.primal:
            self.point, self.primal = step.point, step.value
        for residual, norm in step.rays:
            dual, point = self.program.feasible_dual(residual, norm, rounding(residual.dtype))
            if dual > self.dual:
                self.dual, self.dual_point = dual, point
        self.history.append((self.evaluations + step.evaluations, self.primal, self.dual))


class Method(abc.ABC):
    """How to step; what a new solver has to say.

    Args:
        program: what is solved.
    """

    #: the bar's name
    title: ClassVar[str]
    #: whether a step takes long enough to be written down at once, with :meth:`state`
    long_steps: ClassVar[bool] = False
    #: steps that single precision has in any case
    patience: ClassVar[int] = STALL_STEPS

    def __init__(self, program: ConvexProgram) -> None:
        self.program = program
        #: relative gap and number of the last step that brought something
        self._progress = math.inf, 0

    @abc.abstractmethod
    def steps(self, point: Tensor | Factors | None, run: Run) -> Iterator[Step]:
        """One step after another, from a point; a method that can get no further returns.

        If ``run.history`` is empty the first step is the point itself; otherwise the point is the best of an earlier call, and known.
        """

    def start(self, solution: Solution | None) -> Tensor | Factors | None:
        """The point to start from: by default lifted blocks, zero if no solution is given."""
        if solution is None:
            return self.program.operator.zeros()
        return solution.lifted.to(self.program.tokens)

    def words(self) -> str:
        """Which method on what, for :attr:`cvxlib.Solution.solver`."""
        return self.title

    def state(self) -> tuple[dict[str, Tensor], dict]:
        """Tensors and numbers that the next step depends on, besides the best point; every process calls it."""
        return {}, {}

    def stalled(self, run: Run) -> bool:
        """Whether to give up: by default in single precision, when the second half of many steps has brought nothing."""
        gap, last = self._progress
        if run.gap < PROGRESS * gap:
            self._progress = run.gap, len(run.history)
            return False
        single = self.program.tokens.dtype != torch.float64
        return single and len(run.history) > max(self.patience, 2 * last)

    def status(self, status: Status, certificate: Certificate) -> Status:
        """How the solve is said to have ended."""
        return status

    @staticmethod
    def norm_at_zero(program: ConvexProgram, residual: Tensor) -> float:
        """The dual norm of the residual at Z = 0 or, where that takes long, infinity: it certifies a solve stopped before its first step."""
        return program.dual_norm(residual)


@torch.no_grad()
def solve_by(
    kind: type[Method],
    program: ConvexProgram,
    *,
    tol: float,
    max_iterations: int,
    start: Solution | None = None,
    checkpoint: str | Path | None = None,
    solver: str = "",
    progress: bool | None = None,
) -> Solution:
    """Let a method step until its certified gap is within the tolerance, or it must stop.

    Args:
        kind: the method; it is made here, so that Ctrl-C is minded while it prepares.
        program: what to solve.
        tol: certified relative gap.
        max_iterations: limit on the evaluations of the predictions.
        start: a solution to start from.
        checkpoint: a file to go on from and to write to.
        solver: the name under which the file keeps it.
        progress: show a bar; by default only on a terminal.

    Returns:
        The best point with its certificate. Where nothing has been computed yet, the point is Z = 0.

    Raises:
        ValueError: the checkpoint is of another solve.
    """
    driver = _Driver(kind, Run(program, tol, max_iterations, tol))
    hidden = None if progress is None else not progress
    with tqdm(total=max_iterations, desc=kind.title, disable=hidden, delay=1) as bar:
        try:
            try:
                status = driver.loop(start, (checkpoint, solver), bar)
            except torch.linalg.LinAlgError:
                status = Status.STALLED  # a decomposition that rounding does not allow
            return driver.finish(status)
        except KeyboardInterrupt:
            return driver.finish(Status.INTERRUPTED)


class _Driver:
    """A method, its run, and the file of both."""

    def __init__(self, kind: type[Method], run: Run) -> None:
        self.kind, self.run, self.program = kind, run, run.program
        self.method: Method | None = None
        self.file: Checkpoint | None = None
        self.audited: tuple[tuple[float, float], Certificate] | None = None

    def loop(self, start: Solution | None, file: tuple[str | Path | None, str], bar: tqdm) -> Status:
        """Prepare, and step until there is a reason to stop."""
        run = self.run
        path, solver = file
        if path is not None:
            self.file = Checkpoint(path, self.program, solver)
            self.file.read_run(run)
        self.method = self.kind(self.program)
        point = self.method.start(start) if run.point is None else run.point
        for step in self._known(self.method.steps(point, run)):
            if step is not None:
                run.take(step)
                if self.file and (self.method.long_steps or self.file.due):
                    self.file.write_run(run, self.method.state())
            bar.update(run.evaluations - bar.n)
            bar.set_postfix_str(", ".join(filter(None, [step.note if step else "", f"gap {run.gap:.1e}"])))
            status = self.verdict()
            if status is not None:
                return status
        return Status.STALLED

    def _known(self, steps: Iterator[Step]) -> Iterator[Step | None]:
        """The steps, after a look at what an earlier call has left."""
        if self.run.history:
            yield None
        yield from steps

    def verdict(self) -> Status | None:
        """Why to stop now, if at all."""
        run = self.run
        if run.gap <= run.aim:
            if self.audit().relative_gap <= run.tol:
                return Status.CERTIFIED
            run.aim /= 2  # double precision finds the gap a little wider
            if run.aim < torch.finfo(self.program.tokens.dtype).eps:
                return Status.STALLED
        if self.method.stalled(run):
            return Status.STALLED
        return Status.ITERATION_LIMIT if run.left <= 0 else None

    def finish(self, status: Status) -> Solution:
        """The solution at the best point, audited."""
        run, program = self.run, self.program
        # a method with long steps has written its last one, and a half-done one cannot be written
        if self.file and run.point is not None and not self.method.long_steps:
            self.file.write_run(run, self.method.state())
        if run.point is None:
            factors, certificate = self.zero()
        else:
            factors, certificate = self.factors(), self.audit()
        if status in (Status.STALLED, Status.ITERATION_LIMIT) and certificate.relative_gap <= run.tol:
            status = Status.CERTIFIED
        return Solution(
            program=program,
            factors=factors,
            certificate=certificate,
            status=self.method.status(status, certificate) if self.method else status,
            solver=self.method.words() if self.method and run.history else self.kind.title,
            evaluations=run.evaluations,
            history=torch.tensor(run.history, dtype=torch.float64).reshape(-1, 3),
        )

    def factors(self) -> Factors:
        """The best point as rank-one terms."""
        if isinstance(self.run.point, Factors):
            return self.run.point
        found = factor(self.program.mixer, self.run.point)
        return Factors(*self.program.reduce.agree(found.u, found.v, found.block))

    def audit(self) -> Certificate:
        """The certificate of the best point, in double precision: by its dual point, or by its own residual where that is needed."""
        run = self.run
        if self.program.tokens.dtype == torch.float64:
            return Certificate(run.primal, run.dual, run.dual_point)
        if self.audited is None or self.audited[0] != (run.primal, run.dual):
            exact, found = self.program.in_double(), self.factors()
            u, v, k = found.u.flatten(1).double(), found.v.double(), found.block.cpu()
            predictions = _predictions(exact, u, v, k)
            (squares,) = exact.reduce.agree(u.square().sum() + v.square().sum())
            primal = exact.data_loss(predictions) + exact.beta / 2 * float(squares)
            candidates = [exact.loss.gradient(predictions, exact.rows)]
            if run.dual_point is not None:
                candidates.append(exact.loss.to_domain(run.dual_point.double(), exact.rows))
            best = Certificate(primal, -math.inf)
            while candidates and not best.relative_gap <= run.tol:
                point = candidates.pop()
                dual, point = exact.feasible_dual(point, exact.dual_norm(point))
                if dual > best.dual:
                    best = Certificate(primal, dual, point)
            self.audited = (run.primal, run.dual), best
        return self.audited[1]

    def zero(self) -> tuple[Factors, Certificate]:
        """The point Z = 0, and the bound that its residual gives."""
        exact, mixer, like = self.program.in_double(), self.program.mixer, self.program.tokens
        u, v = like.new_zeros(0, *mixer.shape), like.new_zeros(0, mixer.width, mixer.block_outputs)
        factors = Factors(u, v, torch.zeros(0, dtype=torch.long, device=like.device))
        predictions = like.new_zeros(len(exact.rows), mixer.outputs, dtype=torch.float64)
        residual = exact.loss.gradient(predictions, exact.rows)
        dual, point = exact.feasible_dual(residual, self.kind.norm_at_zero(exact, residual))
        return factors, Certificate(exact.data_loss(predictions), dual, point)


def _predictions(program: ConvexProgram, u: Tensor, v: Tensor, k: Tensor) -> Tensor:
    """(rows, c) of factors; without any there is nothing to contract."""
    if len(u):
        return program.factored.predictions(u, v, k)
    return u.new_zeros(len(program.rows), program.mixer.outputs)


def rounding(dtype: torch.dtype) -> float | None:
    """The slack of dual bounds during a solve: in single precision a small one, because the audit has the last word."""
    return None if dtype == torch.float64 else 16 * torch.finfo(dtype).eps
