"""The driver: methods only step, and stopping, audits, interrupts, checkpoints and history are the same for all of them."""

import family
import pytest
import torch

import cvxlib
from cvxlib.geometry.norms import BlockNuclearNorm
from cvxlib.solvers import SOLVERS, drive
from cvxlib.solvers.drive import Method, solve_by
from cvxlib.solvers.run import Step

LIFTED = ["splitting", "proximal"]
SOLVER_NAMES = [*LIFTED, "staircase"]
Status = cvxlib.Status


def attention(n=40, gates=0, fraction=0.05, dtype=torch.float64, seed=0, loss=family.LOSSES[1], scale=1.0):
    spread = torch.arange(1, 5, dtype=torch.float64) ** -0.5
    mixer = cvxlib.SelfAttention(features=4, outputs=3)
    kind = cvxlib.GatedReLU.sample(mixer, gates) if gates else cvxlib.Linear()
    tokens = scale * family.normal(n, 5, 4, seed=seed) * spread
    made = family.program(mixer, kind, loss, tokens=tokens, fraction=fraction)
    targets = made.targets.to(dtype) if made.targets.is_floating_point() else made.targets
    return cvxlib.ConvexProgram(mixer, kind, loss, tokens.to(dtype), targets, made.beta)


def is_zero_point(solution):
    """Whether it is Z = 0 with both its bounds, and these are true."""
    program = solution.program.double()
    zero = torch.zeros(len(program.rows), program.mixer.outputs, dtype=torch.float64)
    optimum = cvxlib.solve(program, tol=1e-6)
    assert solution.certificate.primal == pytest.approx(program.data_loss(zero), rel=1e-12)
    assert solution.certificate.dual <= optimum.objective
    return solution.rank == 0


# the contract


class Averages(Method):
    """Halfway to a known optimum, again and again: a method that only steps."""

    title = "averages"
    optimum: torch.Tensor

    def steps(self, point, run):
        program = self.program
        while True:
            predictions = program.operator.forward(point)
            residual = program.loss.gradient(predictions, program.rows)
            yield Step(point, program.objective(point), [(residual, program.dual_norm(residual))], 1)
            point = (point + self.optimum) / 2


def test_a_method_that_only_steps_is_driven_to_its_certificate(tmp_path):
    program = attention()
    Averages.optimum = cvxlib.solve(program, tol=1e-9).lifted
    solution = solve_by(Averages, program, tol=1e-4, max_iterations=100)
    assert solution.status is Status.CERTIFIED and solution.certificate.relative_gap <= 1e-4
    assert solution.evaluations == len(solution.history) < 30 and solution.solver == "averages"
    assert program.objective(solution.lifted) == pytest.approx(solution.objective, rel=1e-12)
    limited = solve_by(Averages, program, tol=1e-4, max_iterations=3)
    assert limited.status is Status.ITERATION_LIMIT and limited.evaluations == 3
    assert torch.allclose(limited.history, solution.history[:3], rtol=1e-12)
    file = tmp_path / "averages.safetensors"
    solve_by(Averages, program, tol=1e-4, max_iterations=3, checkpoint=file, solver="averages")
    later = solve_by(Averages, program, tol=1e-4, max_iterations=100, checkpoint=file, solver="averages")
    assert later.status is Status.CERTIFIED and torch.allclose(later.history[:3], limited.history, rtol=1e-12)


def test_a_method_that_can_get_no_further_has_stalled():
    class Once(Averages):
        def steps(self, point, run):
            yield next(super().steps(point, run))

    solution = solve_by(Once, attention(), tol=1e-4, max_iterations=100)
    assert solution.status is Status.STALLED and is_zero_point(solution)


@pytest.mark.parametrize("solver", SOLVER_NAMES)
def test_history_is_the_best_so_far(solver):
    solution = cvxlib.solve(attention(gates=2), tol=1e-3, solver=solver)
    evaluations, primal, dual = solution.history.T
    assert len(evaluations) > 2 and (evaluations.diff() > 0).all()
    assert (primal.diff() <= 0).all() and (dual.diff() >= 0).all()
    assert solution.certificate.primal == primal[-1] and solution.certificate.dual == dual[-1]


# rounding


@pytest.mark.parametrize("solver", SOLVER_NAMES)
def test_single_precision_says_when_it_has_stalled(solver):
    solution = cvxlib.solve(attention(seed=2, dtype=torch.float32), tol=1e-12, solver=solver)
    assert solution.status is Status.STALLED
    assert solution.evaluations < 10_000 and solution.certificate.relative_gap < 1e-4


