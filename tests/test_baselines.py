"""The heads outside the family: what they compute, that they train on a program's own objective, and why they get no certificate."""

import pytest
import torch
from family import LOSSES, POOLS, build, name, normal, program

import cvxlib
from cvxlib.model.baselines import LinearHead, SoftmaxAttention
from cvxlib.solvers.training import train

TOKENS = normal(5, 4, 2)


def baselines(pool="mean"):
    return [LinearHead(2, 3, pool, torch.float64), SoftmaxAttention(2, 3, heads=3, pool=pool, dtype=torch.float64)]


def test_softmax_attention_is_its_formula():
    head = SoftmaxAttention(2, 3, heads=2, pool=None, seed=1, dtype=torch.float64)
    with torch.no_grad():
        for x, prediction in zip(TOKENS, head(TOKENS), strict=True):
            scores = [torch.exp(x @ u @ x.T) for u in head.u]
            expected = sum((e / e.sum(1, keepdim=True)) @ x @ v for e, v in zip(scores, head.v, strict=True))
            torch.testing.assert_close(prediction, expected, rtol=1e-12, atol=1e-12)


def test_softmax_attention_with_one_score_for_all_is_the_mean_token():
    head = SoftmaxAttention(2, 3, heads=1, dtype=torch.float64)
    with torch.no_grad():
        head.u.zero_()
        torch.testing.assert_close(head(TOKENS), TOKENS.mean(1) @ head.v[0], rtol=1e-12, atol=1e-12)


def test_softmax_is_not_linear_in_its_scores():
    head = SoftmaxAttention(2, 3, heads=1, dtype=torch.float64)
    with torch.no_grad():
        once = head(TOKENS)
        head.u.mul_(2)
        assert float((head(TOKENS) - 2 * once).abs().max()) > 1e-2


def test_the_linear_head_is_its_formula():
    head = LinearHead(2, 3, None, torch.float64)
    head.weight.data = normal(2, 3)
    assert torch.equal(head(TOKENS), TOKENS @ head.weight)


@pytest.mark.parametrize("pool, shape", [("mean", (5, 3)), (None, (5, 4, 3))])
def test_pooling_and_weight_decay(pool, shape):
    for head in baselines(pool):
        assert head(TOKENS).shape == shape
        entries = torch.cat([weight.detach().flatten() for weight in head.parameters()])
        assert float(head.weight_decay().detach()) == pytest.approx(float(entries.square().sum()) / 2)


@pytest.mark.parametrize("pool", POOLS, ids=name)
@pytest.mark.parametrize("loss", LOSSES, ids=name)
@pytest.mark.parametrize("k", [0, 1], ids=["LinearHead", "SoftmaxAttention"])
def test_they_train_on_the_programs_objective(k, loss, pool):
    case = program(build(cvxlib.SelfAttention, outputs=3), "linear", loss, pool)
    head = baselines(pool)[k]
    before = [weight.clone() for weight in head.parameters()]
    training = train(case, head=head, epochs=60, learning_rate=3e-2, warmup_epochs=0)
    assert training.final < 0.99 * float(training.objective[0])
    assert all(torch.equal(a, b) for a, b in zip(before, head.parameters(), strict=True)), "a copy is trained"
    with torch.no_grad():
        predictions = training.head(case.tokens).reshape(-1, 3)
        expected = case.data_loss(predictions) + case.beta * float(training.head.weight_decay())
    assert training.final == pytest.approx(expected, rel=1e-12)


def test_the_linear_head_reaches_ridge_regression():
    """Its training is convex, with a solution in closed form."""
    case = program(build(cvxlib.MLP), "linear", samples=20)
    mean = case.tokens.mean(1)
    ridge = torch.linalg.solve(mean.T @ mean + 20 * case.beta * torch.eye(2), mean.T @ case.targets)
    training = train(case, head=LinearHead(2, 2, dtype=torch.float64), epochs=400, learning_rate=3e-2)
    torch.testing.assert_close(training.head.weight.detach(), ridge, rtol=1e-2, atol=1e-3)


def test_a_trained_head_of_the_family_goes_on_training():
    case = program(build(cvxlib.MLP), "gated")
    first = train(case, heads=2, epochs=20)
    second = train(case, head=first.head, epochs=20)
    assert float(second.objective[0]) == pytest.approx(first.final, rel=1e-12)
    assert cvxlib.certify(case, second.head).primal == pytest.approx(second.final, rel=1e-12)


@pytest.mark.parametrize("arguments", [{}, {"heads": 2, "head": LinearHead(2, 2)}])
def test_training_takes_either_a_width_or_a_network(arguments):
    with pytest.raises(ValueError, match=r"heads: expected either heads or head; got (both|neither)"):
        train(program(build(cvxlib.MLP)), **arguments)


@pytest.mark.parametrize(
    "k, sentence",
    [
        (0, r"^head: expected a cvxlib\.Head; got a plain linear head, whose training is a convex problem of its own"),
        (1, r"^head: expected a cvxlib\.Head; got softmax attention, which for no choice of gates is linear"),
    ],
)
def test_they_are_never_certified_and_told_why(k, sentence):
    case = program(build(cvxlib.SelfAttention, outputs=3))
    with pytest.raises(TypeError, match=sentence) as caught:
        cvxlib.certify(case, baselines()[k])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "make", [lambda: LinearHead(0, 1), lambda: SoftmaxAttention(2, 1, heads=0), lambda: LinearHead(2, 1, "max")]
)
def test_the_door(make):
    with pytest.raises(ValueError, match="expected"):
        make()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu():
    for head in baselines():
        torch.testing.assert_close(head.cuda()(TOKENS.cuda()).cpu(), head.cpu()(TOKENS))
