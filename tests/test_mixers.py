"""The whole family: the battery over every public mixer, and the theorems of the papers as tests."""

import itertools

import pytest
import torch
from family import EVERY_CASE, LOSSES, MIXERS, POOLS, SIZES, build, full_width, name, normal, objective, program, train
from hypothesis import given, settings
from hypothesis import strategies as st

import cvxlib
from cvxlib.audit.certificates import certify
from cvxlib.testing import check_mixer, network_objective

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
LOSS_AND_POOL = list(itertools.product(LOSSES, POOLS))
CASES = list(itertools.product(("linear", "gated"), LOSSES, POOLS))
TOKENS = normal(6, SIZES["tokens"], SIZES["features"])


def relative(one, other):
    return abs(one - other) / max(abs(one), abs(other))


# the battery


def test_the_mixers_are_enrolled_by_name():
    expected = "BlockFNO CausalSelfAttention Convolution CrossAttention FNO MLP MLPMixer SelfAttention".split()
    assert set(expected) <= {name(mixer) for mixer in MIXERS}


@pytest.mark.parametrize("mixer", MIXERS, ids=name)
def test_the_battery(mixer):
    check_mixer(mixer, TOKENS)


@pytest.mark.parametrize(
    "mixer, lifted",
    [
        (cvxlib.SelfAttention(features=3, outputs=2), (9, 6)),
        (cvxlib.CausalSelfAttention(features=3, outputs=2), (9, 6)),
        (cvxlib.CrossAttention(features=3, outputs=2, queries=1), (9, 6)),
        (cvxlib.MLPMixer(tokens=5, features=3, outputs=2), (25, 6)),
        (cvxlib.FNO(tokens=5, features=4, outputs=2), (20, 2)),
        (cvxlib.BlockFNO(tokens=5, features=4, outputs=2, blocks=2), (10, 1)),
        (cvxlib.MLP(features=3, outputs=2), (3, 2)),
        (cvxlib.Convolution(tokens=5, features=3, outputs=2, kernel=2), (6, 8)),
    ],
    ids=name,
)
def test_the_lifted_shapes_are_the_papers(mixer, lifted):
    assert (mixer.p, mixer.q) == lifted


# theorems


@pytest.mark.parametrize("mixer, activation, loss, pool", EVERY_CASE, ids=name)
def test_full_width_training_reaches_the_certified_optimum_and_never_goes_below(mixer, activation, loss, pool):
    case = program(mixer, activation, loss, pool)
    solution = cvxlib.solve(case, tol=1e-6)
    certificate = solution.certificate
    assert certificate.relative_gap <= 1e-6

    # as many heads as the rank, which is never more than m*, and the objective of the network is that of the program
    ranks = torch.linalg.matrix_rank(solution.lifted, atol=1e-12)
    assert len(solution.head()) == solution.rank == int(ranks.sum())
    assert int(ranks.max()) <= full_width(case)
    assert relative(network_objective(case, solution.head()), solution.objective) < 1e-8

    best = float("inf")
    for seed in range(4):
        head = train(case, seed)
        reached = float(objective(case, head).detach())
        assert reached >= certificate.dual * (1 - 1e-12)
        assert certify(case, head).primal == pytest.approx(reached, rel=1e-12)
        best = min(best, reached)
        if relative(best, certificate.primal) < 2e-6:
            break
    assert relative(best, certificate.primal) < 2e-6


@pytest.mark.parametrize("mixer", MIXERS, ids=name)
def test_one_head_too_few_stays_above_the_bound(mixer):
    """Any number of heads is certified, also below m*: then the interval says how much the width costs."""
    case = program(mixer, "linear", LOSSES[0], None, fraction=0.02)
    solution = cvxlib.solve(case, tol=1e-6)
    narrow = cvxlib.Head.random(mixer, case.activation, 1, pool=None, dtype=torch.float64)
    certificate = certify(case, narrow)
    assert certificate.dual <= solution.objective <= certificate.primal
    assert certificate.relative_gap > 1e-3


