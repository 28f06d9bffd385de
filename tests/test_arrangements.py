"""Sign patterns: exact counts in general and degenerate position, against Cover's formula and against brute force."""

import itertools
import types

import numpy as np
import pytest
import torch
from scipy.optimize import linprog

import cvxlib
from cvxlib.geometry.arrangements import cover_count, enumerate_patterns, sample_patterns
from cvxlib.geometry.nonnegative import is_optimal, least_squares
from cvxlib.model.stacked import exact_rows, lifted_rows, lifted_weights


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def brute_force(rows):
    """All sign vectors of the rows that are not zero, each tried by its own linear program."""
    rows = rows.numpy()[np.linalg.norm(rows.numpy(), axis=1) > 0]
    found = set()
    for signs in itertools.product((1.0, -1.0), repeat=len(rows)):
        cone = np.array(signs)[:, None] * rows
        constraints = np.hstack([-cone, np.ones((len(rows), 1))])
        box = [(-1, 1)] * rows.shape[1] + [(None, 1)]
        best = linprog(np.append(np.zeros(rows.shape[1]), -1.0), constraints, np.zeros(len(rows)), bounds=box)
        if -best.fun > 1e-7:
            found.add(signs)
    return found


def as_signs(arrangement, rows):
    keep = rows.norm(dim=1) > 0
    return {tuple(1.0 if bit else -1.0 for bit in pattern) for pattern in arrangement.patterns[:, keep].tolist()}


@pytest.mark.parametrize(
    "count, rank", [(1, 1), (6, 1), (2, 2), (9, 2), (150, 2), (3, 3), (14, 3), (40, 3), (9, 4), (8, 6)]
)
def test_general_position_has_covers_count(count, rank):
    rows = normal(count, count, rank)
    found = enumerate_patterns(rows)
    assert found.complete and (found.hyperplanes, found.rank) == (count if rank > 1 else 1, rank)
    assert len(found) == len(found.patterns.unique(dim=0)) == cover_count(count if rank > 1 else 1, rank)


def test_cover_count_by_hand():
    assert [cover_count(0, 0), cover_count(1, 1), cover_count(4, 2), cover_count(5, 3)] == [1, 2, 8, 22]
    assert cover_count(5, 9) == 2**5


def short(seed, *shape):
    """Numbers of few digits, whose products are exact: rows made of them are dependent in exact arithmetic."""
    return (64 * normal(seed, *shape)).round() / 64


X = short(7, 4, 3)


def fractions(mixer, tokens):
    """Stacked data that floats hold exactly, from the mixer's own exact rows."""
    return torch.as_tensor(exact_rows(mixer, tokens).astype(float))


DEGENERATE = {
    "repeated": X[[0, 1, 1, 2, 0]],
    "antipodal": torch.stack([X[0], -X[0], X[1], -2 * X[1], X[2]]),
    "zero": torch.cat([X[:2], torch.zeros(2, 3, dtype=torch.float64), X[2:]]),
    "all zero": torch.zeros(3, 2, dtype=torch.float64),
    "rank 2 of 3": X[:, :2] @ short(8, 2, 3),
    "rank 1 of 3": X[:, :1] @ short(8, 1, 3),
    "three through a line": torch.stack([X[0], X[1], X[0] + X[1], X[0] - 2 * X[1], X[2]]),
    "fewer rows than columns": normal(9, 3, 5),
    "attention": lifted_rows(cvxlib.SelfAttention(2, 1), short(3, 2, 2, 2)),
    "attention, repeated token": lifted_rows(cvxlib.SelfAttention(2, 1), short(3, 2, 1, 2).expand(2, 2, 2)),
    "causal attention": lifted_rows(cvxlib.CausalSelfAttention(2, 1), short(4, 2, 2, 2)),
    "FNO": fractions(cvxlib.FNO(2, 1, 1), torch.cat([short(5, 3, 2, 1), torch.ones(1, 2, 1).double()])),
}


@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_position_agrees_with_brute_force(name):
    rows = DEGENERATE[name]
    found = enumerate_patterns(rows)
    truth = brute_force(rows)
    assert found.complete and as_signs(found, rows) == truth
    assert len(found) == len(truth) <= cover_count(found.hyperplanes, found.rank)


