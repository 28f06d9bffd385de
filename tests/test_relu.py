"""ReLU programs: exact where they can be, a true interval everywhere else."""

import itertools

import numpy as np
import pytest
import torch
from scipy.optimize import linprog

import cvxlib
from cvxlib.program.certificate import Status

SQUARED, ENTROPY = cvxlib.SquaredLoss(), cvxlib.CrossEntropy()


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def relu_program(mixer, tokens, targets, fraction, loss=SQUARED, pool="mean", limit=10_000):
    program = cvxlib.ConvexProgram(mixer, cvxlib.ReLU(limit), loss, tokens, targets, beta=1.0, pool=pool)
    return program.with_beta(fraction * program.beta_max())


# one output: the second-order cone program, written from scratch


def inner_point(cone):
    """A point strictly inside a cone of unit rows, or ``None``, by linear programming."""
    constraints = np.hstack([-cone, np.ones((len(cone), 1))])
    box = [(-1, 1)] * cone.shape[1] + [(None, 1)]
    best = linprog(np.append(np.zeros(cone.shape[1]), -1.0), constraints, np.zeros(len(cone)), bounds=box)
    return best.x[:-1] if -best.fun > 1e-7 else None


def cone_program(samples, targets, beta, vectors):
    """The value of a pooled ReLU head with one output, vec V restricted to multiples of unit vectors, by CVXPY.

    ``samples`` holds for each sample its output positions, each a pair of hidden matrix (k, p) and values (k, w).
    """
    cp = pytest.importorskip("cvxpy")
    rows = np.concatenate([hidden for sample in samples for hidden, _ in sample])
    rows = rows[np.linalg.norm(rows, axis=1) > 0]
    distinct = []
    for row in rows / np.linalg.norm(rows, axis=1, keepdims=True):
        if all(abs(row @ other) < 1 - 1e-12 for other in distinct):
            distinct.append(row)
    penalty, predictions, members = 0, [0] * len(samples), []
    for signs in itertools.product((1.0, -1.0), repeat=len(distinct)):
        cone = np.array(signs)[:, None] * np.array(distinct)
        inside = inner_point(cone)
        if inside is None:
            continue
        for vector in vectors:
            u = cp.Variable(cone.shape[1])
            members.append(cone @ u >= 0)
            penalty = penalty + cp.norm(u)
            for i, sample in enumerate(samples):
                design = sum(
                    (hidden * (hidden @ inside > 0)[:, None]).T @ (values @ vector) for hidden, values in sample
                )
                predictions[i] = predictions[i] + (design / len(sample)) @ u
    loss = cp.sum_squares(cp.hstack(predictions) - targets) / (2 * len(samples))
    return cp.Problem(cp.Minimize(loss + beta * penalty), members).solve(solver="CLARABEL")


SIGNS = [np.array([1.0]), np.array([-1.0])]


@pytest.mark.parametrize("n, d, fraction", [(6, 2, 0.5), (6, 2, 0.1), (6, 2, 0.01), (5, 3, 0.1)])
def test_one_output_mlp_equals_the_cone_program(n, d, fraction):
    tokens, targets = normal(n, n, 1, d), normal(n + 1, n, 1)
    program = relu_program(cvxlib.MLP(d, 1), tokens, targets, fraction)
    solution = cvxlib.solve(program, tol=1e-7)
    samples = [[(x.numpy(), np.ones((1, 1)))] for x in tokens]
    reference = cone_program(samples, targets[:, 0].numpy(), program.beta, SIGNS)
    assert solution.status is Status.EXACT
    assert solution.objective == pytest.approx(reference, rel=1e-6)


def test_one_output_mlp_with_degenerate_tokens_equals_the_cone_program():
    tokens = normal(1, 5, 2, 2)
    tokens[0, 1], tokens[1, 0], tokens[2] = 0, tokens[0, 0], -2 * tokens[3]
    targets = normal(2, 5, 1)
    program = relu_program(cvxlib.MLP(2, 1), tokens, targets, 0.05)
    samples = [[(row.numpy()[None], np.ones((1, 1))) for row in x] for x in tokens]
    reference = cone_program(samples, targets[:, 0].numpy(), program.beta, SIGNS)
    assert cvxlib.solve(program, tol=1e-7).objective == pytest.approx(reference, rel=1e-6)