@pytest.mark.parametrize("loss, pool", LOSS_AND_POOL, ids=name)
@pytest.mark.parametrize("mixer", MIXERS, ids=name)
def test_one_gate_of_ones_is_linear(mixer, loss, pool):
    """A direction of zeros gives hidden matrices of zeros, whose gates 1{0 >= 0} are all open."""
    linear = program(mixer, "linear", loss, pool)
    ones = cvxlib.GatedReLU(torch.zeros(1, *mixer.direction_shape, dtype=torch.float64))
    gated = cvxlib.ConvexProgram(mixer, ones, loss, linear.tokens, linear.targets, linear.beta, pool)
    z = normal(*linear.operator.shape, seed=1)
    assert gated.operator.shape == linear.operator.shape
    assert torch.equal(gated.operator.forward(z), linear.operator.forward(z))
    assert gated.beta_max() == linear.beta_max()
    if loss == LOSSES[0]:
        assert cvxlib.solve(gated, tol=1e-6).objective == cvxlib.solve(linear, tol=1e-6).objective


@pytest.mark.parametrize("activation, loss, pool", CASES, ids=name)
def test_block_fno_of_one_block_is_fno(activation, loss, pool):
    whole = program(build(cvxlib.FNO), activation, loss, pool)
    one_block = cvxlib.ConvexProgram(
        build(cvxlib.BlockFNO, blocks=1), whole.activation, loss, whole.tokens, whole.targets, whole.beta, pool
    )
    z = normal(*whole.operator.shape, seed=1)
    assert torch.equal(one_block.operator.forward(z), whole.operator.forward(z))
    assert cvxlib.solve(one_block, tol=1e-6).objective == cvxlib.solve(whole, tol=1e-6).objective


def test_block_structure_never_helps_the_fit():
    """Block FNO is FNO with weights held at zero: at the same beta its optimum is no better."""
    blocks = program(build(cvxlib.BlockFNO), "linear", LOSSES[0], None)
    whole = cvxlib.ConvexProgram(
        build(cvxlib.FNO), cvxlib.Linear(), LOSSES[0], blocks.tokens, blocks.targets, blocks.beta, None
    )
    assert cvxlib.solve(blocks, tol=1e-6).objective >= cvxlib.solve(whole, tol=1e-6).certificate.dual


@pytest.mark.parametrize("activation", ["linear", "gated"])
@pytest.mark.parametrize("pool", POOLS, ids=name)
def test_under_squared_loss_blocks_are_programs_of_their_own(activation, pool):
    """Four features in each block, so that a block's share differs from a share of it."""
    mixer, n = cvxlib.BlockFNO(tokens=3, features=8, outputs=4, blocks=2), 7
    tokens, targets = normal(n, 3, 8), normal(n, *([] if pool else [3]), 4, seed=1)
    gates = cvxlib.Linear() if activation == "linear" else cvxlib.GatedReLU.sample(mixer, count=2, seed=0)
    case = cvxlib.ConvexProgram(mixer, gates, LOSSES[0], tokens, targets, 0.01, pool)
    solution = cvxlib.solve(case, tol=1e-6)
    assert certify(case, solution.head(), solution.certificate.dual_point).relative_gap < 1.1e-6
    parts = 0.0
    for b in range(2):
        own = gates if activation == "linear" else cvxlib.GatedReLU(gates.directions[:, b])
        half = cvxlib.ConvexProgram(
            cvxlib.FNO(3, 4, 2), own, LOSSES[0], tokens.chunk(2, -1)[b], targets.chunk(2, -1)[b], 0.01, pool
        )
        parts += cvxlib.solve(half, tol=1e-6).objective
    assert relative(solution.objective, parts) < 2e-6


@pytest.mark.parametrize("mixer", MIXERS, ids=name)
def test_repeated_gates_are_merged_and_leave_the_optimum(mixer):
    case = program(mixer, "gated", fraction=0.1)
    directions = case.activation.directions
    repeated = torch.cat([directions, 3 * directions, directions.flip(0)])
    again = cvxlib.ConvexProgram(
        mixer, cvxlib.GatedReLU(repeated), case.loss, case.tokens, case.targets, case.beta, case.pool
    )
    assert again.operator.shape == case.operator.shape
    assert cvxlib.solve(again, tol=1e-6).objective == cvxlib.solve(case, tol=1e-6).objective
    solution = cvxlib.solve(again, tol=1e-6)
    assert int(solution.head().gate.max()) < len(directions)
    assert certify(again, solution.head(), solution.certificate.dual_point).relative_gap < 1.1e-6


