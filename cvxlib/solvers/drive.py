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
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from tqdm import tqdm

from cvxlib.program.certificate import Certificate, Factors, Status
from cvxlib.program.program import ConvexProgram
from cvxlib.program.recovery import factor
from cvxlib.program.solution import Solution
from cvxlib.solvers._checkpoint import Checkpoint
from cvxlib.solvers.run import Run, Step

#: evaluations between two steps of a method whose iterations are short: a bound costs as much as an iteration
CHECK_EVERY = 10
#: steps that single precision has in any case, of methods whose steps are short
STALL_STEPS = 90
#: a step brings something if it leaves less than this fraction of the relative gap
PROGRESS = 0.99


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
        history = torch.tensor(run.history, dtype=torch.float64).reshape(-1, 3)
        history[:, 2].clamp_(
            max=certificate.dual
        )  # bounds met on the way hold to rounding; none says more than what is proved
        return Solution(
            program=program,
            factors=factors,
            certificate=certificate,
            status=self.method.status(status, certificate) if self.method else status,
            solver=self.method.words() if self.method and run.history else self.kind.title,
            evaluations=run.evaluations,
            history=history,
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
        if self.audited is None or self.audited[0] != (run.primal, run.dual):
            self.audited = (run.primal, run.dual), self._audit()
        return self.audited[1]

    def _audit(self) -> Certificate:
        run = self.run
        if self.program.tokens.dtype == torch.float64:
            if run.dual_point is None:
                return Certificate(run.primal, run.dual)
            return self.program.certify_point(run.primal, run.dual_point)
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
            found = exact.certify_point(primal, exact.feasible_dual(point, exact.dual_norm(point))[1])
            best = max(best, found, key=lambda certificate: certificate.dual)
        return best

    def zero(self) -> tuple[Factors, Certificate]:
        """The point Z = 0, and the bound that its residual gives."""
        exact, mixer, like = self.program.in_double(), self.program.mixer, self.program.tokens
        u, v = like.new_zeros(0, *mixer.shape), like.new_zeros(0, mixer.width, mixer.block_outputs)
        factors = Factors(u, v, torch.zeros(0, dtype=torch.long, device=like.device))
        predictions = like.new_zeros(len(exact.rows), mixer.outputs, dtype=torch.float64)
        residual = exact.loss.gradient(predictions, exact.rows)
        primal, norm = exact.data_loss(predictions), self.kind.norm_at_zero(exact, residual)
        dual, point = exact.feasible_dual(residual, norm)
        # without the norm only the dual point 0 is known to be feasible, and that needs no proof
        certificate = exact.certify_point(primal, point) if math.isfinite(norm) else Certificate(primal, dual, point)
        return factors, certificate


def _predictions(program: ConvexProgram, u: Tensor, v: Tensor, k: Tensor) -> Tensor:
    """(rows, c) of factors; without any there is nothing to contract."""
    if len(u):
        return program.factored.predictions(u, v, k)
    return u.new_zeros(len(program.rows), program.mixer.outputs)
