"""The energies: gradients, majorisers, which steps descend which energy and which do not."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import example, given, settings

from cvxlib import energy

EPS = torch.finfo(torch.float64).eps


def tokens(seed, *shape, scale=1.0, offset=0.0):
    generator = torch.Generator().manual_seed(seed)
    Y = scale * torch.randn(*shape, generator=generator, dtype=torch.float64)
    direction = torch.randn(*shape[:-2], 1, shape[-1], generator=generator, dtype=torch.float64)
    return Y + offset * direction / direction.norm(dim=-1, keepdim=True)


def weights(seed, d, k):
    return tokens(1000 + seed, d, k) / math.sqrt(d)


def rises(energy_of, before, after):
    """Whether an energy rises by more than rounding: s^2 + sd terms of its size."""
    old, new = energy_of(before), energy_of(after)
    size = before.shape[-2] ** 2 + before.square().sum((-2, -1)) + after.square().sum((-2, -1))
    return new - old > 32 * EPS * size


def counterexample():
    """Ten tokens at 4 and one at 1, on a line: the straggler is drawn away from the origin faster than the crowd comes nearer."""
    return torch.tensor([4.0] * 10 + [1.0], dtype=torch.float64).unsqueeze(1), torch.eye(1, dtype=torch.float64)


# values and gradients


def test_attention_energy_is_the_sum_over_pairs_counted_once():
    Y, W = tokens(0, 3, 5, 4), weights(0, 4, 2)
    for sample, value in zip(Y, energy.attention_energy(Y, W), strict=True):
        z = sample @ W
        pairs = sum(-math.exp(-float((z[i] - z[j]) @ (z[i] - z[j])) / 2) for i in range(5) for j in range(i))
        assert float(value) == pytest.approx(pairs + float(z.square().sum()) / 2, rel=1e-13)


def test_feedforward_energy_is_its_formula_and_infinite_outside_the_orthant():
    Y, W, B = tokens(1, 3, 5, 4), tokens(2, 4, 4), tokens(3, 4)
    expected = torch.stack([0.5 * torch.trace(y @ W @ y.T) + 0.5 * (y - B).square().sum() for y in Y])
    torch.testing.assert_close(energy.feedforward_energy(Y, W, B), expected)
    assert energy.feedforward_energy(Y, W, B, nonnegative=True).isinf().all()
    assert energy.feedforward_energy(Y.abs(), W, B, nonnegative=True).isfinite().all()


@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("which", ["attention", "feedforward"])
def test_gradients_match_finite_differences(which, scale):
    Y, W, V, B = tokens(4, 6, 3, scale=scale, offset=1), tokens(5, 3, 3), tokens(6, 6, 3), tokens(7, 6, 3)
    if which == "attention":
        value, gradient = lambda y: energy.attention_energy(y, W), energy.attention_gradient(Y, W)
    else:
        value, gradient = lambda y: energy.feedforward_energy(y, W, B), energy.feedforward_gradient(Y, W, B)
    h = 1e-5
    difference = (value(Y + h * V) - value(Y - h * V)) / (2 * h)
    assert float(difference) == pytest.approx(float((gradient * V).sum()), rel=1e-7, abs=1e-7)
    at = Y.clone().requires_grad_()
    (automatic,) = torch.autograd.grad(value(at), at)
    torch.testing.assert_close(automatic, gradient)


def test_gradient_is_finite_where_tokens_coincide():
    Y = tokens(8, 1, 3).repeat(4, 1).requires_grad_()
    W = weights(8, 3, 3)
    (automatic,) = torch.autograd.grad(energy.attention_energy(Y, W), Y)
    torch.testing.assert_close(automatic, energy.attention_gradient(Y.detach(), W))


# the step


def test_reweighted_weights_are_the_normalised_gaussian_kernel():
    Y, W = tokens(9, 2, 6, 4, offset=2), weights(9, 4, 3)
    z = Y @ W
    beta = (-z.square().sum(-1) / 2).exp()
    scores = beta.unsqueeze(-2) * (z @ z.mT).exp()
    softmax = scores / scores.sum(-1, keepdim=True)
    torch.testing.assert_close(energy.attention_weights(Y, W), softmax)
    torch.testing.assert_close(energy.attention_weights(Y, W, keys=W), softmax)
    plain = (z @ z.mT).exp()
    torch.testing.assert_close(energy.attention_weights(Y, W, reweighted=False), plain / plain.sum(-1, keepdim=True))
    torch.testing.assert_close(energy.attention_step(Y, W, 0.3), 0.7 * Y + 0.3 * softmax @ Y)


def test_sink_step_is_the_preconditioned_gradient_step():
    Y = tokens(10, 7, 3)
    W = torch.eye(3, dtype=torch.float64)
    degree = torch.exp(-(torch.cdist(Y, Y) ** 2) / 2).sum(1, keepdim=True)
    expected = Y - 0.6 * energy.attention_gradient(Y, W) / (degree + 1)
    torch.testing.assert_close(energy.attention_step(Y, W, 0.6, sink=True), expected)


@pytest.mark.parametrize("seed", range(3))
def test_majorisers_touch_and_lie_above(seed):
    at, W = tokens(seed, 8, 3, offset=1), weights(seed, 3, 3)
    for separable in (False, True):
        touch = energy.attention_majoriser(at, at, W, separable=separable)
        assert float(touch) == pytest.approx(float(energy.attention_energy(at, W)), rel=1e-12)
        for distance in (0.01, 0.3, 1, 5):
            Y = at + distance * tokens(seed + 50, 20, 8, 3)
            above = energy.attention_majoriser(Y, at, W, separable=separable) - energy.attention_energy(Y, W)
            assert above.min() > -1e-11
    tight = energy.attention_majoriser(Y, at, W) - energy.attention_majoriser(Y, at, W, separable=True)
    assert tight.max() < 1e-11


def test_step_is_the_minimiser_of_the_majoriser_found_by_a_generic_optimiser():
    at, W = tokens(11, 6, 3, offset=1), torch.linalg.qr(tokens(12, 3, 3)).Q
    Y = at.clone().requires_grad_()
    optimiser = torch.optim.LBFGS(
        [Y], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure():
        optimiser.zero_grad()
        value = energy.attention_majoriser(Y, at, W, separable=True)
        value.backward()
        return value

    optimiser.step(closure)
    torch.testing.assert_close(Y.detach(), energy.attention_step(at, W, sink=True), atol=1e-8, rtol=0)


# which steps descend

instances = {
    "seed": st.integers(0, 10**6),
    "s": st.integers(2, 24),
    "d": st.integers(1, 6),
    "scale": st.floats(0.01, 5),
    "offset": st.floats(0, 50),
    "step": st.floats(0.01, 1),
}


@settings(max_examples=300)
@given(**instances)
def test_sink_step_never_raises_the_attention_energy(seed, s, d, scale, offset, step):
    Y, W = tokens(seed, s, d, scale=scale, offset=offset), weights(seed, d, d)
    for size in (step, 2 * step):  # theorem 3 covers (0, 2)
        after = energy.attention_step(Y, W, size, sink=True)
        assert not rises(lambda y: energy.attention_energy(y, W), Y, after)


@settings(max_examples=300)
@given(**instances)
def test_reweighted_step_never_raises_the_pair_energy(seed, s, d, scale, offset, step):
    Y, W = tokens(seed, s, d, scale=scale, offset=offset), weights(seed, d, d)
    for size in (step, 2 * step):  # theorem 1 covers (0, 2)
        assert not rises(lambda y: energy.pair_energy(y, W), Y, energy.attention_step(Y, W, size))


@settings(max_examples=300)
@given(**{name: strategy for name, strategy in instances.items() if name != "offset"})
def test_reweighted_step_never_raises_the_attention_energy_of_a_centred_cloud(seed, s, d, scale, step):
    Y, W = tokens(seed, s, d, scale=scale), weights(seed, d, d)
    assert not rises(lambda y: energy.attention_energy(y, W), Y, energy.attention_step(Y, W, step))


@settings(max_examples=200)
@given(s=st.integers(2, 12), seed=st.integers(0, 10**6), radius=st.floats(0.1, 50), step=st.floats(0.01, 1))
@example(s=8, seed=0, radius=20.0, step=1.0)
def test_reweighted_step_descends_where_denser_tokens_have_smaller_norms(s, seed, radius, step):
    # equal norms satisfy the condition of theorem 2 with equality, however far from the origin the tokens are
    z = torch.nn.functional.normalize(tokens(seed, s, 3, offset=3), dim=1) * radius
    W = torch.eye(3, dtype=torch.float64)
    assert not rises(lambda y: energy.attention_energy(y, W), z, energy.attention_step(z, W, step))


@pytest.mark.parametrize("step", [0.01, 0.5, 1.0])
def test_counterexample_raises_the_attention_energy_but_not_with_a_sink(step):
    Y, W = counterexample()
    before = energy.attention_energy(Y, W)
    assert energy.attention_energy(energy.attention_step(Y, W, step), W) > before + 0.002 * step
    assert energy.attention_energy(energy.attention_step(Y, W, step, sink=True), W) < before
    assert energy.pair_energy(energy.attention_step(Y, W, step), W) < energy.pair_energy(Y, W)


@pytest.mark.parametrize("step", [0.5, 1.0])
def test_plain_softmax_raises_the_energy_at_unit_scale_but_not_at_small_scale(step):
    def falling_runs(scale, reweighted):
        Y, W = tokens(13, 50, 30, 20, scale=scale), weights(13, 20, 20)
        rose = torch.zeros(50, dtype=torch.bool)
        for _ in range(12):
            after = energy.attention_step(Y, W, step, reweighted)
            rose |= rises(lambda y: energy.attention_energy(y, W), Y, after)
            Y = after
        return int((~rose).sum())

    assert falling_runs(0.1, True) == falling_runs(1.0, True) == falling_runs(0.1, False) == 50
    assert falling_runs(1.0, False) == 0


# the feed-forward step, and both


@settings(max_examples=150)
@given(seed=st.integers(0, 10**6), nonnegative=st.booleans(), share=st.floats(0.01, 1))
def test_feedforward_step_never_raises_its_energy(seed, nonnegative, share):
    Y, W, B = tokens(seed, 5, 4), tokens(seed + 1, 4, 4), tokens(seed + 2, 5, 4)
    Y = Y.abs() if nonnegative else Y
    curvature = torch.linalg.eigvalsh(torch.eye(4) + (W + W.T) / 2)
    step = share * 2 / max(float(curvature[-1]), 0.5)
    after = energy.feedforward_step(Y, W, B, step, nonnegative)
    old, new = (energy.feedforward_energy(y, W, B, nonnegative) for y in (Y, after))
    assert new <= old + 64 * EPS * (old.abs() + Y.square().sum() * W.norm() + B.square().sum())


def test_full_feedforward_step_is_a_relu_layer_and_sees_the_symmetric_part_only():
    Y, W, B = tokens(14, 5, 4), tokens(15, 4, 4), tokens(16, 4)
    expected = torch.relu(B - Y @ (W + W.T) / 2)
    torch.testing.assert_close(energy.feedforward_step(Y, W, B, nonnegative=True), expected)
    symmetric = energy.feedforward_step(Y, (W + W.T) / 2, B, nonnegative=True)
    torch.testing.assert_close(symmetric, expected)
    assert (energy.feedforward_step(Y, W, B) < 0).any()


@settings(max_examples=150)
@given(**instances, nonnegative=st.booleans())
def test_matched_step_never_raises_the_total_energy(seed, s, d, scale, offset, step, nonnegative):
    Y, B = tokens(seed, s, d, scale=scale, offset=offset), tokens(seed + 1, s, d)
    Y = Y.abs() if nonnegative else Y
    layer = energy.EnergyLayer(
        weights(seed, d, d), tokens(seed, d, d), step=1.99 * step, matched=True, nonnegative=nonnegative
    )
    with torch.no_grad():
        old, new = layer.energy(Y, B), layer.energy(layer(Y, B), B)
    assert new <= old + 1e-12 * (s**2 + Y.square().sum() + B.square().sum()) * 10


def test_minimise_reaches_a_stationary_point():
    Y = tokens(17, 2, 6, 3)
    for nonnegative in (False, True):
        layer = energy.EnergyLayer(weights(17, 3, 3), tokens(18, 3, 3) / 4, nonnegative=nonnegative)
        best = energy.minimise(layer, Y, Y, iterations=5000, tol=1e-15)
        slope = energy.attention_gradient(best, layer.attention.detach())
        slope = slope + energy.feedforward_gradient(best, layer.weights().detach(), Y)
        moved = best - (best - slope).clamp(min=0) if nonnegative else slope
        assert moved.abs().max() < 1e-5


# layers


def test_relu_layer_differs_from_the_linear_one():
    Y = tokens(19, 4, 6, 3)
    linear, relu = (
        energy.EnergyLayer(weights(19, 3, 3), tokens(20, 3, 3) / 4, nonnegative=n, step=0.5, feedforward_step=0.5)
        for n in (False, True)
    )
    assert (relu(Y, Y) >= 0).all()
    assert (relu(Y, Y) - linear(Y, Y)).abs().max() > 0.1


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("options", [{}, {"reweighted": False}, {"matched": True, "nonnegative": True}, {"sink": True}])
def test_stack_trains_every_weight_and_traces_its_energies(shared, options):
    X = tokens(21, 5, 6, 4).float()
    network = energy.EnergyTransformer(
        4, 3, width=5, layers=3, shared=shared, step=0.5, feedforward_step=0.5, **options
    )
    assert len(network.layers) == (1 if shared else 3)
    torch.nn.functional.cross_entropy(network(X), torch.arange(5) % 3).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    before, after = network.trace(X)
    assert before.shape == after.shape == (3, 5)
    assert torch.equal(before[1:], after[:-1]) == shared
    if options.get("matched"):
        assert (after <= before + 1e-4).all()


def test_leading_axes_are_a_batch():
    Y, W, B = tokens(22, 2, 3, 5, 4), weights(22, 4, 4), tokens(23, 4)
    torch.testing.assert_close(energy.attention_step(Y, W)[1, 2], energy.attention_step(Y[1, 2], W))
    torch.testing.assert_close(energy.attention_energy(Y, W)[1, 2], energy.attention_energy(Y[1, 2], W))
    torch.testing.assert_close(energy.feedforward_energy(Y, W, B)[1, 2], energy.feedforward_energy(Y[1, 2], W, B))


def test_asymmetric_keys_have_no_energy():
    # with W = keys the field (D - A)Z is a gradient and its Jacobian symmetric; with other keys it is not
    Y, W, K = tokens(24, 4, 2), weights(24, 2, 2), weights(25, 2, 2)

    def asymmetry(keys):
        def field(y):
            y = y.reshape(4, 2)
            q, k = y @ W, y @ keys
            a = torch.exp(-torch.cdist(q, k, compute_mode="donot_use_mm_for_euclid_dist").square() / 2)
            return ((a.sum(1, keepdim=True) * y - a @ y) @ W @ W.T).flatten()

        def plus(y):  # cdist has no derivative at distance 0
            return field(y)

        h, n = 1e-5, 8
        jacobian = torch.stack(
            [
                (plus(Y.flatten() + h * e) - plus(Y.flatten() - h * e)) / (2 * h)
                for e in torch.eye(n, dtype=torch.float64)
            ]
        )
        return float((jacobian - jacobian.T).norm() / jacobian.norm())

    assert asymmetry(W) < 1e-8
    assert asymmetry(K) > 1e-2


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda Y, W: energy.attention_energy([[1.0]], W), TypeError, "Y: expected"),
        (lambda Y, W: energy.attention_energy(Y[0], W), ValueError, "Y: expected"),
        (lambda Y, W: energy.attention_energy(Y, W[:2]), ValueError, "W: expected"),
        (lambda Y, W: energy.attention_energy(Y, W.float()), TypeError, "W: expected a float64"),
        (lambda Y, W: energy.attention_step(Y, W, 0.0), ValueError, "step: expected"),
        (lambda Y, W: energy.attention_step(Y, W, reweighted=False, sink=True), ValueError, "sink: expected"),
        (lambda Y, W: energy.attention_step(Y, W, keys=W[:, :1]), ValueError, "keys: expected"),
        (lambda Y, W: energy.feedforward_step(Y, W[:, :1], Y), ValueError, "W: expected"),
        (lambda Y, W: energy.feedforward_energy(Y, W, Y[:2]), ValueError, "B: expected"),
        (lambda Y, W: energy.EnergyLayer(W, W, reweighted=False, sink=True), ValueError, "sink: expected"),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call(tokens(26, 4, 3), weights(26, 3, 3))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_agrees_with_the_cpu():
    Y, W, B = tokens(27, 4, 20, 8), weights(27, 8, 8), tokens(28, 8)
    on = [x.cuda() for x in (Y, W, B)]
    torch.testing.assert_close(energy.attention_energy(*on[:2]).cpu(), energy.attention_energy(Y, W))
    torch.testing.assert_close(energy.attention_step(*on[:2]).cpu(), energy.attention_step(Y, W))
    torch.testing.assert_close(energy.feedforward_step(*on).cpu(), energy.feedforward_step(Y, W, B))