@pytest.mark.parametrize("mixer", MIXERS, ids=name)
def test_gates_that_are_never_or_always_open(mixer):
    """On positive tokens a direction of ones opens every gate and one of minus ones none that could pass anything."""
    tokens = TOKENS.abs() + 0.1
    linear = program(mixer, "linear", tokens=tokens)
    ones = torch.ones(1, *mixer.direction_shape, dtype=torch.float64)
    optimum = cvxlib.solve(linear, tol=1e-6).objective

    both = cvxlib.ConvexProgram(
        mixer, cvxlib.GatedReLU(torch.cat([-ones, ones])), linear.loss, tokens, linear.targets, linear.beta
    )
    solution = cvxlib.solve(both, tol=1e-6)
    assert relative(solution.objective, optimum) < 2e-6
    assert set(solution.head().gate.tolist()) == {1}

    shut = cvxlib.ConvexProgram(mixer, cvxlib.GatedReLU(-ones), linear.loss, tokens, linear.targets, linear.beta)
    solution = cvxlib.solve(shut, tol=1e-6)
    nothing = linear.objective(linear.operator.zeros())
    assert shut.beta_max() == 0
    assert (solution.rank, solution.status) == (0, cvxlib.Status.CERTIFIED)
    assert solution.objective == pytest.approx(nothing, rel=1e-12)
    assert certify(shut, solution.head()).relative_gap < 1e-12
    assert torch.equal(solution.head()(tokens), torch.zeros(len(tokens), mixer.outputs, dtype=torch.float64))


@pytest.mark.parametrize("loss, pool", LOSS_AND_POOL, ids=name)
@pytest.mark.parametrize("activation", ["linear", "gated"])
@pytest.mark.parametrize("mixer", MIXERS, ids=name)
def test_beta_max_and_more_give_exactly_zero(mixer, activation, loss, pool):
    case = program(mixer, activation, loss, pool)
    for factor in (1.0, 4.0, 100.0):
        solution = cvxlib.solve(case.with_beta(factor * case.beta_max()), tol=1e-9)
        assert (solution.rank, solution.status) == (0, cvxlib.Status.CERTIFIED)
        assert torch.count_nonzero(solution.head()(case.tokens)) == 0
    below = cvxlib.solve(case.with_beta(0.9 * case.beta_max()), tol=1e-9)
    assert below.rank >= 1


# symmetries and fast paths


def _permuted(mixer, activation, seed=0):
    """Pooled predictions of one head for tokens and for the same tokens in another order."""
    head = cvxlib.Head.random(mixer, activation, 3, pool="mean", seed=seed, dtype=torch.float64)
    order = torch.tensor([2, 0, 3, 1])
    return head(TOKENS).detach(), head(TOKENS[:, order]).detach()


@pytest.mark.parametrize("activation", ["linear", "gated"])
@pytest.mark.parametrize("kind", [cvxlib.SelfAttention, cvxlib.MLP], ids=lambda kind: kind.__name__)
def test_permuting_the_tokens_leaves_the_pooled_value_unchanged(kind, activation):
    mixer = build(kind)
    case = program(mixer, activation, LOSSES[1])
    before, after = _permuted(mixer, case.activation)
    torch.testing.assert_close(after, before, rtol=1e-12, atol=1e-12)

    shuffled = torch.stack(
        [x[torch.randperm(len(x), generator=torch.Generator().manual_seed(i))] for i, x in enumerate(case.tokens)]
    )
    same = cvxlib.ConvexProgram(mixer, case.activation, case.loss, shuffled, case.targets, case.beta)
    assert relative(cvxlib.solve(same, tol=1e-6).objective, cvxlib.solve(case, tol=1e-6).objective) < 2e-6


