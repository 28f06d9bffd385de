"""The regularisation path and gap-safe screening: what is screened is zero, and no shortcut weakens a certificate."""

import itertools

import pytest
import torch
from family import LOSSES, MIXERS, POOLS, build, name, normal, program
from hypothesis import given, settings
from hypothesis import strategies as st

import cvxlib
from cvxlib.audit.screening import restrict
from cvxlib.workflow.regularisation import Path


def gated(loss=LOSSES[1], gates=8, samples=12, seed=0, mixer=None, fraction=0.3):
    """A program with several gates."""
    mixer = mixer or build(cvxlib.SelfAttention)
    return program(
        mixer, cvxlib.GatedReLU.sample(mixer, gates, seed=seed), loss, samples=samples, seed=seed, fraction=fraction
    )


def weight(solution):
    """(K,) the nuclear norm of each lifted block."""
    return torch.linalg.svdvals(solution.lifted).sum(1)


def constraint(case, solution):
    """(K,) what beta limits, at a solution's dual point."""
    return case.norm.spectral(case.operator.adjoint(solution.certificate.dual_point)) / case.samples


# screening


def assert_screened_blocks_vanish(case, certificate, tight):
    """Blocks that a certificate screens have no weight in a tight solution, and their constraints are slack there."""
    zero = cvxlib.screen(case, certificate)
    assert zero.shape == (case.operator.shape[0],)
    assert bool((weight(tight)[zero] <= 1e-4 * weight(tight).sum()).all())
    assert bool((constraint(case, tight)[zero] < case.beta).all())
    return int(zero.sum())


def test_the_assertion_fails_on_an_active_block():
    case = gated()
    tight = cvxlib.solve(case, tol=1e-8)
    half = tight.certificate.dual_point / 2
    low = cvxlib.Certificate(case.dual_value(half), case.dual_value(half), half)
    with pytest.raises(AssertionError):  # a primal value below the optimum proves too much
        assert_screened_blocks_vanish(case, low, tight)


@pytest.mark.parametrize("pool", POOLS, ids=name)
@pytest.mark.parametrize("loss", LOSSES, ids=name)
@pytest.mark.parametrize("mixer", MIXERS, ids=name)
def test_screened_blocks_are_zero(mixer, loss, pool):
    activation = cvxlib.GatedReLU.sample(mixer, 6, seed=2)
    case = program(mixer, activation, loss, pool, samples=10, fraction=0.5, seed=2)
    tight = cvxlib.solve(case, tol=1e-8)
    found = [
        assert_screened_blocks_vanish(case, cvxlib.solve(case, tol=tol).certificate, tight)
        for tol in (1e-1, 1e-3, 1e-6)
    ]
    assert found[-1] >= int((constraint(case, tight) < 0.9 * case.beta).sum())


@settings(max_examples=20)
@given(
    seed=st.integers(0, 10**6),
    fraction=st.floats(0.05, 1.2),
    loss=st.sampled_from(LOSSES),
    pool=st.sampled_from(POOLS),
    scale=st.sampled_from([0.01, 1.0, 30.0]),
)
def test_screening_is_safe_on_random_programs(seed, fraction, loss, pool, scale):
    mixer = build(cvxlib.MLP)
    tokens = scale * normal(5, 4, 2, seed=seed)
    case = program(mixer, cvxlib.GatedReLU.sample(mixer, 6, seed=seed), loss, pool, fraction=fraction, tokens=tokens)
    tight = cvxlib.solve(case, tol=1e-8)
    for tol in (0.3, 1e-2, 1e-4):
        assert_screened_blocks_vanish(case, cvxlib.solve(case, tol=tol).certificate, tight)


def test_no_shorter_radius_would_be_safe():
    # one weight, f(x) = x z with x = 1: z = max(y - beta, 0) and the dual optimum is -beta. For y just above beta the dual is all but
    # flat at its maximiser, so the ball around rho = -beta / 2 just reaches it.
    tokens, beta = torch.ones(1, 1, 1, dtype=torch.float64), 1.0
    targets = torch.full((1, 1), beta + 1e-3, dtype=torch.float64)
    case = cvxlib.ConvexProgram(cvxlib.MLP(1, 1), cvxlib.Linear(), cvxlib.SquaredLoss(), tokens, targets, beta)
    optimum = cvxlib.solve(case, tol=1e-10)
    assert float(weight(optimum)) == pytest.approx(1e-3, rel=0.05)
    rho = torch.full((1, 1), -beta / 2, dtype=torch.float64)
    dual = case.dual_value(rho)
    assert not cvxlib.screen(case, cvxlib.Certificate(optimum.objective, dual, rho)).any()
    for share in (0.99, 0.5):  # a gap, and so a radius, that is too small
        primal = dual + share**2 * (optimum.objective - dual)
        assert cvxlib.screen(case, cvxlib.Certificate(primal, dual, rho)).all()


