"""The problems: how each program is built, who solves it, and what is required of the outcome."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

import cvxlib
from benchmarks import competitors
from benchmarks.bars import (
    Bar,
    certified_gap,
    evaluations,
    exponent,
    objective_ratio,
    peak_memory,
    same_value,
    solver_time_ratio,
    time_ratio,
    time_to_solve,
)
from benchmarks.data import labelled_tokens, relu_values, token_targets


@dataclass(frozen=True)
class Competitor:
    """One way to solve a problem.

    Args:
        name: as shown in the table; ``"ours"`` for cvxlib's own choice of solver.
        prepare: from :mod:`benchmarks.competitors`.
        options: for ``prepare``.
        size: sizes in which this run differs from the problem's, for problems that vary them.
    """

    name: str
    prepare: Callable
    options: Mapping = field(default_factory=dict)
    size: Mapping = field(default_factory=dict)


@dataclass(frozen=True)
class Problem:
    """A program at a given size, its competitors in the order in which they run, and the bars.

    Args:
        name: for the command line and the results file.
        title: one line for the table.
        build: from sizes to the arguments of :class:`cvxlib.ConvexProgram`, all but beta.
        size: arguments of ``build``.
        competitors: who runs, in this order.
        bars: what is required.
        beta: weight decay; or
        fraction: weight decay as a fraction of ``beta_max``.
        note: what a reader of the table has to know.
        cuda: whether it needs a CUDA device.
    """

    name: str
    title: str
    build: Callable[..., dict]
    size: Mapping
    competitors: tuple[Competitor, ...]
    bars: tuple[Bar, ...]
    beta: float | None = None
    fraction: float | None = None
    note: str = ""
    cuda: bool = False

    def sizes(self, competitor: Competitor) -> dict:
        """The arguments of ``build`` for one competitor."""
        return {**self.size, **competitor.size}


# programs


def attention(n: int, s: int, d: int, c: int, gates: int = 0, device: str = "cpu") -> dict:
    """Pooled attention with cross-entropy in float32; linear without gates."""
    tokens, labels = labelled_tokens(n, s, d, c, device=device)
    mixer = cvxlib.SelfAttention(features=d, outputs=c)
    activation = cvxlib.GatedReLU.sample(mixer, gates, seed=0) if gates else cvxlib.Linear()
    return {
        "mixer": mixer,
        "activation": activation,
        "loss": cvxlib.CrossEntropy(),
        "tokens": tokens,
        "targets": labels,
    }


def token_regression(n: int, s: int, d: int, c: int) -> dict:
    """Linear attention, one prediction for each token, with squared loss in float64."""
    tokens, targets = token_targets(n, s, d, c)
    mixer = cvxlib.SelfAttention(features=d, outputs=c)
    return {
        "mixer": mixer,
        "activation": cvxlib.Linear(),
        "loss": cvxlib.SquaredLoss(),
        "tokens": tokens,
        "targets": targets,
        "pool": None,
    }


def neurons(n: int, d: int, gates: int) -> dict:
    """A two-layer gated ReLU network with one output and squared loss in float64."""
    tokens, targets = relu_values(n, d)
    mixer = cvxlib.MLP(features=d, outputs=1)
    return {
        "mixer": mixer,
        "activation": cvxlib.GatedReLU.sample(mixer, gates, seed=0),
        "loss": cvxlib.SquaredLoss(),
        "tokens": tokens,
        "targets": targets,
    }


def handwriting(n: int, gates: int) -> dict:
    """Gated attention over patches of handwritten digits, with cross-entropy in float64."""
    from cvxlib.vision import digits

    data = digits(train=n)
    mixer = cvxlib.SelfAttention(features=data.tokens.shape[2], outputs=data.classes)
    return {
        "mixer": mixer,
        "activation": cvxlib.GatedReLU.sample(mixer, gates, seed=0),
        "loss": cvxlib.CrossEntropy(),
        "tokens": data.tokens,
        "targets": data.labels,
    }


# competitors


def ours(**options) -> Competitor:
    return Competitor("ours", competitors.ours, options)


def adamw(heads: int, quick: bool) -> tuple[Competitor, ...]:
    """The paper's protocol at two learning rates; a few epochs are enough to see that it runs."""
    epochs = 4 if quick else 70
    return tuple(
        Competitor(f"AdamW {rate:g}", competitors.adamw, {"heads": heads, "epochs": epochs, "batch": 20, "rate": rate})
        for rate in (5e-3, 1e-3)
    )


