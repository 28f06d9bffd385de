"""Cone-constrained norms: against dense sampling, CVXPY, and each other."""

import numpy as np
import pytest
import torch

import cvxlib
from cvxlib.geometry.cones import any_pattern_bound, dual_norm, facets, lagrangian_bound, nuclear_norm, project, split
from cvxlib.geometry.norms import BlockConeNorm
from cvxlib.model.stacked import exact_rows

SIZES = [
    (1, 2, 1),
    (2, 1, 3),
    (2, 2, 1),
    (2, 3, 12),
    (3, 1, 8),
    (3, 2, 4),
    (3, 3, 15),
    (4, 2, 12),
    (4, 4, 2),
    (5, 3, 10),
]


def instance(p, q, rows, seed=0):
    """A matrix, and a cone of unit rows with an inside."""
    rng = np.random.default_rng(seed + 100 * p + 10 * q + rows)
    cone = rng.standard_normal((rows, p))
    cone *= np.sign(cone @ rng.standard_normal(p))[:, None] / np.linalg.norm(cone, axis=1, keepdims=True)
    return rng.standard_normal((p, q)), cone


def points(cone, count=4000, seed=0):
    """Unit vectors that fill a cone, its faces included: projections of a cloud."""
    cloud = np.random.default_rng(seed).standard_normal((count, cone.shape[1]))
    inside = np.array([project(x, cone) for x in cloud])
    inside = inside[np.linalg.norm(inside, axis=1) > 1e-6]
    return inside / np.linalg.norm(inside, axis=1, keepdims=True)


@pytest.mark.parametrize("p, q, rows", SIZES)
def test_facets_describe_the_same_cone_and_none_is_spare(p, q, rows):
    _, cone = instance(p, q, rows)
    kept = facets(cone)
    assert (points(kept, 500) @ cone.T).min() > -1e-9
    for index in range(len(kept)):
        others = np.delete(kept, index, axis=0)
        outside = project(-kept[index], others)  # without this row the cone reaches beyond it
        assert kept[index] @ outside < -1e-9


@pytest.mark.parametrize("p, q, rows", SIZES)
def test_projection_satisfies_moreau(p, q, rows):
    _, cone = instance(p, q, rows)
    for x in np.random.default_rng(1).standard_normal((20, p)):
        near = project(x, cone)
        assert (cone @ near).min() > -1e-9 and abs(near @ (x - near)) < 1e-9
        assert (points(cone, 100) @ (x - near)).max() < 1e-9


@pytest.mark.parametrize("p, q, rows", SIZES)
@pytest.mark.parametrize("seed", range(3))
def test_dual_norm_is_the_maximum_over_the_cone(p, q, rows, seed):
    g, cone = instance(p, q, rows, seed)
    found = dual_norm(g, facets(cone))
    sampled = np.linalg.norm(points(cone) @ g, axis=1).max()
    assert found.exact()
    assert sampled <= found.upper * (1 + 1e-9)
    assert sampled >= (0.995 if p < 4 else 0.9) * found.lower  # dense enough to notice a bound that is too high
    if found.u is not None:
        assert (cone @ found.u).min() > -1e-9
        assert found.u @ g @ found.v == pytest.approx(found.lower, rel=1e-9)
        assert np.linalg.norm(found.u) == pytest.approx(1) and np.linalg.norm(found.v) == pytest.approx(1)


@pytest.mark.parametrize("p, q, rows", SIZES)
def test_bounds_are_ordered(p, q, rows):
    g, cone = instance(p, q, rows, 5)
    exact, kept = dual_norm(g, facets(cone)), facets(cone)
    spectral, shor = np.linalg.norm(g, 2), lagrangian_bound(g, kept)
    assert exact.lower <= shor * (1 + 1e-9) and shor <= spectral * (1 + 1e-9)
    hurried = dual_norm(g, kept, nodes=1)
    assert hurried.lower <= exact.upper * (1 + 1e-9) and exact.lower <= hurried.upper * (1 + 1e-9)


def test_a_floor_prunes_but_never_hides_a_larger_value():
    g, cone = instance(4, 4, 12)
    kept, value = facets(cone), dual_norm(g, facets(cone)).lower
    assert dual_norm(g, kept, floor=0.5 * value).upper == pytest.approx(value, rel=1e-9)
    assert dual_norm(g, kept, floor=2 * value).upper <= 2 * value * (1 + 1e-9)