def test_a_tight_certificate_screens_every_slack_gate():
    case = gated(gates=12)
    tight = cvxlib.solve(case, tol=1e-9)
    slack = constraint(case, tight) < (1 - 1e-3) * case.beta
    assert slack.any() and not slack.all()
    assert torch.equal(cvxlib.screen(case, tight.certificate), slack)


def test_screening_in_single_precision_agrees():
    case = gated(gates=10)
    single = program(
        case.mixer, case.activation, case.loss, tokens=case.tokens.float(), samples=12, fraction=0.3
    ).with_beta(case.beta)
    solution = cvxlib.solve(single, tol=1e-3)
    zero = cvxlib.screen(single, solution.certificate)
    assert zero.any()
    assert float(weight(cvxlib.solve(case, tol=1e-8))[zero].max()) < 1e-6


def test_leaving_out_screened_gates_leaves_the_optimum():
    case = gated(gates=12)
    first = cvxlib.solve(case, tol=1e-6)
    zero = cvxlib.screen(case, first.certificate)
    assert zero.any()
    fewer = cvxlib.solve(restrict(case, case.operator.gate[~zero]), tol=1e-6)
    assert fewer.objective == pytest.approx(first.objective, rel=2e-6)


@pytest.mark.parametrize("wrong", ["no point", "shape", "beta", "kind"])
def test_screen_refuses_what_proves_nothing(wrong):
    case = gated()
    certificate = cvxlib.solve(case, tol=1e-3).certificate
    bad = {
        "no point": cvxlib.Certificate(certificate.primal, certificate.dual),
        "shape": cvxlib.Certificate(certificate.primal, certificate.dual, certificate.dual_point[1:]),
        "beta": certificate,
        "kind": certificate.primal,
    }[wrong]
    with pytest.raises(TypeError if wrong == "kind" else ValueError, match="certificate: expected"):
        cvxlib.screen(case.with_beta(case.beta / 2), bad)


def test_only_gates_can_be_left_out():
    with pytest.raises(TypeError, match="activation: expected a GatedReLU"):
        restrict(program(build(cvxlib.MLP)), torch.tensor([0]))


# the path


def assert_same_values(one, other):
    """Two paths over the same betas whose certified intervals meet at every point."""
    assert torch.equal(one.betas, other.betas)
    for a, b in zip(one, other, strict=True):
        assert a.certificate.dual <= b.objective * (1 + 1e-12) and b.certificate.dual <= a.objective * (1 + 1e-12)


@pytest.mark.parametrize("screen", [True, False])
@pytest.mark.parametrize("loss", LOSSES, ids=name)
@pytest.mark.parametrize("mixer", [m for m in MIXERS if type(m) in (cvxlib.MLP, cvxlib.BlockFNO)], ids=name)
def test_every_point_is_certified_and_agrees_with_a_solve_of_its_own(mixer, loss, screen):
    case = gated(loss, mixer=mixer)
    found = cvxlib.path(case, count=5, ratio=2e-2, tol=1e-4, screen=screen)
    assert found.complete and len(found) == 5
    assert float(found.betas[0]) == case.beta_max() and float(found.betas[-1]) == pytest.approx(2e-2 * case.beta_max())
    assert found.rank[0] == 0
    assert float(found.relative_gap.max()) <= 1e-4
    # the optimal value is increasing in beta, so objectives fall by no less than the gap allows
    for high, low in itertools.pairwise(found):
        assert low.certificate.dual <= high.objective
    for beta, solution in zip(found.betas.tolist(), found, strict=True):
        alone = cvxlib.solve(case.with_beta(beta), tol=1e-4)
        assert solution.program.beta == beta
        assert solution.status is cvxlib.Status.CERTIFIED
        assert solution.certificate.dual <= alone.objective and alone.certificate.dual <= solution.objective
        assert case.with_beta(beta).objective(solution.lifted) == pytest.approx(solution.objective, rel=1e-9)
        audit = cvxlib.certify(case.with_beta(beta), solution.head(), solution.certificate.dual_point)
        assert audit.relative_gap <= 1.001e-4


