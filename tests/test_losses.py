"""Losses by their own definitions: gradient, conjugate, proximal point, Hessian."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import cvxlib

LOSSES = [cvxlib.SquaredLoss(), cvxlib.CrossEntropy()]


def problem(loss, seed, rows=7, c=4, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    predictions = scale * torch.randn(rows, c, generator=generator, dtype=torch.float64)
    if isinstance(loss, cvxlib.SquaredLoss):
        return predictions, torch.randn(rows, c, generator=generator, dtype=torch.float64)
    return predictions, torch.randint(0, c, (rows,), generator=generator)


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
@given(seed=st.integers(0, 10**6))
def test_fenchel_young(loss, seed):
    """l(f) + l*(rho) >= <rho, f>, with equality at the gradient."""
    f, y = problem(loss, seed)
    g, _ = problem(loss, seed + 1)
    rho = loss.gradient(f, y)
    equal = loss.value(f, y) + loss.conjugate(rho, y) - (rho * f).sum(-1)
    other = loss.value(g, y) + loss.conjugate(rho, y) - (rho * g).sum(-1)
    assert equal.abs().max() < 1e-12
    assert other.min() > -1e-12


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_gradient_is_the_derivative(loss):
    f, y = problem(loss, 0)
    f.requires_grad_()
    (gradient,) = torch.autograd.grad(loss.value(f, y).sum(), f)
    torch.testing.assert_close(loss.gradient(f, y), gradient)


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_hessian_product_is_the_derivative_of_the_gradient(loss):
    f, y = problem(loss, 1)
    direction, _ = problem(loss, 2)
    _, product = torch.func.jvp(lambda f: loss.gradient(f, y), (f,), (direction,))
    torch.testing.assert_close(loss.hessian_product(f, direction), product)


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
@given(seed=st.integers(0, 10**6), exponent=st.floats(-6, 2))
def test_prox_is_stationary_from_any_start(loss, seed, exponent):
    rho = 10.0**exponent
    v, y = problem(loss, seed, scale=10.0)
    start, _ = problem(loss, seed + 1, scale=30.0)
    for guess in (None, start):
        f = loss.prox(v, y, rho, guess)
        assert (loss.gradient(f, y) + rho * (f - v)).abs().max() < 1e-9 * (1 + rho * v.abs().max())


def test_smoothness_bounds_the_hessian():
    for loss in LOSSES:
        f, _ = problem(loss, 3, rows=200)
        direction, _ = problem(loss, 4, rows=200)
        curvature = (direction * loss.hessian_product(f, direction)).sum(-1) / direction.square().sum(-1)
        assert curvature.max() <= loss.smoothness + 1e-12


def test_cross_entropy_conjugate_is_infinite_outside_the_simplex():
    y = torch.tensor([0])
    loss = cvxlib.CrossEntropy()
    assert loss.conjugate(torch.tensor([[-0.5, 0.5, 0.0]]), y).isfinite()
    assert loss.conjugate(torch.tensor([[-0.5, 0.6, 0.0]]), y).isinf()  # sums to more than 1
    assert loss.conjugate(torch.tensor([[-0.9, 0.5, 0.0]]), y).isinf()  # sums to less than 1
    assert loss.conjugate(torch.tensor([[-1.5, 1.5, 0.0]]), y).isinf()  # a negative probability


def test_points_moved_by_rounding_return_to_the_conjugates_domain():
    for loss in LOSSES:
        f, y = problem(loss, 5)
        rho = loss.gradient(f, y)
        rounded = rho.float().double()
        back = loss.to_domain(rounded, y)
        assert loss.conjugate(back, y).isfinite().all()
        assert (back - rho).abs().max() < 1e-6
    assert loss.conjugate(rounded, y).isinf().any()  # without it the rounding would cost the whole bound