@pytest.mark.parametrize("name", DEGENERATE)
def test_directions_lie_inside_their_cones(name):
    rows = DEGENERATE[name]
    found = enumerate_patterns(rows)
    hidden = found.directions @ rows.mT
    signs = torch.where(found.patterns, 1.0, -1.0).double()
    assert bool((signs * hidden)[:, rows.norm(dim=1) > 0].gt(1e-9).all())
    assert as_signs(found, rows) == {tuple(-s for s in signs) for signs in as_signs(found, rows)}


@pytest.mark.parametrize("name", DEGENERATE)
def test_sampled_patterns_are_among_the_enumerated(name):
    rows = DEGENERATE[name]
    every, sampled = enumerate_patterns(rows), sample_patterns(rows, draws=50)
    assert as_signs(sampled, rows) <= as_signs(every, rows)
    assert not sampled.complete or len(sampled) == len(every)


def test_sampling_proves_completeness_only_at_covers_count():
    rows = normal(0, 5, 2)
    assert not sample_patterns(rows, draws=3).complete
    assert sample_patterns(rows, draws=5000).complete and len(sample_patterns(rows, draws=5000)) == 10


def test_limit_stops_the_search_with_genuine_patterns():
    rows = normal(1, 30, 4)
    found = enumerate_patterns(rows, limit=100)
    assert not found.complete and len(found) > 100
    assert as_signs(found, rows) <= as_signs(enumerate_patterns(rows), rows)
    with pytest.raises(ValueError, match="activation: expected a ReLU with few enough sign patterns"):
        cvxlib.ReLU(limit=100).gates(cvxlib.MLP(4, 1), rows.unsqueeze(1))


@pytest.mark.parametrize(
    "rows, count",
    [
        ([[1.0, 0.0], [1.0, 1e-11], [0.0, 1.0]], 6),
        ([[1e10, 1.0], [1e10, -1.0], [2e10, 0.5]], 6),
        ([[1e6, 0.0], [0.0, 1e-5]], 4),
        ([[1e300, 1e-300], [1e-300, 1e300], [1.0, 1.0]], 6),
        (
            [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0 + 2**-52], [1.0, 1.0 + 2**-52, 1.0], [0.0, 0.0, 5e-324]],
            12,
        ),  # rows 1, 2 and 4 share a line
    ],
)
def test_no_row_is_too_small_and_no_two_are_too_close(rows, count):
    found = enumerate_patterns(torch.tensor(rows, dtype=torch.float64))
    assert found.complete and len(found) == len(found.patterns.unique(dim=0)) == count


def lies(matrix, target, maxiter=None):
    """A non-negative least squares solver that is wrong."""
    return np.full(matrix.shape[1], 0.3), 0.0


def test_a_solver_that_lies_changes_no_pattern_and_no_bound(monkeypatch):
    rows, tokens = normal(40, 12, 3), normal(2, 6, 1, 2)
    truth = enumerate_patterns(rows)
    program = cvxlib.ConvexProgram(
        cvxlib.MLP(2, 1), cvxlib.ReLU(), cvxlib.SquaredLoss(), tokens, normal(3, 6, 1), beta=0.05
    )
    honest = cvxlib.solve(program, tol=1e-6)
    monkeypatch.setattr("scipy.optimize.nnls", lies)
    found = enumerate_patterns(rows)
    assert found.complete and torch.equal(found.patterns, truth.patterns)
    fresh = cvxlib.ConvexProgram(
        program.mixer, program.activation, program.loss, program.tokens, program.targets, program.beta
    )
    fooled = cvxlib.solve(fresh, tol=1e-6)
    assert fooled.certificate.dual <= honest.certificate.primal * (1 + 1e-9)
    monkeypatch.setattr(
        "scipy.optimize.lsq_linear", lambda *args, **options: types.SimpleNamespace(x=lies(args[0], 0)[0])
    )
    found = enumerate_patterns(rows)
    assert found.complete and torch.equal(found.patterns, truth.patterns)
    fresh = cvxlib.ConvexProgram(
        program.mixer, program.activation, program.loss, program.tokens, program.targets, program.beta
    )
    fooled = cvxlib.solve(fresh, tol=1e-6)
    assert fooled.certificate.dual <= honest.certificate.primal * (1 + 1e-9)
    assert fooled.status is not cvxlib.Status.EXACT or fooled.certificate.relative_gap <= 1e-6


