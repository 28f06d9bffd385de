"""Rigorous bounds: what a float dual point proves, held against exact arithmetic."""

import math
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from family import LOSSES, MIXERS, POOLS, name, normal, program

import cvxlib
from cvxlib.geometry.norms import spectral_above
from cvxlib.operators.gates import GatesByRounding
from cvxlib.program.certificate import Assurance, CrossedBounds
from cvxlib.program.verified import mean_below, scaled_below

EXTREME = [1e-150, 1e-60, 1e-8, 1.0, 1e8, 1e60, 1e150]


def fractions(tensor):
    return np.vectorize(Fraction, otypes=[object])(tensor.detach().double().numpy())


def definite(matrix):
    """Whether a symmetric matrix of fractions is positive semidefinite, by elimination without rounding."""
    a = [list(row) for row in matrix]
    for k in range(len(a)):
        if a[k][k] < 0 or (a[k][k] == 0 and any(a[i][k] for i in range(k, len(a)))):
            return False
        for i in range(k + 1, len(a)):
            if a[k][k] and a[i][k]:
                factor = a[i][k] / a[k][k]
                a[i] = [x - factor * y for x, y in zip(a[i], a[k], strict=True)]
    return True


def no_singular_value_exceeds(matrix, bound):
    exact, t = fractions(matrix), Fraction(bound)
    return definite(t * t * np.eye(matrix.shape[1], dtype=int).astype(object) - exact.T @ exact)


@pytest.mark.parametrize("scale", EXTREME)
@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (2, 5), (6, 6)])
def test_no_singular_value_exceeds_the_bound(shape, scale):
    blocks = torch.stack([scale * normal(*shape, seed=seed) for seed in range(3)])
    blocks[1] = blocks[1, :1] * 0 + blocks[1, 0:1]  # rank one
    blocks[2, :, 0] *= 1e-9
    bounds = spectral_above(blocks)
    floats = torch.linalg.svdvals(blocks)[:, 0]
    for block, bound, value in zip(blocks, bounds.tolist(), floats.tolist(), strict=True):
        assert no_singular_value_exceeds(block, bound)
        assert bound <= value * (1 + 1e-13)


def test_the_exact_check_notices_a_bound_that_is_too_small():
    block = normal(4, 3)
    assert not no_singular_value_exceeds(block, float(torch.linalg.svdvals(block)[0]) * (1 - 1e-12))


def test_large_blocks_are_bounded_by_the_shifted_cholesky_test():
    block = normal(1100, 1030, seed=5)
    block[:, 3] = block[:, 2]
    (bound,), value = spectral_above(block[None]).tolist(), float(torch.linalg.svdvals(block)[0])
    assert value <= bound <= value * (1 + 1e-6)


def test_what_is_not_finite_bounds_nothing():
    block = normal(2, 3, 2)
    block[0, 1, 1], block[1, 0, 0] = math.nan, math.inf
    assert spectral_above(block).tolist() == [math.inf, math.inf]
    assert float(spectral_above(torch.zeros(1, 2, 2, dtype=torch.float64))) < 1e-300


def test_means_and_scalings_are_rounded_down():
    rng = np.random.default_rng(0)
    for size in (1, 7, 1000):
        values = torch.as_tensor(rng.standard_normal(size) * 10.0 ** rng.integers(-30, 30, size))
        below = mean_below(values, size, program(MIXERS[0]).reduce)
        truth = -sum(map(Fraction, values.tolist())) / size
        assert Fraction(below) <= truth and abs(float(truth) - below) <= 1e-14 * abs(float(truth)) + 1e-320
    for value, zero, norm, beta in rng.uniform(0.1, 2, (200, 4)):
        below, s = scaled_below(value, zero, norm, beta)
        assert Fraction(s) * Fraction(norm) <= Fraction(beta) or (s == 1.0 and norm <= beta)
        exact = Fraction(s) * Fraction(value) + (1 - Fraction(s)) * Fraction(zero)
        assert Fraction(below) <= exact and float(exact) - below < 1e-14
    assert scaled_below(math.inf, 0.0, 1.0, 1.0) == scaled_below(1.0, 0.0, math.inf, 1.0) == (0.0, 0.0)


