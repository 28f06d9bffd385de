"""Small instances of every public mixer, enrolled by name so that a new one cannot be forgotten, and programs for them."""

import dataclasses
import inspect
import itertools

import torch

import cvxlib

#: sizes by field name; a mixer with a field of another name must be given a size here
SIZES = {"tokens": 4, "features": 2, "outputs": 2, "blocks": 2, "kernel": 2, "queries": 2}

CLASSES = [
    kind
    for name in cvxlib.__all__
    if inspect.isclass(kind := getattr(cvxlib, name)) and issubclass(kind, cvxlib.Mixer) and kind is not cvxlib.Mixer
]
LOSSES = (cvxlib.SquaredLoss(), cvxlib.CrossEntropy())
POOLS = ("mean", None)


def build(kind, **sizes):
    """A mixer of a class, with the sizes above unless others are given."""
    sizes = SIZES | sizes
    return kind(**{field.name: sizes[field.name] for field in dataclasses.fields(kind)})


MIXERS = [build(kind) for kind in CLASSES]


def name(value):
    """A short test id."""
    if isinstance(value, cvxlib.Mixer):
        return type(value).__name__
    if isinstance(value, cvxlib.Loss):
        return type(value).__name__
    return {"mean": "pooled", None: "per-token"}.get(value, str(value))


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def activation_of(kind, mixer, gates=2, seed=0):
    return cvxlib.Linear() if kind == "linear" else cvxlib.GatedReLU.sample(mixer, count=gates, seed=seed)


def program(mixer, activation="linear", loss=LOSSES[0], pool="mean", *, fraction=0.2, samples=6, seed=0, tokens=None):
    """A program with random data, at a fraction of its beta_max."""
    if tokens is None:
        tokens = normal(samples, SIZES["tokens"], SIZES["features"], seed=seed)
    samples = len(tokens)
    if isinstance(activation, str):
        activation = activation_of(activation, mixer, seed=seed)
    positions = mixer.hidden(mixer.split(tokens[:1])[0], tokens.new_zeros(1, *mixer.shape)).shape[2]
    rows = (samples,) if pool else (samples, positions)
    if isinstance(loss, cvxlib.CrossEntropy):
        targets = torch.randint(mixer.outputs, rows, generator=torch.Generator().manual_seed(seed + 1))
    else:
        targets = normal(*rows, mixer.outputs, seed=seed + 1).to(tokens)
    result = cvxlib.ConvexProgram(mixer, activation, loss, tokens, targets, 1.0, pool)
    return result.with_beta(fraction * (result.beta_max() or 1.0))  # 0 where no gate opens


def objective(program, head):
    """The regularised objective of a network, from its own forward pass; differentiable."""
    predictions = head(program.tokens).reshape(-1, program.mixer.outputs)
    data = program.loss.value(predictions, program.rows).sum() / program.samples
    return data + program.beta * head.weight_decay()


def full_width(program):
    """Heads per gate and block that suffice for the optimum: m* = min(p, q)."""
    return min(program.mixer.p, program.mixer.q)


def train(program, seed, steps=400):
    """A head of full width trained by L-BFGS from a random start."""
    head = cvxlib.Head.random(
        program.mixer,
        program.activation,
        full_width(program),
        pool=program.pool,
        scale=1.0,
        seed=seed,
        dtype=program.tokens.dtype,
    )
    optimizer = torch.optim.LBFGS(
        head.parameters(), max_iter=steps, tolerance_grad=1e-9, tolerance_change=1e-13, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        value = objective(program, head)
        value.backward()
        return value

    optimizer.step(closure)
    return head


EVERY_CASE = list(itertools.product(MIXERS, ("linear", "gated"), LOSSES, POOLS))
