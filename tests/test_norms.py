"""The block nuclear norm by its own definitions."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from cvxlib import BlockNuclearNorm

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