@pytest.mark.parametrize("fraction", [0.5, 0.1, 0.01])
def test_one_output_attention_equals_the_cone_program(fraction):
    tokens, targets = normal(3, 5, 3, 1), normal(4, 5, 1)
    program = relu_program(cvxlib.SelfAttention(1, 1), tokens, targets, fraction)
    samples = [[(x[a].numpy() * x.numpy(), x.numpy()) for a in range(3)] for x in tokens]
    reference = cone_program(samples, targets[:, 0].numpy(), program.beta, SIGNS)
    assert cvxlib.solve(program, tol=1e-7).objective == pytest.approx(reference, rel=1e-6)


def test_attention_with_two_features_is_bracketed_by_cone_programs():
    # vec V lies in the plane: N directions cost at most a factor 1 / cos(pi / N), and those of the solution itself cost nothing
    tokens, targets, count = normal(5, 3, 1, 2), normal(6, 3, 1), 12
    program = relu_program(cvxlib.SelfAttention(2, 1), tokens, targets, 0.1)
    solution = cvxlib.solve(program, tol=1e-7)
    samples = [[(np.kron(x[a].numpy(), x.numpy()), x.numpy()) for a in range(1)] for x in tokens]
    angles = 2 * np.pi * np.arange(count) / count
    grid = list(np.stack([np.cos(angles), np.sin(angles)], 1))
    own = solution.factors.v.flatten(1).numpy()
    own = list(own / np.linalg.norm(own, axis=1, keepdims=True))
    y, beta = targets[:, 0].numpy(), program.beta
    assert cone_program(samples, y, beta, grid) >= solution.certificate.dual
    assert cone_program(samples, y, beta * np.cos(np.pi / count), grid) <= solution.objective * (1 + 1e-7)
    assert cone_program(samples, y, beta, grid + own) == pytest.approx(solution.objective, rel=1e-6)


# vector outputs: a thousand trainings


def train_many(program, starts=1000, width=5, steps=400, seed=0):
    """The objectives of many random-start trainings side by side, by Adam with a falling step size."""
    from cvxlib.model.stacked import lifted_rows, lifted_weights

    mixer, n = program.mixer, program.samples
    rows = lifted_rows(mixer, program.tokens)
    # the linear map from hidden entries to predictions, one output entry at a time
    units = torch.eye(n * mixer.outputs, dtype=torch.float64).reshape(-1, n, 1, mixer.outputs)
    maps = torch.stack([lifted_weights(mixer, program.tokens, unit) for unit in units])  # (n c, R, q)
    generator = torch.Generator().manual_seed(seed)
    scale = 10 ** (torch.rand(starts, 1, 1, generator=generator, dtype=torch.float64) * 1.5 - 1)
    u = (torch.randn(starts, width, mixer.p, generator=generator, dtype=torch.float64) * scale).requires_grad_()
    v = (torch.randn(starts, width, mixer.q, generator=generator, dtype=torch.float64) * scale).requires_grad_()
    optimiser = torch.optim.Adam([u, v], lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps, eta_min=1e-4)
    targets = program.rows
    for _ in range(steps):
        optimiser.zero_grad()
        predictions = torch.einsum("krq,bmr,bmq->bk", maps, (u @ rows.mT).relu(), v).unflatten(1, (n, mixer.outputs))
        loss = program.loss.value(predictions.flatten(0, 1), targets.repeat(starts, *[1] * (targets.ndim - 1)))
        objective = loss.unflatten(0, (starts, n)).mean(1)
        objective = objective + program.beta / 2 * (u.square().sum((1, 2)) + v.square().sum((1, 2)))
        objective.sum().backward()
        optimiser.step()
        schedule.step()
    return objective.detach()


