"""Solvers: they reach certified optima, agree with each other, survive interrupts, and no training gets below the bound."""

import pytest
import torch

import cvxlib
from cvxlib.solvers.training import train

pytest.importorskip("sklearn")
from cvxlib.vision import digits


def digit_program(activation=None, train_images=300, dtype=torch.float64):
    data = digits(positions=1, train=train_images, dtype=dtype)
    mixer = cvxlib.SelfAttention(features=8, outputs=10)
    activation = activation or cvxlib.Linear()
    program = cvxlib.ConvexProgram(mixer, activation, cvxlib.CrossEntropy(), data.tokens, data.labels, beta=1.0)
    return program.with_beta(0.02 * program.beta_max())


def test_solvers_agree_on_digits():
    program = digit_program()
    splitting = cvxlib.solve(program, tol=1e-5, solver="splitting")
    proximal = cvxlib.solve(program, tol=1e-3, solver="proximal")
    assert splitting.status is proximal.status is cvxlib.Status.CERTIFIED
    assert splitting.objective <= proximal.objective * (1 + 1e-5)
    assert proximal.certificate.dual <= splitting.objective
    assert proximal.objective - splitting.certificate.dual <= 1e-3 * proximal.objective * (1 + 1e-2)


def test_gated_digits_reach_the_gap_and_no_training_gets_below_the_bound():
    mixer = cvxlib.SelfAttention(features=8, outputs=10)
    program = digit_program(cvxlib.GatedReLU.sample(mixer, 4), train_images=200)
    solution = cvxlib.solve(program, tol=1e-3)
    assert solution.status is cvxlib.Status.CERTIFIED
    assert solution.certificate.relative_gap <= 1e-3
    for seed in range(6):
        run = train(program, heads=2, epochs=12, batch=20, learning_rate=2e-2, seed=seed)
        assert run.final >= solution.certificate.dual
        assert run.final < run.objective[0]
        audit = cvxlib.certify(program, run.head, solution.certificate.dual_point)
        assert audit.dual == pytest.approx(solution.certificate.dual, rel=1e-9)
        assert audit.primal == pytest.approx(run.final, rel=1e-9)


def test_recovered_network_has_the_programs_objective():
    program = digit_program()
    solution = cvxlib.solve(program, tol=1e-4)
    head = solution.head()
    loss = torch.nn.functional.cross_entropy(head(program.tokens), program.targets)
    objective = (loss + program.beta * head.weight_decay()).detach()
    assert float(objective) == pytest.approx(solution.objective, rel=1e-10)
    assert program.objective(solution.lifted) == pytest.approx(solution.objective, rel=1e-10)
    assert len(head) == solution.rank <= min(program.mixer.p, program.mixer.q)


def test_warm_start_from_the_solution_is_immediate():
    program = digit_program()
    solution = cvxlib.solve(program, tol=1e-4)
    again = cvxlib.solve(program, tol=1e-3, start=solution)
    assert again.evaluations <= 30 < solution.evaluations


def test_iteration_limit_is_reported_and_still_certified():
    program = digit_program()
    optimum = cvxlib.solve(program, tol=1e-6)
    for solver in ("splitting", "proximal"):
        early = cvxlib.solve(program, tol=1e-6, max_iterations=30, solver=solver)
        assert early.status is cvxlib.Status.ITERATION_LIMIT
        assert early.certificate.dual <= optimum.objective and optimum.certificate.dual <= early.objective


@pytest.mark.parametrize("solver", ["splitting", "proximal"])
def test_interrupt_returns_the_best_certified_iterate(solver, monkeypatch):
    program = digit_program()
    optimum = cvxlib.solve(program, tol=1e-6)
    calls = iter(range(1000))

    def prox(self, z, threshold, original=cvxlib.BlockNuclearNorm.prox):
        if next(calls) == 25:
            raise KeyboardInterrupt
        return original(self, z, threshold)

    monkeypatch.setattr(cvxlib.BlockNuclearNorm, "prox", prox)
    stopped = cvxlib.solve(program, tol=1e-6, solver=solver)
    assert stopped.status is cvxlib.Status.INTERRUPTED
    assert stopped.certificate.dual <= optimum.objective <= stopped.objective * (1 + 1e-6)
    assert program.objective(stopped.lifted) == pytest.approx(stopped.objective, rel=1e-9)


def test_single_precision_iterates_are_certified_in_double():
    program = digit_program(dtype=torch.float32)
    solution = cvxlib.solve(program, tol=1e-3)
    assert solution.status is cvxlib.Status.CERTIFIED
    assert solution.certificate.dtype == torch.float64
    assert solution.factors.u.dtype == torch.float32
    exact = cvxlib.solve(digit_program(), tol=1e-6)
    # the two programs differ by the rounding of their tokens only
    assert solution.certificate.dual <= exact.objective * (1 + 1e-5)
    assert solution.objective >= exact.certificate.dual * (1 - 1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cuda_agrees_with_cpu(dtype):
    cpu = digit_program(dtype=dtype)
    cuda = cvxlib.ConvexProgram(cpu.mixer, cpu.activation, cpu.loss, cpu.tokens.cuda(), cpu.targets.cuda(), cpu.beta)
    there, here = cvxlib.solve(cuda, tol=1e-3), cvxlib.solve(cpu, tol=1e-3)
    assert there.factors.u.is_cuda and there.status is cvxlib.Status.CERTIFIED
    assert there.certificate.dual <= here.objective and here.certificate.dual <= there.objective


def test_certify_needs_the_programs_own_form():
    program = digit_program()
    head = cvxlib.Head.random(program.mixer, cvxlib.GatedReLU.sample(program.mixer, 2), heads=1)
    with pytest.raises(ValueError, match="head: expected the program's activation"):
        cvxlib.certify(program, head)
    with pytest.raises(TypeError, match=r"head: expected a cvxlib\.Head"):
        cvxlib.certify(program, torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="head: expected pool='mean'"):
        cvxlib.certify(program, cvxlib.Head.random(program.mixer, cvxlib.Linear(), heads=1, pool=None))


@pytest.mark.parametrize(
    "options, error, name",
    [
        ({"tol": 0}, ValueError, "tol"),
        ({"tol": "tight"}, TypeError, "tol"),
        ({"max_iterations": 0}, ValueError, "max_iterations"),
        ({"solver": "magic"}, ValueError, "solver"),
        ({"start": 3}, TypeError, "start"),
    ],
)
def test_solve_rejects_bad_options(options, error, name):
    with pytest.raises(error, match=f"{name}: expected"):
        cvxlib.solve(digit_program(), **options)


def test_training_is_reproducible_and_checks_its_arguments():
    program = digit_program(train_images=50)
    first, second = (train(program, heads=2, epochs=2, seed=3) for _ in range(2))
    assert torch.equal(first.objective, second.objective)
    with pytest.raises(ValueError, match="epochs: expected"):
        train(program, heads=2, epochs=0)


def test_digits_carry_their_position_and_rebuild_the_image():
    data = digits(positions=1)
    assert data.tokens.shape == (1400, 16, 8) and len(data.test_labels) == 397
    positions = data.tokens[:, :, 4:]
    assert torch.equal(positions, positions[:1].expand_as(positions))
    assert len(torch.unique(positions[0], dim=0)) == 16  # every patch has its own
    plain = digits(positions=0)
    assert torch.equal(plain.tokens, data.tokens[:, :, :4])
    with pytest.raises(ValueError, match="patch: expected a divisor"):
        digits(patch=3)
    with pytest.raises(ValueError, match="train: expected fewer than 1797"):
        digits(train=1797)
