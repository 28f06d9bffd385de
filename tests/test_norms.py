"""The block nuclear norm by its own definitions."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from cvxlib import BlockNuclearNorm
from cvxlib.geometry.norms import top_singular

NORM = BlockNuclearNorm()


def blocks(seed, k=3, p=5, q=4, scale=1.0):
    return scale * torch.randn(k, p, q, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(seed=st.integers(0, 10**6), threshold=st.floats(0, 5))
def test_prox_minimises_its_own_objective(seed, threshold):
    """No random perturbation, and no scaling, does better; the returned norm is that of the minimiser."""
    z = blocks(seed)
    w, norm = NORM.prox(z, threshold)

    def objective(w):
        return (w - z).square().sum() / 2 + threshold * NORM.value(w)

    torch.testing.assert_close(norm, NORM.value(w))
    at_w = objective(w)
    for k, size in enumerate((1e-3, 1e-2, 1e-1)):
        assert objective(w + size * blocks(seed + k + 1)) >= at_w - 1e-12
    for scale in (0.9, 0.999, 1.001, 1.1):
        assert objective(scale * w) >= at_w - 1e-12


@given(seed=st.integers(0, 10**6))
def test_dual_norm_polarity(seed):
    """<G, Z> <= dual(G) value(Z), attained at the leading singular pair."""
    g, z = blocks(seed), blocks(seed + 1)
    assert (g * z).sum() <= NORM.dual(g) * NORM.value(z) + 1e-12
    top = int(NORM.spectral(g).argmax())
    u, _, vh = torch.linalg.svd(g[top])
    attained = torch.zeros_like(g)
    attained[top] = torch.outer(u[:, 0], vh[0])
    torch.testing.assert_close((g * attained).sum(), NORM.dual(g))
    torch.testing.assert_close(NORM.value(attained), torch.tensor(1.0, dtype=torch.float64))


def test_prox_at_a_large_threshold_is_zero():
    z = blocks(0)
    w, norm = NORM.prox(z, float(NORM.dual(z)))
    assert norm <= 1e-14 and w.abs().max() <= 1e-14


def test_spectral_norms_of_large_blocks_are_bounds_from_above(monkeypatch):
    """Also where the largest singular values are equal, as they are at an optimum, and where there are none."""
    left, right = (torch.linalg.qr(blocks(seed, 1, 300, 200)[0])[0] for seed in (1, 2))
    values = torch.linspace(2, 0, 200, dtype=torch.float64).clamp(max=1)
    equal = left * values @ right[:200].mT
    g = torch.stack([equal, blocks(3, 1, 300, 200)[0], torch.zeros_like(left)])
    exact = torch.linalg.svdvals(g)[:, 0]
    monkeypatch.setattr("cvxlib.geometry.norms.LARGEST_EIGEN", 100)
    for stack in (g, g.mT):
        bound = NORM.spectral(stack)
        assert (bound >= exact).all() and (bound <= exact * (1 + 1e-4)).all()
        sigma, vectors, _ = top_singular(stack[1], 3)
        torch.testing.assert_close(vectors.mT @ vectors, torch.eye(3, dtype=torch.float64))
        assert (sigma <= exact[1] * (1 + 1e-12)).all() and (sigma.diff() >= 0).all()