@pytest.mark.parametrize("seed", range(3))
def test_screening_changes_no_value_and_leaves_gates_out(seed):
    case = gated(gates=16, seed=seed, samples=20)
    with_screening = cvxlib.path(case, count=6, ratio=2e-2, tol=1e-4)
    without = cvxlib.path(case, count=6, ratio=2e-2, tol=1e-4, screen=False)
    assert_same_values(with_screening, without)
    k = case.operator.shape[0]
    assert bool((with_screening.solved < k).any()) and bool((without.solved[1:] == k).all())
    assert with_screening.screened[0] >= k - 1 and not without.screened.any()
    for solution in with_screening:  # gates are those of the program as it was given
        head = solution.head()
        assert head.activation is case.activation
        assert solution.program.operator is case.operator


def test_gates_left_out_wrongly_come_back(monkeypatch):
    """Start each point on the gates of the one before alone: the check on all gates must find the others."""
    monkeypatch.setitem(cvxlib.path.__globals__, "NEAR", 1.0)
    case = gated(gates=16, samples=20)
    found = cvxlib.path(case, count=5, ratio=1e-2, tol=1e-4)
    assert_same_values(found, cvxlib.path(case, count=5, ratio=1e-2, tol=1e-4, screen=False))
    assert max(len(solution.history) for solution in found) > 1  # some gates had to join
    assert float(found.relative_gap.max()) <= 1e-4


def test_a_point_within_the_tolerance_is_not_solved_again():
    case = gated()
    top = case.beta_max()
    found = cvxlib.path(case, betas=[0.5 * top, 0.4999 * top], tol=1e-2)
    assert found.solved[0] > 0 and found.solved[1] == 0
    assert torch.equal(found.solutions[1].factors.u, found.solutions[0].factors.u)
    assert float(found.relative_gap[1]) <= 1e-2


@pytest.mark.parametrize("activation", [cvxlib.Linear(), cvxlib.ReLU()], ids=repr)
def test_a_path_without_gates_to_leave_out(activation):
    case = program(build(cvxlib.MLP), activation, samples=3, tokens=normal(3, 1, 2))
    found = cvxlib.path(case, count=3, ratio=0.2, tol=1e-4)
    assert found.complete and not found.screened.any()
    for solution in found:
        alone = cvxlib.solve(solution.program, tol=1e-4)
        assert solution.certificate.dual <= alone.objective and alone.certificate.dual <= solution.objective
        assert solution.certificate.relative_gap <= 1e-4


def test_single_precision_points_are_certified_in_double():
    case = gated(gates=10)
    single = program(case.mixer, case.activation, case.loss, tokens=case.tokens.float())
    found = cvxlib.path(single, count=4, ratio=0.05)
    assert all(s.certificate.dtype == torch.float64 for s in found)
    assert float(found.relative_gap.max()) <= 1e-3
    assert found.solutions[-1].factors.u.dtype == torch.float32


def test_accuracy_is_that_of_the_networks():
    case = gated(gates=4)
    found = cvxlib.path(case, count=4, ratio=1e-2)
    tokens, labels = normal(9, 4, 2, seed=5), torch.arange(9) % 2
    expected = [(s.head()(tokens).argmax(1) == labels).double().mean() for s in found]
    assert torch.equal(found.accuracy(tokens, labels), torch.stack(expected))
    with pytest.raises(ValueError, match="labels: expected"):
        found.accuracy(tokens, labels[1:])


# interrupts and checkpoints


def interrupt_after(monkeypatch, solves):
    """Ctrl-C inside the solve that follows so many finished ones."""
    original, calls = cvxlib.path.__globals__["solve"], itertools.count()

    def interrupted(*args, **kwargs):
        if next(calls) == solves:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setitem(cvxlib.path.__globals__, "solve", interrupted)


def assert_equal_paths(one, other):
    assert torch.equal(one.betas, other.betas) and one.complete == other.complete
    assert torch.equal(one.screened, other.screened) and torch.equal(one.solved, other.solved)
    for a, b in zip(one, other, strict=True):
        assert (a.certificate, a.status, a.solver, a.evaluations) == (b.certificate, b.status, b.solver, b.evaluations)
        assert torch.equal(a.factors.u, b.factors.u) and torch.equal(a.factors.block, b.factors.block)
        assert torch.equal(a.certificate.dual_point, b.certificate.dual_point) and torch.equal(a.history, b.history)


