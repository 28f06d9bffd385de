"""The kinds of cases: a program, a value that no bound may exceed, and the bounds that the package gives for it.

A kind is two functions: one draws the program, the other yields what is known of its optimum and every bound.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import mpmath
import numpy as np
import torch

import cvxlib
from benchmarks.campaign import adversary, data
from benchmarks.campaign.exact import ExactProgram, Undecided, mp, spectral_norm
from benchmarks.campaign.optima import optimum

#: draws before a case is given up as undecided
DRAWS = 30
SQUARED, ENTROPY = cvxlib.SquaredLoss(), cvxlib.CrossEntropy()


@dataclass(frozen=True)
class Bound:
    """A way to ask the package for a bound; ``ask`` returns a certificate, or a bare number where there is only that."""

    source: str
    ask: Callable[[], cvxlib.Certificate | float]


@dataclass(frozen=True)
class Case:
    """Args:
    exact: the program without rounding.
    value: an upper bound on the optimum, in many bits.
    gap: how far above the optimum it can be, relatively; None where that is not known.
    bounds: what must not exceed ``value``.
    """

    exact: ExactProgram
    value: mpmath.mpf
    gap: float | None
    bounds: list[Bound]


def drawn(rng: np.random.Generator, parts: Callable) -> ExactProgram:
    """The first program drawn whose gates rounding does not decide and whose weight decay a float holds.

    Raises:
        Undecided: there was none.
    """
    for _ in range(DRAWS):
        program = parts(rng)
        try:
            exact = ExactProgram(program)
        except Undecided:
            continue
        with np.errstate(all="ignore"):
            gradients = exact.float_adjoint(_at_zero(exact))
            if exact.relu:  # what one coordinate of u sees of the targets may be far below what another sees
                rows = [row for gradient in gradients for row in gradient if row.any()]
                beta = 10.0 ** rng.uniform(-6, 0) * (np.linalg.norm(rows[rng.integers(len(rows))]) if rows else 0)
            else:
                beta = data.fraction(rng) * max(map(spectral_norm, gradients))
        if 1e-250 < beta < 1e250:
            exact.program, exact.beta = program.with_beta(beta), mp.mpf(beta)
            return exact
    raise Undecided


def _at_zero(exact: ExactProgram) -> np.ndarray:
    if exact.squared:
        return -exact.targets
    return 1 / exact.mixer.outputs - np.eye(exact.mixer.outputs)[exact.targets]


def _program(
    rng, mixer, loss, n: int, s: int, *, features: int = 1, gated: bool | None = None, pool="draw", reach=None
):
    """A program of a mixer with drawn data; ``gated`` None is ReLU."""
    kind = data.dtype(rng) if gated is not None else torch.float64
    x = data.tokens(rng, n, s, features, kind, reach)
    if gated is None:
        activation = cvxlib.ReLU(limit=300)
    else:
        activation = data.gates(rng, mixer, int(gated)) if gated else cvxlib.Linear()
    pool = ("mean", None)[rng.integers(2)]
    hidden = mixer.hidden(mixer.split(x[:1].double())[0], torch.zeros(1, *mixer.shape, dtype=torch.float64))
    shape = (n,) if pool else (n, hidden.shape[2])
    if loss is ENTROPY:
        targets = data.classes(rng, shape, mixer.outputs)
    else:
        like = activation if gated is None else cvxlib.Linear()
        planted = cvxlib.Head.random(mixer, like, 1, pool=pool, seed=int(rng.integers(2**31))).double()
        with torch.no_grad():
            if gated is None and rng.random() < 0.5:  # a neuron that sees one feature alone
                planted.u.copy_(torch.eye(mixer.p)[rng.integers(mixer.p)].reshape(planted.u.shape))
            targets = data.values(rng, (*shape, mixer.outputs), kind, planted(x.double()).numpy())
    return cvxlib.ConvexProgram(mixer, activation, loss, x, targets, 1.0, pool)


def _size(rng, high: int) -> int:
    return int(rng.integers(1, high + 1))


def one_output(rng: np.random.Generator) -> Case:
    """Squared loss and a Euclidean norm: lifted blocks of one column, or of one row from a single token."""

    def parts(rng):
        s, d, c = _size(rng, 3), _size(rng, 3), _size(rng, 2)
        mixer = [
            lambda: (cvxlib.MLP(d, 1), s, d),
            lambda: (cvxlib.MLP(1, c), s, 1),
            lambda: (cvxlib.FNO(s, min(d, 2), 1), s, min(d, 2)),
            lambda: (cvxlib.BlockFNO(s, d, 1, 1), s, d),
            lambda: (cvxlib.MLPMixer(1, d, c), 1, d),
            lambda: (cvxlib.Convolution(s, d, 1, s), s, d),
        ][rng.integers(6)]()
        gated = bool(rng.random() < 0.4)
        return _program(rng, mixer[0], SQUARED, _size(rng, 6), mixer[1], features=mixer[2], gated=gated)

    return _known(drawn(rng, parts), rng)


def attention(rng: np.random.Generator) -> Case:
    """Attention of one feature with several outputs, squared loss: a closed form."""

    def parts(rng):
        s, c = _size(rng, 4), _size(rng, 4)
        if rng.random() < 0.2:
            mixer, s = cvxlib.CrossAttention(1, c, 1), s + 1
        else:
            mixer = (cvxlib.SelfAttention, cvxlib.CausalSelfAttention)[rng.integers(2)](1, c)
        return _program(rng, mixer, SQUARED, _size(rng, 6), s, gated=bool(rng.random() < 0.4))

    return _known(drawn(rng, parts), rng)


def cross_entropy(rng: np.random.Generator) -> Case:
    """One number for each row, two or three classes: a convex problem on a line or in a plane."""

    def parts(rng):
        c, s = 2 + (rng.random() < 0.2), _size(rng, 2)
        mixer, s = [
            (cvxlib.MLP(1, c), s),
            (cvxlib.SelfAttention(1, c), s),
            (cvxlib.CausalSelfAttention(1, c), s),
            (cvxlib.FNO(1, 1, c), 1),
            (cvxlib.MLPMixer(1, 1, c), 1),
            (cvxlib.Convolution(1, 1, c, 1), 1),
        ][rng.integers(6)]
        return _program(rng, mixer, ENTROPY, _size(rng, 5), s, gated=bool(rng.random() < 0.4))

    return _known(drawn(rng, parts), rng)


def _known(exact: ExactProgram, rng: np.random.Generator) -> Case:
    """A case whose optimum is known, with bounds from its own point, from points beside it, and from a solver."""
    best = optimum(exact)
    program, mixer = exact.program, exact.mixer
    floats = np.array([float(x) for x in best.z.flat]).reshape(1, mixer.p, mixer.q)
    residual = torch.tensor(np.array([float(x) for x in best.residual.flat]).reshape(best.residual.shape))
    z = torch.tensor(floats).to(program.tokens.dtype)
    beside = z * (1 + 10.0 ** rng.uniform(-9, 0) * torch.tensor(rng.standard_normal(z.shape)).to(z))
    bounds = [Bound(f"solve, {name}", ask) for name, ask in _solves(program, rng)]
    if bool(torch.isfinite(beside).all()):
        bounds += [
            Bound("program.certificate at the optimum", lambda: program.certificate(z)),
            Bound("program.certificate beside it", lambda: program.certificate(beside)),
            Bound(
                "certify, optimal residual offered",
                lambda: cvxlib.certify(program, program.head(cvxlib.factor(mixer, beside)), residual),
            ),
        ]
    return Case(exact, best.value, best.gap, bounds)


def _solves(program: cvxlib.ConvexProgram, rng: np.random.Generator) -> Iterator[tuple[str, Callable]]:
    """One solver's certificate, and the best bound of its history."""
    solver = str(rng.choice(["splitting", "staircase", "proximal"], p=[0.6, 0.2, 0.2]))
    kept = []

    def ask():
        kept.append(cvxlib.solve(program, solver=solver, tol=1e-9, max_iterations=50, progress=False))
        return kept[0].certificate

    yield solver, ask
    yield f"{solver}, history", lambda: float(kept[0].history[:, 2].max()) if kept and len(kept[0].history) else -np.inf