def test_permuting_the_tokens_permutes_attention_per_token():
    mixer, order = build(cvxlib.SelfAttention), torch.tensor([2, 0, 3, 1])
    head = cvxlib.Head.random(mixer, cvxlib.Linear(), 3, pool=None, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(head(TOKENS[:, order]), head(TOKENS)[:, order], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "kind",
    [cvxlib.CausalSelfAttention, cvxlib.CrossAttention, cvxlib.MLPMixer, cvxlib.Convolution],
    ids=lambda kind: kind.__name__,
)
def test_order_matters_to_the_others(kind):
    before, after = _permuted(build(kind), cvxlib.Linear())
    assert float((after - before).abs().max()) > 1e-3


def test_the_causal_mask_hides_what_comes_later():
    head = cvxlib.Head.random(build(cvxlib.CausalSelfAttention), cvxlib.Linear(), 3, pool=None, dtype=torch.float64)
    changed = TOKENS.clone()
    changed[:, -1] += 1
    with torch.no_grad():
        before, after = head(TOKENS), head(changed)
    assert torch.equal(after[:, :-1], before[:, :-1])
    assert not torch.allclose(after[:, -1], before[:, -1])


def test_cross_attention_of_a_set_to_itself_is_self_attention():
    twice = torch.cat([TOKENS, TOKENS], 1)
    u = normal(3, 2, 2, seed=1)
    cross = cvxlib.CrossAttention(features=2, outputs=2, queries=SIZES["tokens"])
    self_attention = build(cvxlib.SelfAttention)
    torch.testing.assert_close(cross.hidden(twice, u), self_attention.hidden(TOKENS, u), rtol=1e-13, atol=1e-13)
    assert torch.equal(cross.values(twice), self_attention.values(TOKENS))


def test_a_convolution_as_wide_as_the_tokens_is_a_two_layer_network():
    mixer = build(cvxlib.Convolution, kernel=SIZES["tokens"])
    u = normal(3, *mixer.shape, seed=1)
    flat = cvxlib.MLP(features=mixer.p, outputs=2)
    expected = flat.hidden(TOKENS.flatten(1).unsqueeze(1), u.flatten(1))
    torch.testing.assert_close(mixer.hidden(TOKENS, u), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("s, d", [(1, 1), (2, 3), (7, 2), (8, 1), (15, 4)])
@pytest.mark.parametrize("dtype, tol", [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
def test_the_fft_is_the_circulant_product(s, d, dtype, tol):
    tokens, u = normal(5, s, d, seed=s).to(dtype), normal(3, s, d, seed=d).to(dtype)
    fast, slow = cvxlib.FNO(s, d, 2).hidden(tokens, u), cvxlib.circulant_hidden(tokens, u)
    assert fast.shape == slow.shape == (5, 3, s, 1)
    torch.testing.assert_close(fast, slow, rtol=tol, atol=tol)


def test_the_circulant_product_is_its_definition():
    x, u = TOKENS[0], normal(4, 2, seed=1)
    expected = [sum(float(x[(a - k) % 4] @ u[k]) for k in range(4)) for a in range(4)]
    torch.testing.assert_close(
        cvxlib.circulant_hidden(x[None], u[None]).flatten(), torch.tensor(expected, dtype=torch.float64)
    )


# the dual bound, at any iterate


@st.composite
def instances(draw):
    """A random program of the family, and how to draw an iterate for it."""
    mixer = build(
        type(draw(st.sampled_from(MIXERS))),
        tokens=draw(st.integers(3, 5)),
        features=2 * draw(st.integers(1, 2)),
        outputs=2 * draw(st.integers(1, 2)),
        kernel=draw(st.integers(1, 3)),
        queries=draw(st.integers(1, 2)),
    )
    loss, pool = draw(st.sampled_from(LOSSES)), draw(st.sampled_from(POOLS))
    activation = draw(st.sampled_from(["linear", "gated"]))
    features = mixer.shape[-1] * mixer.blocks if not isinstance(mixer, cvxlib.MLPMixer) else mixer.features
    tokens_count = getattr(mixer, "tokens", 4)
    seed = draw(st.integers(0, 10_000))
    spread = 10 ** draw(st.floats(-1, 1))
    tokens = spread * normal(draw(st.integers(1, 6)), tokens_count, features, seed=seed)
    case = program(mixer, activation, loss, pool, tokens=tokens, seed=seed, fraction=10 ** draw(st.floats(-1.5, 0.5)))
    return case, 10 ** draw(st.floats(-4, 4)), seed


def _iterates(case, scale, seed):
    """Certificates at badly converged points: random blocks, blocks of rank one, a random head, a solver stopped at once."""
    z = normal(*case.operator.shape, seed=seed)
    yield case.certificate(scale * z)
    yield case.certificate(scale * z[..., :1] * z[..., :1, :])
    yield certify(case, cvxlib.Head.random(case.mixer, case.activation, 1, pool=case.pool, scale=scale, seed=seed))
    for solver in ("proximal", "splitting"):
        yield cvxlib.solve(case, max_iterations=2, solver=solver, tol=1e-12).certificate


@settings(max_examples=200)
@given(instances())
def test_the_dual_bound_never_exceeds_the_optimum(instance):
    case, scale, seed = instance
    best = cvxlib.solve(case, tol=1e-6, max_iterations=2_000).certificate
    # the optimum lies in [best.dual, best.primal]; the bounds must not be above it, the values not below
    assert best.dual <= best.primal * (1 + 1e-12)
    for certificate in _iterates(case, scale, seed):
        assert certificate.dual <= best.primal * (1 + 1e-12)
        assert certificate.primal >= best.dual * (1 - 1e-12)


@settings(max_examples=40)
@given(instances())
def test_the_dual_bound_never_exceeds_the_optimum_of_cvxpy(instance):
    pytest.importorskip("cvxpy")
    from cvxlib.audit import reference

    case, scale, seed = instance
    optimum = reference.solve(case)
    for certificate in _iterates(case, scale, seed):
        assert certificate.dual <= optimum * (1 + 1e-6)
        assert certificate.primal >= optimum * (1 - 1e-6)


# other arithmetic, other devices


@pytest.mark.parametrize("activation", ["linear", "gated"])
@pytest.mark.parametrize("mixer", MIXERS, ids=name)
def test_float32_is_certified_in_float64(mixer, activation):
    double = program(mixer, activation, LOSSES[1])
    single = cvxlib.ConvexProgram(
        mixer, double.activation, double.loss, double.tokens.float(), double.targets, double.beta
    )
    solution, exact = cvxlib.solve(single, tol=1e-4), cvxlib.solve(double, tol=1e-6)
    assert solution.status is cvxlib.Status.CERTIFIED
    assert solution.head()(single.tokens).dtype == torch.float32
    assert solution.certificate.dtype == torch.float64
    # the tokens themselves were rounded to float32, which moves the optimum by about 1e-7
    assert solution.certificate.dual <= exact.objective * (1 + 1e-5)
    assert relative(solution.objective, exact.objective) < 2e-4


@CUDA
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("activation", ["linear", "gated"])
@pytest.mark.parametrize("mixer", MIXERS, ids=name)
def test_cuda_agrees_with_the_cpu(mixer, activation, dtype):
    cpu = program(mixer, activation, LOSSES[1])
    gpu = cvxlib.ConvexProgram(
        mixer, cpu.activation, cpu.loss, cpu.tokens.to("cuda", dtype), cpu.targets.cuda(), cpu.beta
    )
    solution = cvxlib.solve(gpu, tol=1e-4)
    assert solution.status is cvxlib.Status.CERTIFIED
    assert solution.head()(gpu.tokens).device.type == "cuda"
    assert relative(solution.objective, cvxlib.solve(cpu, tol=1e-6).objective) < 2e-4


@CUDA
@pytest.mark.parametrize("mixer", MIXERS, ids=name)
def test_the_battery_on_cuda(mixer):
    check_mixer(mixer, TOKENS.cuda())


# the door


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: cvxlib.SelfAttention(features=0, outputs=1),
            "features: expected a whole number, 1 or more; got int 0",
        ),
        (
            lambda: cvxlib.SelfAttention(features=2.0, outputs=1),
            "features: expected a whole number, 1 or more; got float",
        ),
        (lambda: cvxlib.BlockFNO(4, 3, 2, blocks=2), "blocks: expected a divisor of features = 3; got 2"),
        (lambda: cvxlib.BlockFNO(4, 2, 3, blocks=2), "blocks: expected a divisor of outputs = 3; got 2"),
        (lambda: cvxlib.Convolution(2, 2, 2, kernel=3), "kernel: expected at most tokens = 2; got 3"),
        (lambda: cvxlib.FNO(5, 2, 2).check(TOKENS), r"tokens: expected shape \(n, s, d\) with s = 5"),
        (lambda: cvxlib.MLP(3, 2).check(TOKENS), r"tokens: expected shape \(n, s, d\) with d = 3"),
        (
            lambda: cvxlib.MLP(2, 2).check(TOKENS[0]),
            r"tokens: expected a float32 or float64 array of shape \(n, s, d\)",
        ),
        (lambda: cvxlib.CrossAttention(2, 2, queries=4).check(TOKENS), "tokens: expected more than queries = 4 tokens"),
    ],
)
def test_the_door_says_what_does_not_fit(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()