@pytest.mark.parametrize("p, rows", [(2, 3), (2, 12), (3, 8), (4, 12), (6, 9)])
def test_split_is_the_second_order_cone_program(p, rows):
    cp = pytest.importorskip("cvxpy")
    for seed in range(3):
        g, cone = instance(p, 1, rows, seed)
        u = g[:, 0]
        plus, minus = split(u, cone)
        assert np.abs(plus - minus - u).max() < 1e-10 * (1 + np.abs(plus).max())
        assert min((cone @ plus).min(), (cone @ minus).min()) > -1e-9 * (1 + np.abs(plus).max())
        x = cp.Variable(p)
        problem = cp.Problem(cp.Minimize(cp.norm(x) + cp.norm(x - u)), [cone @ x >= 0, cone @ (x - u) >= 0])
        problem.solve(solver="CLARABEL")
        assert np.linalg.norm(plus) + np.linalg.norm(minus) == pytest.approx(problem.value, rel=1e-6)


def test_split_leaves_members_alone_and_refuses_flat_cones():
    _, cone = instance(3, 1, 6)
    member = points(cone, 10)[0]
    for u, parts in ((member, (member, 0 * member)), (-member, (0 * member, member))):
        assert all(np.allclose(a, b) for a, b in zip(split(u, cone), parts, strict=True))
    flat = np.array([[1.0, 0.0], [-1.0, 0.0]])
    with pytest.raises(ValueError, match="cone: expected a cone with an inside"):
        split(np.array([1.0, 1.0]), flat)


@pytest.mark.parametrize("p, q, rows", [(2, 2, 4), (3, 1, 6), (3, 2, 4), (2, 3, 3)])
def test_nuclear_norm_from_both_sides(p, q, rows):
    z, cone = instance(p, q, rows, 3)
    found = nuclear_norm(z, facets(cone), tol=1e-4)
    assert found.exact(2e-4)
    assert found.lower >= np.linalg.norm(z, "nuc") * (1 - 1e-9)  # the cone only adds
    if q == 1:
        plus, minus = split(z[:, 0], cone)
        assert found.upper == pytest.approx(np.linalg.norm(plus) + np.linalg.norm(minus), rel=1e-6)
    for seed in range(5):  # polarity: <G, Z> <= dual norm times norm
        g, _ = instance(p, q, rows, 50 + seed)
        assert (g * z).sum() <= dual_norm(g, cone).upper * found.upper * (1 + 1e-9)


def test_nuclear_norm_of_terms_inside_the_cone_is_at_most_their_sum():
    _, cone = instance(3, 2, 5)
    inside = points(cone, 4)[:2]
    z = np.outer(inside[0], [1.0, 0.0]) + np.outer(inside[1], [0.0, 2.0])
    assert nuclear_norm(z, cone, tol=1e-4).lower <= 3 * (1 + 1e-9)
    one = np.outer(inside[0], [0.6, 0.8])
    assert nuclear_norm(one, cone).upper == pytest.approx(1, rel=1e-6)
    assert nuclear_norm(-one, cone).upper == pytest.approx(1, rel=1e-6)  # v may have any sign
    assert nuclear_norm(0 * z, cone).upper == 0


@pytest.mark.parametrize("rows, p, q", [(6, 2, 2), (20, 3, 1), (40, 8, 4)])
def test_any_pattern_bound_lies_above_every_direction(rows, p, q):
    rng = np.random.default_rng(rows)
    data, weights = rng.standard_normal((rows, p)), rng.standard_normal((rows, q))
    u = rng.standard_normal((20000, p))
    u /= np.linalg.norm(u, axis=1, keepdims=True)
    largest = np.linalg.norm(np.maximum(u @ data.T, 0) @ weights, axis=1).max()
    bound = any_pattern_bound(data, weights)
    trivial = np.linalg.norm(data, 2) * np.linalg.norm(weights, 2)
    assert largest <= bound <= trivial * (1 + 1e-9)
    with pytest.raises(ValueError, match="weights: expected"):
        any_pattern_bound(data, weights[1:])


def test_block_norm_takes_the_worst_block_and_finds_its_term():
    mixer, rows = (
        cvxlib.MLP(2, 3),
        torch.randn(7, 1, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
    )
    gates = cvxlib.ReLU().gates(mixer, rows)
    norm = BlockConeNorm([exact_rows(mixer, rows)], gates.directions, torch.zeros(gates.count, dtype=torch.long))
    g = torch.randn(gates.count, 2, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    each = [dual_norm(g[k].numpy(), norm.cone(k)).upper for k in range(gates.count)]
    bounds, terms = norm.search(g)
    assert float(norm.dual(g)) == bounds.upper == pytest.approx(max(each), rel=1e-9)
    value, k, u, v = terms[0]
    assert value == pytest.approx(float(u @ g[k].numpy() @ v)) == pytest.approx(bounds.lower)
    assert norm.locate(
        torch.as_tensor(u + 1e-3 * norm.direction(k))[None], torch.zeros(1, dtype=torch.long)
    ).tolist() == [k]
    assert not norm.search(g, threshold=1.01 * bounds.upper)[1]