@pytest.mark.parametrize("loss", LOSSES, ids=name)
@pytest.mark.parametrize("pool", POOLS, ids=name)
@pytest.mark.parametrize("activation", ["linear", "gated"])
@pytest.mark.parametrize("mixer", MIXERS, ids=name)
def test_every_solution_is_proved_at_no_cost_to_the_bound(mixer, activation, loss, pool):
    case = program(mixer, activation, loss, pool)
    solution = cvxlib.solve(case, tol=1e-8)
    audit = cvxlib.certify(case, solution.head(), solution.certificate.dual_point)
    for certificate in (solution.certificate, audit):
        assert certificate.assurance is Assurance.RIGOROUS
        assert certificate.relative_gap <= 1e-8 + 1e-11


@pytest.mark.parametrize("mixer", MIXERS, ids=name)
@pytest.mark.parametrize("pool", POOLS, ids=name)
def test_the_adjoint_lies_within_its_bound_of_the_exact_one(mixer, pool):
    """Against fractions: the rows of L, the gates, the values and the residual multiplied out."""
    tokens = normal(2, 4, 2, seed=3) * torch.tensor([1e-6, 1e6]).double()
    case = program(mixer, "gated", pool=pool, tokens=tokens)
    rho = normal(len(case.rows), mixer.outputs, seed=9) * 10.0 ** normal(len(case.rows), 1, seed=4).mul(4).round()
    adjoint, bounds = case.factored.adjoint_within(rho, torch.zeros_like(rho))
    point = fractions(rho).reshape(2, -1, mixer.outputs)
    for k, (gate, b) in enumerate(zip(case.operator.gate.tolist(), case.operator.block.tolist(), strict=True)):
        seen = mixer.split(tokens)[b]
        columns = point[:, :, b * mixer.block_outputs : (b + 1) * mixer.block_outputs]
        rows = mixer.exact_rows(fractions(seen))  # (n a h, p)
        masks = case.gates.masks(mixer, seen, b)[:, gate]
        n, a, h = masks.shape
        values = fractions(mixer.values(seen))
        weights = np.zeros((n, a, h, mixer.width, mixer.block_outputs), dtype=object)
        for i, j in np.ndindex(n, a):
            share = columns[i, 0] / a if pool else columns[i, j]
            weights[i, j] = (
                values[i][:, :, None] * share * masks[i, j].numpy().astype(int).astype(object)[:, None, None]
            )
        exact = rows.T @ weights.reshape(n * a * h, -1)
        far = fractions(adjoint[k]) - exact
        assert sum(entry**2 for entry in far.flat) <= Fraction(float(bounds[k])) ** 2
        nothing_cancels = abs(rows).T @ abs(weights).reshape(n * a * h, -1)
        assert float(bounds[k]) <= 1e-13 * math.sqrt(sum(entry**2 for entry in nothing_cancels.flat))


def test_the_bound_of_the_adjoint_counts_what_underflows():
    """Squares of tiny keys lose digits before huge queries bring them back to an ordinary size."""
    mixer = cvxlib.CrossAttention(2, 1, queries=1)
    tokens = normal(2, 3, 2, seed=6) * torch.tensor([1e150, 1e-161, 1e-161], dtype=torch.float64).reshape(1, 3, 1)
    case = cvxlib.ConvexProgram(mixer, cvxlib.Linear(), LOSSES[0], tokens, normal(2, 1), 1.0)
    rho = normal(2, 1, seed=7)
    (way,) = (way for way in case.factored.every_way() if way.path == "Gram matrices")
    adjoint, (bound,) = way.adjoint_within(rho, torch.zeros_like(rho))
    x, shares = fractions(tokens), fractions(rho)[:, 0]
    exact = sum(np.outer(np.outer(x[i, 0], x[i, b]).ravel(), x[i, b]) * shares[i] for i in (0, 1) for b in (1, 2))
    far = sum(entry**2 for entry in (fractions(adjoint[0]) - exact).flat)
    assert 0 < far <= Fraction(float(bound)) ** 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_conjugate_of_a_point_is_bounded_in_exact_arithmetic(dtype):
    mpmath = pytest.importorskip("mpmath")
    mpmath.mp.dps = 60
    loss, targets = cvxlib.CrossEntropy(), torch.arange(4)
    spread = torch.tensor([1e-3, 1.0, 40.0, 300.0], dtype=dtype).unsqueeze(1)
    residual = loss.gradient(normal(4, 5, seed=1).to(dtype) * spread, targets).double()
    above, distance = loss.conjugate_above(residual, targets)
    for row, target, bound, near in zip(
        residual.tolist(), targets.tolist(), above.tolist(), distance.tolist(), strict=True
    ):
        pi = [max(value + (k == target), 0.0) for k, value in enumerate(row)]
        total = sum(map(mpmath.mpf, pi))
        exact = [mpmath.mpf(value) / total for value in pi]
        value = sum(share * mpmath.log(share) for share in exact if share > 0)
        assert value <= bound <= value + (1e-13 if dtype == torch.float64 else 1e-5)
        for k, (share, entry, far) in enumerate(zip(exact, row, near, strict=True)):
            assert abs(share - (k == target) - mpmath.mpf(entry)) <= far