def test_wrong_answers_of_least_squares_are_seen():
    rng = np.random.default_rng(0)
    for size in ((3, 5), (6, 4), (8, 40)):
        matrix, target = rng.standard_normal(size), rng.standard_normal(size[0])
        weights, optimal = least_squares(matrix, target)
        assert optimal and is_optimal(matrix, target, weights)
        assert not is_optimal(matrix, target, weights + 0.01)
        assert not is_optimal(matrix, target, np.zeros(size[1]))


EXACT = [
    cvxlib.SelfAttention(2, 3),
    cvxlib.CausalSelfAttention(2, 2),
    cvxlib.CrossAttention(2, 2, queries=2),
    cvxlib.MLPMixer(4, 2, 2),
    cvxlib.FNO(4, 2, 2),
    cvxlib.BlockFNO(4, 2, 2, blocks=2),
    cvxlib.MLP(2, 2),
    cvxlib.Convolution(4, 2, 2, kernel=3),
]


@pytest.mark.parametrize("mixer", EXACT, ids=repr)
def test_exact_rows_are_the_stacked_data(mixer):
    for seen in mixer.split(normal(5, 3, 4, 2)):
        rows = exact_rows(mixer, seen)
        assert rows.dtype == object
        assert torch.allclose(torch.as_tensor(rows.astype(float)), lifted_rows(mixer, seen), rtol=1e-13, atol=1e-14)


class Reversed(cvxlib.SelfAttention):
    """Other hidden matrices than those that the inherited exact rows say again."""

    def hidden(self, tokens, u):
        return super().hidden(tokens.flip(2), u)


class Wrong(Reversed):
    def exact_rows(self, tokens):
        return super().exact_rows(tokens)


def test_exact_rows_of_other_maps_are_not_used_and_wrong_ones_are_refused():
    tokens = normal(6, 2, 3, 2)
    assert np.array_equal(exact_rows(Reversed(2, 1), tokens), lifted_rows(Reversed(2, 1), tokens).numpy())
    with pytest.raises(ValueError, match="mixer: expected exact_rows to be the rows that hidden multiplies u with"):
        exact_rows(Wrong(2, 1), tokens)


MIXERS = [
    cvxlib.SelfAttention(2, 3),
    cvxlib.MLPMixer(3, 2, 2),
    cvxlib.FNO(3, 2, 2),
    cvxlib.MLP(2, 2),
    cvxlib.Convolution(3, 2, 2, 2),
]


@pytest.mark.parametrize("mixer", MIXERS, ids=repr)
@pytest.mark.parametrize("pool", ["mean", None])
def test_rows_and_weights_give_the_relu_network(mixer, pool):
    tokens, u, v = normal(1, 4, 3, 2), normal(2, 1, *mixer.shape), normal(3, 1, mixer.width, mixer.outputs)
    zero = torch.zeros(1, dtype=torch.long)
    predictions = cvxlib.Head(mixer, cvxlib.ReLU(), u, v, zero, zero, pool)(tokens).detach()
    dual = torch.randn_like(predictions)
    hidden = (lifted_rows(mixer, tokens) @ u.flatten()).relu()
    weights = lifted_weights(mixer, tokens, dual.unsqueeze(1) if pool else dual)
    assert float(hidden @ weights @ v.flatten()) == pytest.approx(float((dual * predictions).sum()), rel=1e-12)


def test_bad_rows_are_named():
    with pytest.raises(TypeError, match=r"rows: expected a float32 or float64 array of shape \(R, p\)"):
        enumerate_patterns([[1.0]])
    with pytest.raises(ValueError, match="rows: expected finite entries"):
        enumerate_patterns(torch.full((2, 2), torch.nan))
    with pytest.raises(ValueError, match="limit: expected a whole number"):
        enumerate_patterns(X, limit=0)
