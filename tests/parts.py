"""Parts of one's own, as a user would write them: ordinary classes with attributes, and frozen dataclasses with fields of every kind."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

import cvxlib


class Weighing(cvxlib.Loss):
    """The squared loss times ``weight``, which subclasses supply."""

    def check(self, targets, shape, outputs):
        return cvxlib.SquaredLoss().check(targets, shape, outputs)

    @property
    def smoothness(self):
        return self.weight

    def value(self, predictions, targets):
        return self.weight * (predictions - targets).square().sum(-1) / 2

    def gradient(self, predictions, targets):
        return self.weight * (predictions - targets)

    def conjugate(self, dual, targets):
        return (dual * (dual / (2 * self.weight) + targets)).sum(-1)

    def to_domain(self, dual, targets):
        return dual

    def prox(self, point, targets, rho, start=None):
        return (self.weight * targets + rho * point) / (self.weight + rho)

    def hessian_product(self, *arguments):
        return self.weight * arguments[-1]

    def curvature(self, predictions, targets):
        return torch.full_like(predictions, self.weight)


class Ordinary(Weighing):
    """With an attribute."""

    def __init__(self, weight):
        self.weight = weight


@dataclass(frozen=True)
class Frozen(Weighing):
    """With a field."""

    weight: float


class Threshold(cvxlib.Activation):
    """Open where the mean token's first feature is above a level, closed elsewhere."""

    count = 1

    def __init__(self, level):
        self.level = level

    def check(self, mixer):
        pass

    def masks(self, mixer, tokens, block=0):
        return (tokens.mean(1)[:, :1] > self.level)[:, :, None, None]


@dataclass(frozen=True)
class Scaled(cvxlib.MLP):
    """With a tensor: a scale for every feature."""

    scale: Tensor = field(default_factory=lambda: torch.ones(2, dtype=torch.float64))

    def hidden(self, tokens, u):
        return super().hidden(tokens * self.scale.to(tokens), u)


@dataclass(frozen=True)
class Picking(cvxlib.MLP):
    """With a tuple, a number and a string: some of the features, scaled."""

    kept: tuple[int, ...] = (0, 1)
    scale: float = 1.0
    label: str = "some"

    def hidden(self, tokens, u):
        mask = torch.zeros(tokens.shape[2]).to(tokens)
        mask[list(self.kept)] = self.scale
        return super().hidden(tokens * mask, u)