def mixers(rng: np.random.Generator) -> Case:
    """Every built-in mixer, linear and gated, both losses, pooled and not: no bound may exceed the best head found."""

    def parts(rng):
        s, d, c = 2 + (rng.random() < 0.3), 2, 2
        mixer = [
            lambda: cvxlib.SelfAttention(d, c),
            lambda: cvxlib.CausalSelfAttention(d, c),
            lambda: cvxlib.CrossAttention(d, c, 1),
            lambda: cvxlib.MLPMixer(s, d, c),
            lambda: cvxlib.FNO(s, d, c),
            lambda: cvxlib.BlockFNO(s, d, c, 2),
            lambda: cvxlib.MLP(d, c),
            lambda: cvxlib.Convolution(s, d, c, 2),
        ][rng.integers(8)]()
        gated = int(rng.integers(0, 4))
        loss = SQUARED if rng.random() < 0.6 else ENTROPY
        return _program(rng, mixer, loss, _size(rng, 4), s, features=d, gated=gated)

    exact = drawn(rng, parts)
    program, mixer = exact.program, exact.mixer
    asked = list(_solves(program, rng))
    heads, bounds, made = [], [], []
    random = cvxlib.Head.random(mixer, program.activation, 1, pool=program.pool, seed=int(rng.integers(2**31))).double()
    heads.append(random)

    def solution():
        made.append(cvxlib.solve(program, solver="splitting", tol=1e-9, max_iterations=150, progress=False))
        return made[0].certificate

    bounds.append(Bound("solve, to the end", solution))
    bounds += [Bound(f"solve, {name}", ask) for name, ask in asked]
    z = torch.tensor(rng.standard_normal(tuple(program.operator.shape))).to(program.tokens.dtype)
    bounds.append(Bound("program.certificate, random", lambda: program.certificate(z)))
    independent = bool(rng.random() < 0.2)
    bounds.append(Bound("certify, random head", lambda: cvxlib.certify(program, random, independent=independent)))
    answers = {bound.source: _answer(bound) for bound in bounds}
    if made:
        best = made[0].head()
        heads.append(best)
        if exact.squared and mixer.blocks == 1 and len(best):
            try:
                heads.append(adversary.polished(exact, best))
            except np.linalg.LinAlgError:
                heads.append(random)
        last = heads[-1]
        again = Bound("certify, best head", lambda: cvxlib.certify(program, last, made[0].certificate.dual_point))
        answers[again.source] = _answer(again)
    values = [exact.objective(head) for head in heads if _finite(head)] + [_nothing(exact)]
    return Case(exact, min(values), None, [Bound(source, answer) for source, answer in answers.items()])