def test_bounds_that_cross_cannot_be_made():
    cvxlib.Certificate(1.0, 1.0 + 1e-15)
    with pytest.raises(CrossedBounds, match=r"expected dual <= primal; got dual=1\.001, primal=1\.0"):
        cvxlib.Certificate(1.0, 1.001)
    with pytest.raises(CrossedBounds):
        cvxlib.Certificate(math.nan, 0.5)
    assert cvxlib.Certificate(1.0, -math.inf).relative_gap == math.inf


def test_what_a_bound_rests_on_is_said():
    class Own(cvxlib.SelfAttention):
        def hidden(self, tokens, u):
            return super().hidden(tokens, u)

    own = program(Own(2, 2))
    certificate = cvxlib.solve(own).certificate
    assert certificate.assurance is Assurance.ROUNDING and "to rounding" in repr(certificate)
    assert "Own does not say" in own.why_not_rigorous
    rigorous = cvxlib.solve(program(cvxlib.SelfAttention(2, 2))).certificate
    assert "rigorous" in repr(rigorous)


SCALES = [1e-100, 1e-55, 1e-30, 1e-8, 1e8, 1e30, 1e60]


def scaled(case, tokens, targets=1.0):
    """The same program in other units: with beta scaled as the theory says, its solution is the same in those units."""
    y = case.targets * targets if case.targets.is_floating_point() else case.targets
    beta = case.beta * targets * tokens**case.mixer.degree
    return cvxlib.ConvexProgram(case.mixer, case.activation, case.loss, case.tokens * tokens, y, beta, case.pool)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("mixer, activation", [(m, a) for m in MIXERS for a in ("linear", "gated")], ids=name)
@pytest.mark.parametrize("loss", LOSSES, ids=name)
def test_tokens_of_any_size_have_the_same_solution(mixer, activation, loss, scale):
    case = program(mixer, activation, loss)
    other = scaled(case, scale)
    assert other.beta_max() == pytest.approx(case.beta_max() * scale**mixer.degree, rel=1e-9)
    one, two = cvxlib.solve(case, tol=1e-6), cvxlib.solve(other, tol=1e-6)
    assert two.status is cvxlib.Status.CERTIFIED and two.objective == pytest.approx(one.objective, rel=2e-6)
    assert two.certificate.dual <= one.objective
    predictions = [solution.head()(solution.program.tokens).detach() for solution in (one, two)]
    assert torch.allclose(*predictions, rtol=1e-2, atol=1e-2)
    audit = cvxlib.certify(other, two.head(), two.certificate.dual_point)
    assert audit.relative_gap <= 2e-6


@pytest.mark.parametrize("scale", [1e-100, 1e-30, 1e30, 1e100])
@pytest.mark.parametrize("mixer", MIXERS, ids=name)
def test_targets_of_any_size_have_the_same_solution(mixer, scale):
    case = program(mixer)
    one, two = cvxlib.solve(case, tol=1e-6), cvxlib.solve(scaled(case, 1.0, scale), tol=1e-6)
    assert two.status is cvxlib.Status.CERTIFIED
    assert two.objective == pytest.approx(one.objective * scale**2, rel=2e-6)


