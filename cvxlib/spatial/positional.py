r"""Positional attention in its simplest form: a score for each pair of positions, one value vector, a polynomial activation."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from cvxlib.ground.checks import float_tensor, instance, positive_float, positive_int, require
from cvxlib.spatial.association import attention_scalars, patch_association
from cvxlib.spatial.data import SpatialSample, SpatialTask, check_sets, membership


class PositionalModel(nn.Module):
    r"""The simplified positional-attention classifier.

    .. math:: &F(X) = \sum_{i=1}^D \phi\Big(D \sum_{j=1}^D S_{ij} \langle v, X_j\rangle\Big), \\
        &S = \operatorname{softmax}_{\text{rows}}(A / \sqrt d), \qquad \phi(z) = \nu z + z^p

    The diagonal of A stays fixed; its other entries and v are trained. The activation is this package's choice: an odd
    polynomial, linear near 0 and convex beyond, so that attention concentrated on one set pays.

    Args:
        scores: (D, D) the matrix A.
        value: (d,) the vector v.
        nu: weight of the linear part of the activation, 0 or more.
        power: p, an odd whole number.

    Raises:
        TypeError, ValueError: weights or an activation of the wrong kind.

    Source: Jelassi, Sander and Li 2022, section 3; book, chapter "Spatial structure".
    """

    def __init__(self, scores: Tensor, value: Tensor, *, nu: float = 0.1, power: int = 3) -> None:
        super().__init__()
        scores, value = float_tensor("scores", scores, ("D", "D")), float_tensor("value", value, ("d",))
        require(scores.shape[0] == scores.shape[1], "scores", "a square matrix", scores)
        require(positive_int("power", power) % 2 == 1, "power", "an odd number", f"{power}")
        self.nu, self.power = positive_float("nu", nu, zero=True), power
        self.diagonal: Tensor
        self.off: Tensor
        self.register_buffer("diagonal", scores.detach().diagonal().clone())
        self.register_buffer("off", 1 - torch.eye(len(scores), dtype=scores.dtype, device=scores.device))
        self.pairs = nn.Parameter(scores.detach() * self.off)
        self.value = nn.Parameter(value.detach().clone())

    @classmethod
    def random(
        cls,
        task: SpatialTask,
        *,
        diagonal: float | None = None,
        scale: float = 0.01,
        value_scale: float = 0.01,
        seed: int = 0,
        nu: float = 0.1,
        power: int = 3,
    ) -> PositionalModel:
        r"""A model to be trained on a task: normal scores of standard deviation ``scale``, a normal v of ``value_scale``, and a fixed diagonal.

        The diagonal is :math:`\sqrt d \log\big((D - 1) / C\big)` by default: at the start a patch gives itself about C / D of its attention.
        """
        generator = torch.Generator().manual_seed(seed)
        count, d = task.patches, len(task.signal)
        if diagonal is None:
            diagonal = d**0.5 * float(torch.tensor((count - 1) / task.sets.shape[1]).log())
        scores = scale * torch.randn(count, count, generator=generator, dtype=torch.float64)
        value = value_scale * torch.randn(d, generator=generator, dtype=torch.float64)
        scores.fill_diagonal_(diagonal)
        return cls(scores.to(task.signal), value.to(task.signal), nu=nu, power=power)

    @property
    def scores(self) -> Tensor:
        """(D, D) the matrix A."""
        return self.pairs * self.off + torch.diag(self.diagonal)

    @property
    def attention(self) -> Tensor:
        """(D, D) the row-stochastic matrix S."""
        return torch.softmax(self.scores / len(self.value) ** 0.5, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        """(n,) the classifier's values for tokens (n, D, d); their sign is the predicted label."""
        mixed = len(self.off) * (tokens @ self.value) @ self.attention.mT
        return (self.nu * mixed + mixed**self.power).sum(1)

    @torch.no_grad()
    def error(self, sample: SpatialSample) -> float:
        """The share of wrong signs."""
        return float((self(sample.tokens) * sample.labels <= 0).double().mean())


@dataclass(frozen=True)
class Trace:
    """What :func:`train_positional` recorded: (k,) tensors, one entry per recorded step."""

    step: Tensor
    alpha: Tensor
    gamma: Tensor
    rho: Tensor
    association: Tensor
    loss: Tensor
    error: Tensor