CASES = {
    "MLP": (cvxlib.MLP(2, 2), normal(1, 5, 1, 2), normal(2, 5, 2), SQUARED),
    "MLP, classes": (cvxlib.MLP(2, 3), normal(3, 6, 1, 2), torch.tensor([0, 1, 2, 0, 1, 2]), ENTROPY),
    "attention": (cvxlib.SelfAttention(2, 1), normal(5, 3, 2, 2), normal(6, 3, 1), SQUARED),
    "FNO": (cvxlib.FNO(2, 1, 2), normal(7, 5, 2, 1), normal(8, 5, 2), SQUARED),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("fraction", [0.3, 0.03])
def test_the_interval_contains_the_best_of_a_thousand_trainings(name, fraction):
    mixer, tokens, targets, loss = CASES[name]
    program = relu_program(mixer, tokens, targets, fraction, loss)
    solution = cvxlib.solve(program, tol=1e-6)
    found = train_many(program)
    assert solution.status is Status.EXACT and solution.certificate.relative_gap <= 1e-6
    assert float(found.min()) >= solution.certificate.dual
    # where the interval is a point the trainings come close to it, from above
    assert solution.objective * (1 - 1e-9) <= float(found.min()) <= 1.01 * solution.objective
    # an interval that forgets the cones of a few patterns would be noticed: the gated relaxation lies below
    relaxed = cvxlib.solve(program.relaxation(), tol=1e-6)
    assert relaxed.certificate.dual <= solution.objective


def test_without_enumeration_the_interval_is_wider_and_still_true():
    mixer, tokens, targets, loss = CASES["MLP"]
    exact = relu_program(mixer, tokens, targets, 0.1, loss)
    solution = cvxlib.solve(exact, tol=1e-6)
    blind = cvxlib.ConvexProgram(mixer, cvxlib.ReLU(limit=2), loss, tokens, targets, exact.beta)
    assert not blind.enumerated and blind.beta_max() >= exact.beta_max()
    interval = cvxlib.solve(blind, tol=1e-6)
    assert interval.status is Status.INTERVAL_PATTERNS
    # two intervals around one value overlap
    assert 0 < interval.certificate.dual <= solution.objective
    assert solution.certificate.dual <= interval.objective
    assert interval.objective <= 1.01 * solution.objective
    audit = cvxlib.certify(blind, interval.head(), interval.certificate.dual_point)
    assert audit.dual <= solution.objective and solution.certificate.dual <= audit.primal
    with pytest.raises(ValueError, match="few enough sign patterns"):
        blind.relaxation()


# the machinery of every mixer

MIXERS = {
    "attention": (cvxlib.SelfAttention(2, 1), normal(1, 3, 2, 2)),
    "causal": (cvxlib.CausalSelfAttention(2, 1), normal(1, 2, 2, 2)),
    "mixer": (cvxlib.MLPMixer(2, 2, 1), normal(2, 3, 2, 2)),
    "FNO": (cvxlib.FNO(2, 2, 2), normal(3, 3, 2, 2)),
    "block FNO": (cvxlib.BlockFNO(2, 4, 2, 2), torch.cat([normal(4, 4, 2, 3), torch.zeros(4, 2, 1).double()], 2)),
    "MLP": (cvxlib.MLP(3, 2), normal(5, 5, 2, 3)),
    "convolution": (cvxlib.Convolution(3, 1, 1, 2), normal(6, 4, 3, 1)),
}


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("pool", ["mean", None])
def test_every_mixer_closes_its_gap_and_the_audit_agrees(name, pool):
    mixer, tokens = MIXERS[name]
    outputs = mixer.hidden(mixer.split(tokens)[0], tokens.new_zeros(1, *mixer.shape)).shape[2]
    targets = normal(9, len(tokens), mixer.outputs) if pool else normal(9, len(tokens), outputs, mixer.outputs)
    program = relu_program(mixer, tokens, targets, 0.2, pool=pool)
    solution = cvxlib.solve(program, tol=1e-5)
    head = solution.head()
    audit = cvxlib.certify(program, head)
    assert solution.status is Status.EXACT
    assert audit.primal == pytest.approx(solution.objective, rel=1e-9)
    assert audit.dual <= solution.objective and audit.relative_gap <= 2e-5
    # the lifted blocks predict what the network predicts
    lifted = program.operator.forward(solution.lifted)
    assert torch.allclose(lifted, head(tokens).detach().reshape(lifted.shape), atol=1e-6)


def test_above_beta_max_the_zero_network_is_optimal():
    mixer, tokens, targets, _loss = CASES["MLP"]
    above = cvxlib.solve(relu_program(mixer, tokens, targets, 1.001), tol=1e-7)
    below = cvxlib.solve(relu_program(mixer, tokens, targets, 0.99), tol=1e-7)
    assert above.rank == 0 and above.status is Status.EXACT
    assert below.rank > 0 and below.objective < above.objective


def test_trained_heads_are_certified():
    mixer, tokens, targets, _loss = CASES["MLP"]
    program = relu_program(mixer, tokens, targets, 0.1)
    best = cvxlib.solve(program, tol=1e-6)
    head = cvxlib.Head.random(mixer, cvxlib.ReLU(), 8, dtype=torch.float64)
    alone = cvxlib.certify(program, head)
    helped = cvxlib.certify(program, head, best.certificate.dual_point)
    assert alone.dual <= best.objective <= alone.primal == pytest.approx(helped.primal)
    assert helped.dual == pytest.approx(best.certificate.dual, rel=1e-6)
    with pytest.raises(ValueError, match="head: expected the program's activation"):
        cvxlib.certify(program, cvxlib.Head.random(mixer, cvxlib.Linear(), 2))


def test_a_path_of_beta_from_a_start_and_single_precision():
    mixer, tokens, targets, loss = CASES["MLP, classes"]
    program = relu_program(mixer, tokens, targets, 0.3, ENTROPY)
    first = cvxlib.solve(program, tol=1e-6)
    second = cvxlib.solve(program.with_beta(program.beta / 2), tol=1e-6, start=first)
    assert second.status is Status.EXACT and second.objective < first.objective
    single = cvxlib.ConvexProgram(mixer, cvxlib.ReLU(), loss, tokens.float(), targets, program.beta)
    assert cvxlib.solve(single, tol=1e-5).objective == pytest.approx(first.objective, rel=1e-5)


def test_solver_and_activation_must_fit():
    mixer, tokens, targets, _loss = CASES["MLP"]
    program = relu_program(mixer, tokens, targets, 0.3)
    with pytest.raises(ValueError, match="solver: expected 'relu' for ReLU"):
        cvxlib.solve(program, solver="proximal")
    with pytest.raises(ValueError, match="solver: expected 'relu' for ReLU"):
        cvxlib.solve(program.relaxation(), solver="relu")
    with pytest.raises(ValueError, match="start: expected one with ReLU"):
        cvxlib.solve(program, start=cvxlib.solve(program.relaxation(), tol=1e-2))


# gated to ReLU


@pytest.mark.parametrize("name", ["attention", "mixer", "FNO", "block FNO", "MLP", "convolution"])
def test_gated_networks_become_relu_networks(name):
    mixer, tokens = MIXERS[name]
    gated = cvxlib.GatedReLU.sample(mixer, 4, seed=1)
    head = cvxlib.Head.random(mixer, gated, 2, dtype=torch.float64)
    relu = cvxlib.gated_to_relu(head, tokens)
    assert torch.allclose(relu(tokens), head(tokens), atol=1e-9)
    assert len(relu) <= 2 * len(head)
    # each neuron costs |u+| + |u-| times |v|, which is at least what it cost before where no row is blind to u
    balanced = float((head.u.detach().flatten(1).norm(dim=1) * head.v.detach().flatten(1).norm(dim=1)).sum())
    if mixer.p <= len(cvxlib.model.stacked.lifted_rows(mixer, mixer.split(tokens)[0])) and name != "block FNO":
        assert float(relu.weight_decay().detach()) >= balanced * (1 - 1e-9)


def test_the_gated_optimum_over_all_patterns_bounds_relu_from_both_sides():
    mixer, tokens, targets, _loss = CASES["MLP"]
    program = relu_program(mixer, tokens, targets, 0.1)
    relaxed = cvxlib.solve(program.relaxation(), tol=1e-6)
    converted = cvxlib.certify(program, cvxlib.gated_to_relu(relaxed.head(), tokens))
    exact = cvxlib.solve(program, tol=1e-6).objective
    assert relaxed.certificate.dual <= exact <= converted.primal * (1 + 1e-6)


def test_a_cone_without_an_inside_is_a_clear_error():
    mixer = cvxlib.MLP(2, 1)
    tokens = torch.tensor([[[1.0, 0.0]], [[-1.0, 0.0]]], dtype=torch.float64)
    gates = cvxlib.GatedReLU(torch.tensor([[0.0, 1.0]], dtype=torch.float64))  # on the hyperplane: both tokens pass
    head = cvxlib.Head.random(mixer, gates, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match="gate 0, whose cone has none"):
        cvxlib.gated_to_relu(head, tokens)
    with pytest.raises(TypeError, match=r"head: expected a cvxlib\.Head with GatedReLU"):
        cvxlib.gated_to_relu(cvxlib.Head.random(mixer, cvxlib.ReLU(), 1), tokens)


def test_without_stacked_data_there_is_an_upper_bound_only(monkeypatch):
    mixer, tokens, targets, loss = CASES["MLP"]
    monkeypatch.setattr(cvxlib.program.program, "LARGEST_STACK", 5)
    program = cvxlib.ConvexProgram(mixer, cvxlib.ReLU(), loss, tokens, targets, 0.01)
    solution = cvxlib.solve(program)
    assert solution.status is Status.UPPER_BOUND and solution.certificate.dual == 0 < solution.objective
    assert solution.objective < program.data_loss(torch.zeros_like(targets))  # the training itself still works


def one_neuron(program, u, v):
    zero = torch.zeros(1, dtype=torch.long)
    u, v = torch.tensor([u], dtype=torch.float64), torch.tensor([[[v]]], dtype=torch.float64)
    return cvxlib.Head(program.mixer, program.activation, u, v, zero, zero)


def test_no_bound_lies_above_a_head_where_one_feature_is_a_billion_times_the_other():
    """Unix seconds beside a standard normal: what looks like rank one is not."""
    rng = np.random.default_rng(0)
    x = np.stack([1.7e9 + rng.uniform(0, 3e7, 50), rng.standard_normal(50)], 1)
    targets = torch.tensor(np.maximum(x[:, 1:], 0))
    program = cvxlib.ConvexProgram(
        cvxlib.MLP(2, 1), cvxlib.ReLU(), cvxlib.SquaredLoss(), torch.tensor(x)[:, None], targets, beta=1e-3
    )
    solution = cvxlib.solve(program)
    audit = cvxlib.certify(program, one_neuron(program, [0.0, 1.0], 1.0), solution.certificate.dual_point)
    assert audit.primal == pytest.approx(0.001, rel=1e-9)
    assert solution.certificate.dual <= audit.primal and audit.dual <= audit.primal


def test_rows_that_are_parallel_but_for_rounding_are_one_hyperplane_and_the_bound_pays():
    angle = torch.linspace(0, 3, 6, dtype=torch.float64)
    arm = torch.stack([angle.sin(), angle.cos()], 1)
    tokens = torch.cat([arm, 0.1 * (arm * 10) / 3, arm * (1 + 2**-50)]).unsqueeze(1)
    program = cvxlib.ConvexProgram(
        cvxlib.MLP(2, 1), cvxlib.ReLU(), cvxlib.SquaredLoss(), tokens, tokens[:, 0, :1].abs(), beta=0.01
    )
    solution = cvxlib.solve(program, tol=1e-5)
    assert program.gates.count == 12 and solution.status is cvxlib.Status.EXACT
    assert program._moved(solution.certificate.dual_point) > 0