def relu(rng: np.random.Generator) -> Case:
    """ReLU over data of dynamic ranges to 1e16: a status says EXACT or a bound, and no head of the adversary may lie below it."""

    def parts(rng):
        draw = rng.random()
        n, reach, d, s = int(rng.integers(2, 7)), 8.0 * rng.random(), 2 + (rng.random() < 0.2), 1
        if draw < 0.75:
            mixer = cvxlib.MLP(d, 1 + (rng.random() < 0.3))
        elif draw < 0.85:
            d, s, mixer = 1, _size(rng, 3), cvxlib.SelfAttention(1, _size(rng, 2))
        elif draw < 0.93:
            d, s, n, mixer = 2, 1 + (rng.random() < 0.4), min(n, 3), cvxlib.SelfAttention(2, 1)
        else:
            d, s, mixer = 1, 2, cvxlib.FNO(2, 1, 1)
        loss = SQUARED if mixer.outputs == 1 or rng.random() < 0.7 else ENTROPY
        return _program(rng, mixer, loss, n, s, features=d, gated=None, reach=reach)

    exact = drawn(rng, parts)
    program, made = exact.program, []

    def solution():
        made.append(cvxlib.solve(program, tol=1e-4, max_iterations=30, progress=False))
        return made[0].certificate

    bounds = [Bound("solve", solution)]
    with np.errstate(all="ignore"):
        heads = adversary.relu_heads(exact, rng)
    answers = {bound.source: _answer(bound) for bound in bounds}
    if made:
        answers[made[0].status.name] = answers.pop("solve")
        heads.append(made[0].head())
    values = [(exact.objective(head), i) for i, head in enumerate(heads) if _finite(head)]
    value, index = min([*values, (_nothing(exact), -1)])
    if made:
        best = heads[index] if index >= 0 else heads[-1]
        again = Bound("certify, best head", lambda: cvxlib.certify(program, best.double()))
        answers[again.source] = _answer(again)
    return Case(exact, value, None, [Bound(source, answer) for source, answer in answers.items()])


def _answer(bound: Bound) -> Callable:
    """What asking now gives, to be given (or raised) later: the reference value may need what a solver found."""
    try:
        given = bound.ask()
    except Exception as error:
        raised = error

        def again():
            raise raised

        return again
    return lambda: given


def _finite(head: cvxlib.Head) -> bool:
    return all(bool(torch.isfinite(weight).all()) for weight in head.parameters())


def _nothing(exact: ExactProgram) -> mpmath.mpf:
    """The objective of no neurons."""
    empty = np.full((len(exact.targets), exact.mixer.outputs), mp.zero, dtype=object)
    return exact.data_loss(empty)


#: every kind, with its share of the cases
KINDS: dict[str, tuple[Callable[[np.random.Generator], Case], float]] = {
    "one-output": (one_output, 0.4),
    "cross-entropy": (cross_entropy, 0.15),
    "attention": (attention, 0.15),
    "mixers": (mixers, 0.2),
    "relu": (relu, 0.1),
}