@pytest.mark.parametrize("screen", [True, False])
def test_an_interrupted_path_resumes_to_the_same_result(monkeypatch, tmp_path, screen):
    case = gated()
    options = {"count": 6, "ratio": 1e-2, "screen": screen}
    whole = cvxlib.path(case, **options)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        part = cvxlib.path(case, checkpoint=tmp_path / "path", **options)
    assert not part.complete and 0 < len(part) < 6
    assert_equal_paths(
        part,
        Path(
            whole.betas[: len(part)],
            whole.solutions[: len(part)],
            whole.screened[: len(part)],
            whole.solved[: len(part)],
            False,
        ),
    )
    assert len(list((tmp_path / "path").iterdir())) == len(part)
    assert_equal_paths(cvxlib.path(case, checkpoint=tmp_path / "path", **options), whole)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 0)  # nothing is left to solve
        assert_equal_paths(cvxlib.path(case, checkpoint=tmp_path / "path", **options), whole)


def test_an_interrupt_inside_a_solver_ends_the_path(monkeypatch):
    case = gated()
    calls = itertools.count()

    def prox(self, z, threshold, original=cvxlib.BlockNuclearNorm.prox):
        if next(calls) == 60:
            raise KeyboardInterrupt
        return original(self, z, threshold)

    with monkeypatch.context() as patch:
        patch.setattr(cvxlib.BlockNuclearNorm, "prox", prox)
        part = cvxlib.path(case, count=8, ratio=1e-2, tol=1e-5)
    assert not part.complete and 0 < len(part) < 8
    assert float(part.relative_gap.max()) <= 1e-5


def test_a_checkpoint_of_another_call_is_refused(tmp_path):
    case = gated()
    cvxlib.path(case, count=3, ratio=0.1, checkpoint=tmp_path)
    others = [
        lambda: cvxlib.path(case, count=4, ratio=0.1, checkpoint=tmp_path),
        lambda: cvxlib.path(case, count=3, ratio=0.1, tol=1e-2, checkpoint=tmp_path),
        lambda: cvxlib.path(gated(seed=1), betas=[0.1], checkpoint=tmp_path),
        lambda: cvxlib.path(gated(gates=7), count=3, ratio=0.1, checkpoint=tmp_path),
    ]
    for other in others:
        with pytest.raises(ValueError, match="checkpoint: expected a folder with points of this program"):
            other()


def test_a_damaged_checkpoint_and_a_file_in_its_place_are_refused(tmp_path):
    case = gated()
    cvxlib.path(case, count=2, ratio=0.5, checkpoint=tmp_path / "path")
    file = tmp_path / "path" / "point-0001.safetensors"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"checkpoint: expected .* damaged or foreign"):
        cvxlib.path(case, count=2, ratio=0.5, checkpoint=tmp_path / "path")
    with pytest.raises(ValueError, match="checkpoint: expected a folder, or"):
        cvxlib.path(case, count=2, ratio=0.5, checkpoint=file)


@pytest.mark.parametrize(
    "options, error, word",
    [
        ({"count": 0}, ValueError, "count"),
        ({"count": 2.5}, TypeError, "count"),
        ({"ratio": 1.0}, ValueError, "ratio"),
        ({"ratio": 0}, ValueError, "ratio"),
        ({"betas": []}, ValueError, "betas"),
        ({"betas": [0.1, 0.2]}, ValueError, "betas"),
        ({"betas": [0.2, -0.1]}, ValueError, "betas"),
        ({"betas": 0.1}, TypeError, "betas"),
        ({"tol": 0}, ValueError, "tol"),
        ({"solver": "magic"}, ValueError, "solver"),
        ({"screen": 1}, TypeError, "screen"),
        ({"checkpoint": 3}, TypeError, "checkpoint"),
    ],
)
def test_bad_arguments_are_named(options, error, word):
    with pytest.raises(error, match=f"{word}: expected"):
        cvxlib.path(gated(gates=2), **options)


def test_data_that_open_no_gate_have_no_path_of_their_own():
    mixer = build(cvxlib.MLP)
    case = program(mixer, cvxlib.GatedReLU(torch.tensor([[-1.0, -1.0]])), tokens=normal(4, 4, 2).abs())
    with pytest.raises(ValueError, match="program: expected one with a finite beta_max above 0"):
        cvxlib.path(case)