def test_the_staircase_stalls_within_few_rounds():
    mixer = cvxlib.SelfAttention(features=2, outputs=2)
    program = family.program(mixer, loss=family.LOSSES[1], tokens=family.normal(4, 2, 2).float(), fraction=0.1)
    solution = cvxlib.solve(program, tol=9e-9, solver="staircase", max_iterations=2000)
    assert solution.status is Status.STALLED and len(solution.history) <= 50


@pytest.mark.parametrize("solver", SOLVER_NAMES)
def test_a_failed_audit_makes_the_aim_tighter(solver, monkeypatch):
    aims, audit = [], drive._Driver.audit

    def strict(self):
        found = audit(self)
        aims.append(self.run.aim)
        if len(aims) > 2:
            return found
        return cvxlib.Certificate(found.primal, found.dual - found.primal, found.dual_point)

    monkeypatch.setattr(drive._Driver, "audit", strict)
    program = attention(dtype=torch.float32)
    solution = cvxlib.solve(program, tol=1e-2, solver=solver)
    assert solution.status is Status.CERTIFIED and solution.certificate.relative_gap <= 1e-2
    assert aims[:3] == [1e-2, 5e-3, 2.5e-3]
    assert cvxlib.Certificate(*solution.history[-1, 1:].tolist()).relative_gap <= 2.5e-3


# data without size, or with too much of it


