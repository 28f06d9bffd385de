"""Spatial structure: the distribution, the measure of association, the simplified model, and the convex optimum."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import cvxlib
from cvxlib import spatial

SETS = torch.tensor([[0, 3], [1, 4], [2, 5]])


def blocks(sets):
    task = spatial.SpatialTask(sets, torch.tensor([1.0, 0.0]), q=0.5, sigma=0.1)
    return (task.membership.unsqueeze(1) == task.membership).double()


# the distribution


def test_sample_follows_the_definition():
    task = spatial.SpatialTask.random(3, 4, 6, q=0.4, sigma=0.7, seed=2, dtype=torch.float64)
    sample = task.sample(4000, 5)
    # along w* a patch has exactly its coefficient: the noise is orthogonal
    torch.testing.assert_close(sample.tokens @ task.signal, sample.signal, atol=1e-12, rtol=0)
    inside = task.membership == sample.lit.unsqueeze(1)
    assert bool((sample.signal[inside].reshape(-1, 4) == sample.labels.unsqueeze(1)).all())
    outside = sample.signal[~inside]
    count = outside.numel()
    # six standard deviations of the estimates
    assert abs(float(outside.abs().mean()) - 0.4) < 6 * (0.24 / count) ** 0.5
    assert abs(float(outside.mean())) < 6 * (0.4 / count) ** 0.5
    assert abs(float(sample.labels.mean())) < 6 / 4000**0.5
    noise = sample.tokens - sample.signal.unsqueeze(2) * task.signal
    expected = 0.7**2 * (torch.eye(6) - torch.outer(task.signal, task.signal))
    flat = noise.flatten(0, 1)
    assert float((flat.mT @ flat / len(flat) - expected).abs().max()) < 6 * 0.7**2 * (2 / len(flat)) ** 0.5


def test_sample_is_reproducible_and_batched():
    task = spatial.SpatialTask.random(2, 3, 4, seed=1)
    assert torch.equal(task.sample(5, 3).tokens, task.sample(5, 3).tokens)
    stream = task.batches(5, seed=3)
    first, second = next(stream), next(stream)
    assert torch.equal(first.tokens, task.sample(5, 3).tokens)
    assert not torch.equal(first.tokens, second.tokens)
    other = task.with_signal(9)
    assert torch.equal(other.sets, task.sets) and float((other.signal - task.signal).norm()) > 0.1


@pytest.mark.parametrize(
    "change",
    [
        {"sets": torch.tensor([[0, 1], [1, 2]])},
        {"sets": torch.tensor([0, 1])},
        {"q": 1.5},
        {"sigma": -1.0},
        {"signal": torch.zeros(3)},
    ],
)
def test_task_refuses_bad_input(change):
    good = {"sets": SETS, "signal": torch.ones(3), "q": 0.2, "sigma": 0.1}
    with pytest.raises(ValueError, match=next(iter(change))):
        spatial.SpatialTask(**(good | change))


# association


def test_association_by_hand():
    assert spatial.patch_association(blocks(SETS), SETS) == 1.0
    assert spatial.patch_association(-blocks(SETS), SETS) == 0.0
    assert spatial.patch_association(torch.eye(6), SETS) == pytest.approx((1 + 1 / 5) / 2)
    assert spatial.chance_association(SETS, own_first=True) == pytest.approx((1 + 1 / 5) / 2)
    one_wrong = blocks(SETS)
    one_wrong[0, 1] = 2.0  # row 0 ranks patch 1 before its own set: one of two places is lost (a tie for the other)
    assert spatial.patch_association(one_wrong, SETS) == pytest.approx((5 + 0.5) / 6)


@given(st.integers(0, 10_000))
def test_equal_rows_have_exactly_chance(seed):
    row = torch.randint(0, 3, (12,), generator=torch.Generator().manual_seed(seed)).double()
    sets = torch.randperm(12, generator=torch.Generator().manual_seed(seed + 1)).reshape(3, 4)
    assert spatial.patch_association(row.expand(12, 12), sets) == pytest.approx(4 / 12, abs=1e-12)
    assert spatial.chance_association(sets) == 4 / 12


@given(st.integers(0, 10_000))
def test_association_agrees_with_its_definition_in_sets(seed):
    generator = torch.Generator().manual_seed(seed)
    scores, sets = torch.randn(12, 12, generator=generator), torch.randperm(12, generator=generator).reshape(4, 3)
    shares = [
        len({*sets[l].tolist()} & {*scores[i].argsort(descending=True)[:3].tolist()}) / 3
        for l in range(4)
        for i in sets[l].tolist()
    ]
    assert spatial.patch_association(scores, sets) == pytest.approx(sum(shares) / 12, abs=1e-12)


def test_coherence_sees_whole_sets_wherever_they_are():
    deranged = spatial.deranged_scores(SETS, 1.0)
    assert spatial.patch_association(deranged, SETS) == 0.0 and spatial.set_coherence(deranged, SETS) == 1.0
    mixed = torch.zeros(6, 6)
    mixed[:, [0, 1]] = 1.0  # patches of two sets
    assert spatial.set_coherence(mixed, SETS) == 0.5


def test_association_refuses_the_wrong_shape():
    with pytest.raises(ValueError, match=r"scores: expected shape \(6, 6\)"):
        spatial.patch_association(torch.zeros(5, 5), SETS)
    with pytest.raises(TypeError, match="scores"):
        spatial.patch_association(torch.zeros(6, 6, dtype=torch.int64), SETS)


def test_scalars_by_hand():
    scores = 2 * blocks(SETS) - 0.5 * (1 - blocks(SETS))
    scores.fill_diagonal_(77)  # the diagonal belongs to neither
    signal, value = torch.tensor([1.0, 0, 0]), torch.tensor([0.3, 5, 5])
    result = spatial.attention_scalars(scores, value, signal, SETS)
    assert (result.alpha, result.gamma, result.rho) == pytest.approx((0.3, 2.0, -0.5))


# the simplified model


def test_model_is_its_formula():
    task = spatial.SpatialTask.random(2, 2, 3, seed=4, dtype=torch.float64)
    model = spatial.PositionalModel.random(task, scale=0.5, seed=1, nu=0.2, power=5)
    sample = task.sample(6, 1)
    expected = []
    for x in sample.tokens:
        total = 0.0
        for i in range(4):
            weights = torch.exp(model.scores[i] / 3**0.5)
            z = 4 * sum(weights[j] / weights.sum() * (model.value @ x[j]) for j in range(4))
            total = total + 0.2 * z + z**5
        expected.append(total)
    torch.testing.assert_close(model(sample.tokens), torch.stack(expected), rtol=1e-12, atol=1e-14)


def test_gradient_descent_learns_the_sets_in_the_order_of_the_theory():
    task = spatial.SpatialTask.random(4, 3, 8, q=0.2, sigma=0.5, seed=0)
    model = spatial.PositionalModel.random(task, seed=0)
    diagonal = model.scores.detach().diagonal().clone()
    trace = spatial.train_positional(model, task, task.sample(2000, 1), steps=500, lr_value=3e-3, seed=2, every=5)
    assert torch.equal(model.scores.detach().diagonal(), diagonal)
    assert float(trace.association[0]) < 0.7 and float(trace.association[-1]) == 1.0
    assert float(trace.error[0]) > 0.2 and float(trace.error[-1]) < 0.03
    spread = trace.gamma - trace.rho
    half_alpha = int((trace.alpha > trace.alpha[-1] / 2).nonzero()[0])
    half_spread = int((spread > spread[-1] / 2).nonzero()[0])
    assert half_alpha < half_spread


def test_frozen_scores_stay():
    task = spatial.SpatialTask.random(2, 2, 3, seed=4)
    model = spatial.PositionalModel.random(task, seed=0)
    before = model.scores.detach().clone(), model.value.detach().clone()
    spatial.train_positional(model, task, 50, steps=5, lr_scores=0.0, seed=2)
    assert torch.equal(model.scores.detach(), before[0]) and not torch.equal(model.value.detach(), before[1])


def test_divergence_is_reported():
    task = spatial.SpatialTask.random(2, 2, 3, seed=4)
    model = spatial.PositionalModel.random(task, seed=0)
    with pytest.raises(FloatingPointError, match="smaller step sizes"):
        spatial.train_positional(model, task, 50, steps=200, lr_value=1e30, clip=None)


def test_the_same_function_with_and_without_association():
    task = spatial.SpatialTask.random(4, 3, 8, q=0.2, sigma=0.5, seed=3, dtype=torch.float64)
    strength = 40.0
    right = spatial.PositionalModel(strength * blocks(task.sets), task.signal)
    wrong = spatial.PositionalModel(spatial.deranged_scores(task.sets, strength), task.signal)
    assert spatial.patch_association(right.scores, task.sets) == 1.0
    assert spatial.patch_association(wrong.scores, task.sets) == 0.0
    sample = task.sample(500, 2)
    torch.testing.assert_close(right(sample.tokens), wrong(sample.tokens), rtol=1e-10, atol=1e-10)


def test_merged_scores_are_a_gram_matrix_without_association():
    task = spatial.SpatialTask.random(4, 6, 8, q=0.2, seed=3, dtype=torch.float64)
    scores = spatial.merged_scores(task.sets, 40.0)
    assert torch.equal(scores, scores.mT) and float(torch.linalg.eigvalsh(scores)[0]) > -1e-12
    assert len(scores.diagonal().unique()) == 1
    assert spatial.patch_association(scores, task.sets) == pytest.approx(1 / 6)
    assert spatial.PositionalModel(scores, task.signal).error(task.sample(5000, 1)) < 0.01


# the convex optimum


def test_population_optimum_is_stationary_feasible_and_tight():
    task = spatial.SpatialTask.random(3, 4, 5, q=0.6, sigma=0.9, seed=0, dtype=torch.float64)
    beta = 0.7
    optimum = spatial.population_optimum(task, beta)
    z = optimum.zeta * optimum.blocks.reshape(-1, 1) * task.signal  # (D^2, d)
    # exact second moments: x = signal coefficients, t = targets
    count, size, same = 3, 4, optimum.blocks
    cross = same / count
    second = same / count + (1 - 1 / count) * 0.6 * torch.eye(12, dtype=torch.float64)
    mixing = optimum.zeta * same
    gradient = ((mixing @ second - cross).reshape(-1, 1)) * task.signal  # the noise enters with <w*, noise> = 0
    spectral = torch.linalg.svdvals(gradient)[0]
    assert float(spectral) == pytest.approx(beta, rel=1e-12)  # dual feasible
    nuclear = torch.linalg.svdvals(z).sum()
    assert float((gradient * z).sum()) == pytest.approx(-beta * float(nuclear), rel=1e-12)  # complementary
    risk = (size - 2 * torch.trace(mixing @ cross.mT) + torch.trace(mixing @ second @ mixing.mT)) / 2
    assert optimum.objective == pytest.approx(float(risk + beta * nuclear), rel=1e-12)
    assert optimum.beta_max == pytest.approx(4 / 3**0.5)
    assert spatial.population_optimum(task, 4.0).zeta == 0.0


def test_certified_optimum_approaches_the_population():
    task = spatial.SpatialTask.random(3, 3, 4, q=0.5, sigma=0.5, seed=1, dtype=torch.float64)
    sample = task.sample(2000, 3)
    beta = 0.3 * spatial.population_optimum(task, 0.1).beta_max
    expected = spatial.population_optimum(task, beta)
    solution = cvxlib.solve(spatial.mixer_program(task, sample, beta), tol=1e-6)
    assert solution.status is cvxlib.Status.CERTIFIED
    # 2,000 samples: relative deviations of order 1 / sqrt(2000) = 2 %; three of these
    assert solution.objective == pytest.approx(expected.objective, rel=0.067)
    target = expected.zeta * expected.blocks.reshape(-1, 1) * task.signal
    assert float((solution.lifted[0] - target).norm() / target.norm()) < 0.2
    assert spatial.patch_association(spatial.mixing_matrix(solution.factors), task.sets) == 1.0


@pytest.mark.parametrize("targets", ["pooled", "label"])
def test_readouts_that_cannot_see_the_sets_give_equal_rows(targets):
    task = spatial.SpatialTask.random(3, 3, 4, q=0.5, sigma=0.5, seed=1, dtype=torch.float64)
    program = spatial.mixer_program(task, task.sample(60, 3), 1.0, targets)
    program = program.with_beta(0.2 * program.beta_max())
    factors = cvxlib.solve(program, tol=1e-9).factors
    assert len(factors) >= 1
    for j in range(len(factors)):
        matrix = spatial.mixing_matrix(factors, j)
        torch.testing.assert_close(matrix, matrix[:1].expand_as(matrix), rtol=0, atol=1e-3 * float(matrix.norm()))
    rows = spatial.mixing_matrix(factors).mean(0).expand(9, 9).contiguous()
    assert spatial.patch_association(rows, task.sets) == pytest.approx(1 / 3)


def test_mixing_matrix_of_zero_and_unknown_targets():
    task = spatial.SpatialTask.random(2, 2, 3, seed=1, dtype=torch.float64)
    sample = task.sample(10, 3)
    program = spatial.mixer_program(task, sample, 1.0)
    zero = cvxlib.solve(program.with_beta(1.01 * program.beta_max()))
    assert torch.equal(spatial.mixing_matrix(zero.factors), torch.zeros(4, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match="targets"):
        spatial.mixer_program(task, sample, 1.0, "other")


def test_import_loads_no_timm():
    code = "import sys; from cvxlib import spatial; print(sorted({'timm', 'torchvision', 'matplotlib'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