def train_positional(
    model: PositionalModel,
    task: SpatialTask,
    data: SpatialSample | int,
    *,
    steps: int = 1000,
    lr_value: float = 1e-3,
    lr_scores: float = 100.0,
    clip: float | None = 1.0,
    test: SpatialSample | None = None,
    every: int = 10,
    seed: int = 0,
    progress: bool | None = None,
) -> Trace:
    r"""Gradient descent on the logistic loss :math:`\frac1n\sum_i \log(1 + e^{-y_i F(X_i)})`, in place.

    Args:
        model: what to train.
        task: whose sets and signal the record refers to.
        data: a fixed sample (empirical risk), or the size of a batch drawn afresh at every step (the population risk's gradient).
        steps: number of steps.
        lr_value: step size for v; 0 freezes it.
        lr_scores: step size for A; 0 freezes it.
        clip: largest norm of v's gradient, which explodes on a rare misclassified sample because the activation is a power; None to leave it.
        test: sample on which the error is recorded; by default 2,000 draws.
        every: how many steps between records.
        seed: of the fresh batches and the test sample.
        progress: show a bar; by default only on a terminal.

    Returns:
        The trace.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or range.
        FloatingPointError: the loss is no longer finite; the step sizes are too large.

    Source: Jelassi, Sander and Li 2022, section 4; book, chapter "Spatial structure".
    """
    instance("model", model, PositionalModel, "a PositionalModel")
    instance("task", task, SpatialTask, "a SpatialTask")
    instance("data", data, (SpatialSample, int), "a SpatialSample or a batch size")
    steps, every = positive_int("steps", steps), positive_int("every", every)
    stream = task.batches(data, seed + 1) if isinstance(data, int) else itertools.repeat(data)
    test = task.sample(2000, 10_000 + seed) if test is None else test
    records: list[tuple[float, ...]] = []
    weights: list[Tensor] = [model.value, model.pairs]
    rates = [positive_float("lr_value", lr_value, zero=True), positive_float("lr_scores", lr_scores, zero=True)]
    for step in tqdm(range(steps + 1), desc="positional attention", disable=None if progress is None else not progress):
        batch = next(stream)
        loss = functional.softplus(-batch.labels * model(batch.tokens)).mean()
        if not bool(torch.isfinite(loss)):
            raise FloatingPointError(f"the loss is {float(loss.detach())} after {step} steps: use smaller step sizes")
        if step % every == 0 or step == steps:
            scores = model.scores.detach()
            scalars = attention_scalars(scores, model.value.detach(), task.signal, task.sets)
            association = patch_association(scores, task.sets)
            records.append(
                (step, scalars.alpha, scalars.gamma, scalars.rho, association, float(loss.detach()), model.error(test))
            )
        if step == steps:
            break
        gradients = torch.autograd.grad(loss, weights)
        with torch.no_grad():
            for weight, gradient, rate in zip(weights, gradients, rates, strict=True):
                if clip is not None and weight is model.value:
                    gradient = gradient * min(1.0, clip / max(float(gradient.norm()), 1e-30))
                weight -= rate * gradient
    return Trace(*torch.tensor(records, dtype=torch.float64).unbind(1))


def deranged_scores(sets: Tensor, strength: float) -> Tensor:
    r"""Scores by which every patch of set l attends to set l + 1 (mod L): patch association 0.

    They are block-attending scores with their rows permuted, and F does not change when the rows of S are permuted, so the
    classifier is the same function as the associated one.

    Args:
        sets: (L, C) with L at least 2.
        strength: score of the attended pairs; the others have 0.

    Source: Jelassi, Sander and Li 2022, Theorem 3.2 asserts that such solutions exist; book, chapter "Spatial structure".
    """
    sets = check_sets(sets)
    require(len(sets) >= 2, "sets", "at least two sets", sets)
    index = membership(sets)
    return strength * ((index.unsqueeze(1) + 1) % len(sets) == index).double()


def merged_scores(sets: Tensor, strength: float, margin: float = 1e-3) -> Tensor:
    r"""Symmetric positive semidefinite scores with constant diagonal and the least association that such scores allow, 1/C.

    Sets are taken in pairs; patches of a pair score ``strength`` with each other, and ``margin`` more across the pair than
    within a set. The attention is that of L/2 sets of 2C patches, to within ``margin``, but the order of the scores puts the
    wrong set first. A Gram matrix :math:`A = P^\top P` with equal norms always ranks a patch itself first, hence 1/C.

    Args:
        sets: (L, C) with L even.
        strength: score within a pair of sets.
        margin: greater than 0.
    """
    sets = check_sets(sets)
    require(len(sets) % 2 == 0, "sets", "an even number of sets", sets)
    margin, index = positive_float("margin", margin), membership(sets)
    pair, same = index // 2, index.unsqueeze(1) == index
    scores = strength * (pair.unsqueeze(1) == pair).double() + margin * ((pair.unsqueeze(1) == pair) & ~same).double()
    return scores + margin * sets.shape[1] * torch.eye(len(scores), dtype=scores.dtype, device=scores.device)