ADAMW_NOTE = (
    "AdamW: 70 epochs, batch 20, in float32. Bars count the better of the two learning rates by final objective, and the time of "
    "that one run; evaluating the objective after each epoch is not counted."
)


def growth(base: Mapping, axes: Mapping[str, tuple], tol: float) -> tuple[Competitor, ...]:
    """cvxlib alone, with one size at a time varied around a base."""
    return tuple(
        Competitor(f"{axis} = {value}", competitors.ours, {"tol": tol}, {**base.get(axis, {}), axis: value})
        for axis, values in axes.items()
        for value in values
    )


#: sizes that grow one at a time, samples from where they outweigh what does not depend on them; gates grow on a base of their own
GROWTH = {
    "n": (8_000, 16_000, 32_000, 64_000, 128_000),
    "s": (8, 16, 32, 64, 128),
    "d": (8, 12, 16, 24, 32),
    "c": (4, 8, 16, 32, 64),
    "gates": (2, 4, 8, 16, 32),
}
QUICK_GROWTH = {"n": (100, 200, 400)}
GROWTH_BASE = {"gates": {"n": 1_000, "s": 16, "d": 12, "c": 4}}


def problems(quick: bool = False) -> dict[str, Problem]:
    """All problems by name, at full size or at a tiny one."""
    growing = QUICK_GROWTH if quick else GROWTH
    entries = (
        Problem(
            name="clarabel",
            title="linear attention for each token, squared loss, against an interior-point method",
            build=token_regression,
            size={"n": 20, "s": 4, "d": 3, "c": 2} if quick else {"n": 200, "s": 16, "d": 8, "c": 4},
            fraction=0.05,
            competitors=(ours(tol=1e-6), Competitor("Clarabel", competitors.cvxpy, {"solver": "CLARABEL"})),
            bars=(
                Bar("relative difference of values to Clarabel", same_value("Clarabel"), at_most=1e-5),
                Bar("times faster than Clarabel, by CVXPY's time", time_ratio("Clarabel"), at_least=20),
                Bar("times faster than Clarabel, by its own time", solver_time_ratio("Clarabel"), at_least=20),
            ),
            note="CVXPY's time is that of Problem.solve; building its expression tree is not counted. A solver's own time is what it reports.",
        ),
        Problem(
            name="scs",
            title="linear attention for each token, squared loss, against a first-order conic solver",
            build=token_regression,
            size={"n": 20, "s": 4, "d": 3, "c": 2} if quick else {"n": 200, "s": 16, "d": 10, "c": 4},
            fraction=0.05,
            competitors=(
                Competitor("SCS", competitors.cvxpy, {"solver": "SCS", "eps": 1e-6, "max_iters": 1_000_000}),
                Competitor("ours", competitors.ours, {"tol": 1e-6, "accuracy_of": "SCS"}),
            ),
            bars=(
                Bar("relative difference of values to SCS", same_value("SCS"), at_most=1e-5),
                Bar("times faster than SCS, by CVXPY's time", time_ratio("SCS"), at_least=5),
                Bar("times faster than SCS, by its own time", solver_time_ratio("SCS"), at_least=5),
            ),
            note="Ours stops at the certified gap of the point SCS returned (but no looser than 1e-5 and no tighter than 1e-9).",
        ),
        Problem(
            name="attention",
            title="pooled linear attention, cross-entropy, float32",
            build=attention,
            size={"n": 100, "s": 6, "d": 4, "c": 3} if quick else {"n": 2_000, "s": 64, "d": 64, "c": 10},
            fraction=0.03,
            competitors=(ours(tol=1e-3), *adamw(heads=32, quick=quick)),
            bars=(
                Bar("certified relative gap", certified_gap, at_most=1e-3),
                Bar("peak memory of the process, GiB", peak_memory, at_most=2),
                Bar("times faster than 70 epochs of AdamW", time_ratio("AdamW"), at_least=3),
                Bar("our objective over AdamW's", objective_ratio("AdamW"), at_most=1),
            ),
            note=ADAMW_NOTE,
        ),
        Problem(
            name="gated-attention",
            title="pooled gated attention, cross-entropy, float32",
            build=attention,
            size={"n": 100, "s": 6, "d": 4, "c": 3, "gates": 3}
            if quick
            else {"n": 2_000, "s": 49, "d": 32, "c": 10, "gates": 16},
            fraction=0.1,
            competitors=(ours(tol=1e-3), *adamw(heads=1, quick=quick)),
            bars=(
                Bar("certified relative gap", certified_gap, at_most=1e-3),
                Bar("times faster than 70 epochs of AdamW", time_ratio("AdamW"), at_least=2),
                Bar("our objective over AdamW's", objective_ratio("AdamW"), at_most=1),
            ),
            note=ADAMW_NOTE,
        ),
        Problem(
            name="scnn",
            title="two-layer gated ReLU network with one output, squared loss, float64",
            build=neurons,
            size={"n": 60, "d": 5, "gates": 10} if quick else {"n": 2_000, "d": 50, "gates": 500},
            fraction=0.01,
            competitors=(
                Competitor("scnn", competitors.scnn, {"tol": 1e-10, "max_iterations": 100_000}),
                Competitor("ours", competitors.ours, {"tol": 1e-6, "accuracy_of": "scnn"}),
            ),
            bars=(
                Bar("relative difference of values to scnn", same_value("scnn"), at_most=1e-5),
                Bar("times faster than scnn to the same certified gap", time_ratio("scnn"), at_least=2),
            ),
            note="Ours stops at the certified gap of the point scnn returned (but no looser than 1e-5 and no tighter than 1e-9).",
        ),
        Problem(
            name="digits",
            title="gated attention on handwritten digits, cross-entropy, float64",
            build=handwriting,
            size={"n": 50, "gates": 2} if quick else {"n": 1_400, "gates": 8},
            beta=2e-2 if quick else 2e-3,
            competitors=(
                ours(tol=1e-3),
                Competitor("FISTA", competitors.ours, {"tol": 1e-3, "solver": "proximal"}),
                *adamw(heads=4, quick=quick),
            ),
            bars=(
                Bar("certified relative gap", certified_gap, at_most=1e-3),
                Bar("evaluations", evaluations, at_most=499),
                Bar("times faster than 70 epochs of AdamW", time_ratio("AdamW"), at_least=2),
                Bar("our objective over AdamW's", objective_ratio("AdamW"), at_most=1),
            ),
            note=ADAMW_NOTE + " FISTA: cvxlib's plain proximal gradient.",
        ),
        Problem(
            name="growth",
            title="time and memory to a certified gap of 1e-3 as one size grows; pooled attention, linear (gated where gates grow)",
            build=attention,
            size={"n": 200, "s": 4, "d": 4, "c": 3} if quick else {"n": 4_000, "s": 16, "d": 16, "c": 8},
            fraction=0.03,
            competitors=growth(GROWTH_BASE, growing, tol=1e-3),
            bars=(
                Bar("exponent of time in n", exponent("n", "seconds"), at_least=0.9, at_most=1.1),
                Bar("exponent of memory in n", exponent("n", "extra_bytes"), at_most=1.1),
            ),
            note="Memory is the peak above what the process held before the solve; 'at most linear' allows an exponent of 1.1.",
        ),
        Problem(
            name="cuda-attention",
            title="pooled linear attention on a GPU, cross-entropy, float32",
            build=attention,
            size={"n": 500, "s": 16, "d": 8, "c": 5, "device": "cuda"}
            if quick
            else {"n": 50_000, "s": 196, "d": 100, "c": 100, "device": "cuda"},
            fraction=0.03,
            competitors=(Competitor("roofline", competitors.roofline), ours(tol=1e-3)),
            bars=(
                Bar("certified relative gap", certified_gap, at_most=1e-3),
                Bar("seconds", time_to_solve, at_most=60),
            ),
            cuda=True,
        ),
        Problem(
            name="cuda-gated",
            title="pooled gated attention on a GPU, cross-entropy, float32",
            build=attention,
            size={"n": 500, "s": 16, "d": 8, "c": 5, "gates": 2, "device": "cuda"}
            if quick
            else {"n": 50_000, "s": 196, "d": 100, "c": 100, "gates": 8, "device": "cuda"},
            fraction=0.03,
            competitors=(Competitor("roofline", competitors.roofline), ours(tol=1e-2)),
            bars=(
                Bar("certified relative gap", certified_gap, at_most=1e-2),
                Bar("seconds", time_to_solve, at_most=300),
            ),
            cuda=True,
        ),
    )
    return {problem.name: problem for problem in entries}


def available(problem: Problem) -> bool:
    """Whether this machine can run a problem."""
    return not problem.cuda or torch.cuda.is_available()