@pytest.mark.parametrize("scale", [1e-12, 1e-8, 1e6, 1e9])
def test_single_precision_holds_sizes_that_its_weights_can(scale):
    case = program(cvxlib.SelfAttention(2, 2), loss=LOSSES[1])
    single = cvxlib.ConvexProgram(
        case.mixer, case.activation, case.loss, (case.tokens * scale).float(), case.targets, case.beta * scale**3
    )
    assert single.beta_max() == pytest.approx(case.beta_max() * scale**3, rel=1e-5)
    solution = cvxlib.solve(single, tol=1e-4)
    assert solution.certificate.relative_gap <= 1e-4
    assert solution.objective == pytest.approx(cvxlib.solve(case).objective, rel=3e-4)


def test_a_size_that_no_weight_can_hold_is_a_clear_error():
    tokens = (normal(4, 3, 2) * 1e-36).float()
    case = cvxlib.ConvexProgram(
        cvxlib.SelfAttention(2, 2), cvxlib.Linear(), LOSSES[1], tokens, torch.tensor([0, 1, 0, 1]), 1e-110
    )
    with pytest.raises(ValueError, match=r"tokens: expected a size for which torch\.float32 can hold the weights"):
        cvxlib.solve(case)


def centred(order):
    """Tokens whose features add up to zero, in an order: along the direction of ones every hidden entry is a rounding error."""
    tokens = normal(8, 3, 4, seed=2) * 10.0 ** normal(4, seed=3)
    tokens -= tokens.mean(2, keepdim=True)
    return tokens[:, :, order]


def test_gates_that_rounding_decides_are_counted_and_frozen():
    mixer, ones = cvxlib.MLP(4, 2), cvxlib.GatedReLU(torch.ones(1, 4).double())
    with pytest.warns(GatesByRounding, match="entries of L_X h are within rounding of 0"):
        case = program(mixer, ones, pool=None, tokens=centred([0, 1, 2, 3]))
        solution = cvxlib.solve(case, tol=1e-6)
        certificate = cvxlib.certify(case, solution.head())
    assert case.frozen.margin.close > 0 and case.frozen.margin.least < 1
    # in single precision the audit is about the same masks as the solve
    single = program(mixer, ones, pool=None, tokens=centred([0, 1, 2, 3]).float())
    found = cvxlib.solve(single, tol=1e-4)
    audit = cvxlib.certify(single, found.head(), found.certificate.dual_point)
    assert audit.primal == pytest.approx(found.objective, rel=1e-5)
    assert certificate.primal == pytest.approx(solution.objective, rel=1e-9)


def test_gates_that_are_clear_are_not_complained_of():
    case = program(cvxlib.SelfAttention(2, 2), "gated")
    with warnings.catch_warnings():
        warnings.simplefilter("error", GatesByRounding)
        cvxlib.solve(case)
        zero = program(cvxlib.MLP(2, 2), cvxlib.GatedReLU(torch.zeros(1, 2).double()))
        cvxlib.solve(zero)
    assert case.frozen.margin.close == zero.frozen.margin.close == 0 and case.frozen.margin.least > 1


@pytest.mark.parametrize("activation", ["linear", "gated"])
@pytest.mark.parametrize("mixer", MIXERS, ids=name)
def test_masks_are_the_same_whichever_samples_are_asked_for(mixer, activation, monkeypatch):
    case = program(mixer, activation, samples=7)
    whole = [case.frozen.masks(b, 0, 7) for b in range(mixer.blocks)]
    monkeypatch.setattr("cvxlib.operators.gates.KEPT_BYTES", 0)
    monkeypatch.setattr("cvxlib.operators.gates.CHUNK_BYTES", 1000)
    again = program(mixer, activation, samples=7).frozen
    for start, stop in ((0, 7), (2, 5), (6, 7)):
        for b, masks in enumerate(whole):
            assert torch.equal(again.masks(b, start, stop), masks[start:stop])