@pytest.mark.parametrize("solver", SOLVER_NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tokens_that_are_zero(solver, dtype):
    mixer = cvxlib.SelfAttention(features=4, outputs=3)
    zero = torch.zeros(6, 5, 4, dtype=dtype)
    program = family.program(mixer, loss=family.LOSSES[0], tokens=zero)
    assert cvxlib.solve(program, solver=solver).rank == 0
    start = cvxlib.solve(attention(n=6, loss=family.LOSSES[0]), tol=1e-2)
    warm = cvxlib.solve(program, solver=solver, start=start)
    assert warm.status is Status.CERTIFIED and warm.objective == pytest.approx(program.data_loss(program.rows * 0))


@pytest.mark.parametrize("solver", SOLVER_NAMES)
def test_gates_that_are_all_closed(solver):
    mixer = cvxlib.MLP(features=2, outputs=2)
    gates = cvxlib.GatedReLU(torch.tensor([[-1.0, -1.0]]))
    program = family.program(mixer, gates, tokens=family.normal(6, 5, 2).abs())
    start = cvxlib.solve(family.program(mixer, tokens=family.normal(6, 5, 2)), tol=1e-2)
    for solution in (cvxlib.solve(program, solver=solver), cvxlib.solve(program, solver=solver, start=start)):
        assert solution.status is Status.CERTIFIED and solution.rank == 0


@pytest.mark.parametrize("solver", SOLVER_NAMES)
@pytest.mark.parametrize("scale", [255.0, 1e6, 1e-7])
def test_single_precision_of_any_size_ends_with_true_bounds(solver, scale):
    program = attention(dtype=torch.float32, scale=scale)
    solution = cvxlib.solve(program, tol=1e-3, solver=solver, max_iterations=3000)
    assert solution.status in (Status.CERTIFIED, Status.STALLED, Status.ITERATION_LIMIT)
    assert solution.certificate.dtype == torch.float64
    audit = cvxlib.certify(program, solution.head(), solution.certificate.dual_point)
    assert audit.primal == pytest.approx(solution.objective, rel=1e-9)
    assert 0 < solution.certificate.dual <= solution.objective
    zero = torch.zeros(len(program.rows), 3)
    assert solution.objective <= program.data_loss(zero) * (1 + 1e-6)


def test_a_checkpoint_of_a_solve_without_a_bound_goes_on(tmp_path):
    class Blind(Averages):
        def steps(self, point, run):
            for step in super().steps(point, run):
                yield Step(step.point, step.value, [], 1)

    program, file = attention(), tmp_path / "state"
    Averages.optimum = cvxlib.solve(program, tol=1e-6).lifted
    options = {"tol": 1e-4, "checkpoint": file, "solver": "averages"}
    blind = solve_by(Blind, program, max_iterations=5, **options)
    assert blind.status is Status.ITERATION_LIMIT and blind.certificate.dual == -float("inf")
    assert solve_by(Averages, program, max_iterations=50, **options).status is Status.CERTIFIED


def test_a_decomposition_that_fails_is_a_stall(monkeypatch):
    def fails(self, z, threshold):
        raise torch.linalg.LinAlgError("the algorithm failed to converge")

    monkeypatch.setattr(BlockNuclearNorm, "prox", fails)
    solution = cvxlib.solve(attention(), tol=1e-4, solver="splitting")
    monkeypatch.undo()
    assert solution.status is Status.STALLED and is_zero_point(solution)


# Ctrl-C


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("place", ["cvxlib.operators.lifted.LiftedOperator.forward", "cvxlib.solvers.drive.Checkpoint"])
def test_an_interrupt_before_the_first_step_gives_the_zero_point(place, dtype, monkeypatch, tmp_path):
    program = attention(dtype=dtype)
    with monkeypatch.context() as patch:
        patch.setattr(place, interrupt)
        stopped = cvxlib.solve(program, solver="proximal", checkpoint=tmp_path / "state")
    assert stopped.status is Status.INTERRUPTED and stopped.certificate.dtype == torch.float64
    assert is_zero_point(stopped) and stopped.certificate.dual > 0 and len(stopped.history) == 0
    assert not list(tmp_path.iterdir())


PREPARATIONS = {
    "splitting": "cvxlib.solvers.splitting.GraphProjection",
    "proximal": "cvxlib.solvers.proximal._first_lipschitz",
    "staircase": "cvxlib.solvers.staircase._spans",
}


@pytest.mark.parametrize("solver", SOLVER_NAMES)
def test_an_interrupt_of_what_a_method_prepares(solver, monkeypatch):
    program = attention()
    with monkeypatch.context() as patch:
        patch.setattr(PREPARATIONS[solver], interrupt)
        stopped = cvxlib.solve(program, solver=solver)
    assert stopped.status is Status.INTERRUPTED and is_zero_point(stopped)


def test_an_interrupt_while_relu_begins(monkeypatch):
    program = family.program(cvxlib.MLP(2, 2), cvxlib.ReLU(), tokens=family.normal(4, 1, 2), fraction=0.1)
    with monkeypatch.context() as patch:
        patch.setattr(SOLVERS["relu"], "begin", interrupt)
        stopped = cvxlib.solve(program)
    assert stopped.status is Status.INTERRUPTED and is_zero_point(stopped)


@pytest.mark.parametrize("solver", SOLVER_NAMES)
def test_an_interrupt_between_steps_keeps_the_best(solver, monkeypatch):
    program, method = attention(), SOLVERS[solver]
    steps = method.steps

    def some(self, point, run):
        for count, step in enumerate(steps(self, point, run)):
            if count == 3:
                raise KeyboardInterrupt
            yield step

    whole = cvxlib.solve(program, tol=1e-6, solver=solver)
    monkeypatch.setattr(method, "steps", some)
    stopped = cvxlib.solve(program, tol=1e-6, solver=solver)
    assert stopped.status is Status.INTERRUPTED and torch.allclose(stopped.history, whole.history[:3], rtol=1e-12)
    assert stopped.certificate.primal == stopped.history[-1, 1]
    assert cvxlib.certify(program, stopped.head()).primal == pytest.approx(stopped.certificate.primal, rel=1e-9)


@pytest.mark.parametrize("solver", SOLVER_NAMES)
def test_an_interrupt_of_the_audit_is_audited_again(solver, monkeypatch):
    program = attention(dtype=torch.float32)
    in_double, calls = type(program).in_double, iter(range(1000))
    with monkeypatch.context() as patch:
        patch.setattr(type(program), "in_double", lambda self: interrupt() if next(calls) == 0 else in_double(self))
        stopped = cvxlib.solve(program, tol=1e-3, solver=solver)
    assert stopped.status is Status.INTERRUPTED and stopped.certificate.dtype == torch.float64
    assert stopped.rank > 0 and 0 <= stopped.certificate.relative_gap <= 2e-3


@pytest.mark.parametrize("place", ["beta_max", "feasible_dual"])
def test_an_interrupt_of_what_a_path_prepares_leaves_no_point(place, monkeypatch):
    program = attention()
    monkeypatch.setattr(cvxlib.ConvexProgram, place, interrupt)
    found = cvxlib.path(program, count=3)
    assert len(found) == 0 and not found.complete
