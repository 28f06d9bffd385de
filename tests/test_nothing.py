"""Nothing breaks on nothing: no neuron, no open gate, one sample, one token, one feature, tokens of zeros; for everything that takes a mixer."""

import numpy as np
import pytest
import torch
from family import LOSSES, MIXERS, SIZES, build, name, normal, program

import cvxlib

CASES = [(mixer, activation) for mixer in MIXERS for activation in ("linear", "gated")]
SMALLEST = dict.fromkeys(SIZES, 1)


def closed(mixer, tokens):
    """Gates of which none opens: for positive tokens the hidden entries of a direction of negative numbers are negative."""
    direction = torch.full((1, *mixer.direction_shape), -1.0, dtype=tokens.dtype)
    return cvxlib.GatedReLU(direction)


@pytest.mark.parametrize("mixer, activation", CASES, ids=name)
@pytest.mark.parametrize("loss", LOSSES, ids=name)
def test_zero_solutions_predict_train_save_and_load(mixer, activation, loss, tmp_path):
    case = program(mixer, activation, loss, fraction=1.5)
    solution = cvxlib.solve(case)
    head = solution.head()
    assert len(head) == solution.rank == 0 and solution.certificate.relative_gap <= 1e-4
    predictions = head(case.tokens)
    assert predictions.shape == (len(case.tokens), mixer.outputs) and not predictions.any()
    (predictions.sum() + head.weight_decay()).backward()
    assert cvxlib.certify(case, head).relative_gap <= 1e-4
    assert cvxlib.certify(case, head, independent=True).relative_gap <= 1e-4
    for value in (solution, head):
        cvxlib.save(tmp_path / "nothing.safetensors", value)
        loaded = cvxlib.load(tmp_path / "nothing.safetensors")
        again = loaded if value is head else loaded.head()
        assert not again(case.tokens).any()


@pytest.mark.parametrize("mixer, activation", CASES, ids=name)
def test_a_path_starts_from_nothing(mixer, activation):
    case = program(mixer, activation, fraction=1.0)
    path = cvxlib.path(case, count=3, ratio=0.3, progress=False)
    assert path.solutions[0].rank == 0 < path.solutions[-1].rank
    assert not path.solutions[0].head()(case.tokens).any()


@pytest.mark.parametrize("mixer", MIXERS, ids=name)
@pytest.mark.parametrize("solver", ["splitting", "staircase", "proximal", None])
def test_no_sample_passes_any_gate(mixer, solver):
    tokens = normal(5, SIZES["tokens"], SIZES["features"]).abs() + 0.1
    case = program(mixer, closed(mixer, tokens), tokens=tokens)
    assert case.beta_max() == 0
    solution = cvxlib.solve(case, solver=solver)
    assert solution.rank == 0 and solution.certificate.relative_gap <= 1e-4
    assert not solution.head()(tokens).any()
    head = cvxlib.Head.random(mixer, case.activation, 2, dtype=torch.float64)
    certificate = cvxlib.certify(case, head)
    assert certificate.dual <= solution.objective <= certificate.primal


@pytest.mark.parametrize("mixer, activation", CASES, ids=name)
@pytest.mark.parametrize("solver", ["splitting", "staircase", "proximal"])
def test_one_sample(mixer, activation, solver):
    solution = cvxlib.solve(program(mixer, activation, samples=1), solver=solver)
    assert solution.certificate.relative_gap <= 1e-4


@pytest.mark.parametrize("kind", [type(mixer) for mixer in MIXERS if type(mixer) is not cvxlib.CrossAttention])
@pytest.mark.parametrize("activation", ["linear", "gated"])
def test_one_token_one_feature_one_output(kind, activation):
    mixer = build(kind, **SMALLEST)
    case = program(mixer, activation, tokens=normal(4, 1, 1), seed=2)
    solution = cvxlib.solve(case)
    assert solution.certificate.relative_gap <= 1e-4
    assert solution.head()(case.tokens).shape == (4, 1)


@pytest.mark.parametrize("mixer, activation", CASES, ids=name)
def test_tokens_of_zeros(mixer, activation):
    case = program(mixer, activation, tokens=torch.zeros(4, SIZES["tokens"], SIZES["features"]).double())
    assert case.beta_max() == 0
    solution = cvxlib.solve(case)
    assert solution.rank == 0 and solution.certificate.gap <= 1e-12


@pytest.mark.parametrize("mixer", MIXERS, ids=name)
def test_relu_of_zeros_and_above_beta_max(mixer):
    activation = cvxlib.ReLU(limit=50)
    zeros = program(mixer, activation, tokens=torch.zeros(2, SIZES["tokens"], SIZES["features"]).double())
    assert not cvxlib.solve(zeros).head()(zeros.tokens).any()
    case = program(mixer, activation, samples=2, fraction=1.01)
    assert not cvxlib.solve(case).head()(case.tokens).any()


@pytest.mark.parametrize("mixer", ["SelfAttention", "CausalSelfAttention", "MLPMixer", "FNO", "MLP"])
def test_estimators_that_learn_nothing(mixer):
    pytest.importorskip("sklearn")
    tokens, labels = normal(12, 4, 2).numpy(), np.arange(12) % 2
    model = cvxlib.ConvexHeadClassifier(mixer, beta=1.5).fit(tokens, labels)
    assert len(model.head_) == 0 and model.predict(tokens).shape == (12,)
    assert np.allclose(model.predict_proba(tokens), 0.5)
