r"""Losses: value, gradient, convex conjugate, and the targets they accept.

A loss acts on rows: ``predictions`` is ``(rows, c)`` and ``targets`` is either ``(rows, c)`` values or
``(rows,)`` class indices. A row is a sample when the head is pooled and a token when it is not.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from cvxlib.ground.checks import describe, float_tensor, require, wrong_type
from cvxlib.ground.identity import Part

_TINY = torch.finfo(torch.float64).tiny


class Loss(Part, abc.ABC):
    r"""A convex loss :math:`\ell(f, y)` with Lipschitz gradient.

    Every method works row by row, so that sums, means and shards are the caller's choice. A loss is a frozen value: one of your own
    with parameters is best a frozen dataclass, and equals another of its class with the same parameters.
    """

    #: smallest L with ``||gradient(f) - gradient(g)|| <= L ||f - g||``
    smoothness: float

    @abc.abstractmethod
    def check(self, targets: object, shape: tuple[int, ...], outputs: int) -> Tensor:
        """Targets as a tensor of this loss's form: ``shape`` is (n,) when pooled and (n, s) per token."""

    @abc.abstractmethod
    def value(self, predictions: Tensor, targets: Tensor) -> Tensor:
        """(rows,) the loss of each row."""

    @abc.abstractmethod
    def gradient(self, predictions: Tensor, targets: Tensor) -> Tensor:
        """(rows, c) the gradient of each row's loss in its predictions."""

    @abc.abstractmethod
    def conjugate(self, dual: Tensor, targets: Tensor) -> Tensor:
        r"""(rows,) the conjugate :math:`\ell^*(\rho, y) = \sup_f \langle \rho, f\rangle - \ell(f, y)`; infinite outside its domain."""

    def conjugate_above(self, dual: Tensor, targets: Tensor) -> tuple[Tensor, Tensor] | None:
        r"""Numbers that the conjugate does not exceed in exact arithmetic, for rigorous bounds; ``None`` where the loss does not know.

        Args:
            dual: (rows, c) float64, in the domain to rounding.
            targets: as in ``check``.

        Returns:
            (rows,) upper bounds on :math:`\ell^*(x, y)` at a point x that lies in the domain exactly, and (rows, c) bounds on
            :math:`|x - \rho|`.
        """
        return None

    @abc.abstractmethod
    def to_domain(self, dual: Tensor, targets: Tensor) -> Tensor:
        """(rows, c) a point of the conjugate's domain next to one that rounding has moved off it."""

    @abc.abstractmethod
    def prox(self, point: Tensor, targets: Tensor, rho: float, start: Tensor | None = None) -> Tensor:
        r"""(rows, c) the proximal point :math:`\arg\min_f \ell(f, y) + \tfrac\rho2 \|f - v\|^2`, from a starting guess."""

    @abc.abstractmethod
    def hessian_product(self, predictions: Tensor, directions: Tensor) -> Tensor:
        """(rows, c) the Hessian of each row's loss at its predictions, times a direction."""

    @abc.abstractmethod
    def curvature(self, predictions: Tensor, targets: Tensor) -> Tensor:
        """(rows, c) the diagonal of the Hessian of each row's loss."""


@dataclass(frozen=True)
class SquaredLoss(Loss):
    r"""Squared loss :math:`\ell(f, y) = \tfrac12 \|f - y\|^2`, with :math:`\ell^*(\rho, y) = \tfrac12\|\rho\|^2 + \langle \rho, y\rangle`."""

    smoothness = 1.0

    def check(self, targets: object, shape: tuple[int, ...], outputs: int) -> Tensor:
        axes = ("n", "c") if len(shape) == 1 else ("n", "s", "c")
        targets = float_tensor("targets", targets, axes)
        expected = (*shape, outputs)
        require(tuple(targets.shape) == expected, "targets", f"shape {expected}, ({', '.join(axes)})", targets)
        return targets

    def value(self, predictions: Tensor, targets: Tensor) -> Tensor:
        return (predictions - targets).square().sum(-1) / 2

    def gradient(self, predictions: Tensor, targets: Tensor) -> Tensor:
        return predictions - targets

    def conjugate(self, dual: Tensor, targets: Tensor) -> Tensor:
        return (dual * (dual / 2 + targets)).sum(-1)

    def conjugate_above(self, dual: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        size = (dual.abs() * (dual.abs() / 2 + targets.abs())).sum(-1)
        rounding = (dual.shape[-1] + 8) * torch.finfo(dual.dtype).eps
        return self.conjugate(dual, targets) + rounding * size + _TINY, torch.zeros_like(dual)

    def to_domain(self, dual: Tensor, targets: Tensor) -> Tensor:
        return dual

    def prox(self, point: Tensor, targets: Tensor, rho: float, start: Tensor | None = None) -> Tensor:
        return (targets + rho * point) / (1 + rho)

    def hessian_product(self, predictions: Tensor, directions: Tensor) -> Tensor:
        return directions

    def curvature(self, predictions: Tensor, targets: Tensor) -> Tensor:
        return torch.ones_like(predictions)


@dataclass(frozen=True)
class CrossEntropy(Loss):
    r"""Softmax cross-entropy :math:`\ell(f, y) = \log \sum_k e^{f_k} - f_y` (natural logarithm).

    Its conjugate is the negative entropy of :math:`\pi = \rho + e_y`,
    :math:`\ell^*(\rho, y) = \sum_k \pi_k \log \pi_k`, where :math:`\pi` is a probability vector.
    """

    smoothness = 0.5

    def check(self, targets: object, shape: tuple[int, ...], outputs: int) -> Tensor:
        expected = f"class indices 0 to {outputs - 1} of shape {shape}"
        require(outputs >= 2, "mixer", "at least 2 outputs for CrossEntropy", f"{outputs} output")
        targets = torch.as_tensor(targets)
        if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
            raise wrong_type("targets", expected, targets)
        require(tuple(targets.shape) == shape, "targets", expected, targets)
        low, high = int(targets.min()), int(targets.max())
        require(low >= 0 and high < outputs, "targets", expected, f"{describe(targets)} with values {low} to {high}")
        return targets.long()

    def value(self, predictions: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(predictions, targets, reduction="none")

    def gradient(self, predictions: Tensor, targets: Tensor) -> Tensor:
        return torch.softmax(predictions, -1) - self._one_hot(targets, predictions)

    def conjugate(self, dual: Tensor, targets: Tensor) -> Tensor:
        probabilities = dual + self._one_hot(targets, dual)
        eps = torch.finfo(dual.dtype).eps
        inside = (probabilities >= -4 * eps).all(-1) & ((probabilities.sum(-1) - 1).abs() < 4 * eps * dual.shape[-1])
        value = torch.special.entr(probabilities.clamp(min=0)).sum(-1).neg()
        return torch.where(inside, value, torch.inf)

    def conjugate_above(self, dual: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        # the point meant is pi / sum(pi) - e_y in exact arithmetic, for the floats pi; the sum is 1 to rounding where the point is good
        eps, c = torch.finfo(dual.dtype).eps, dual.shape[-1]
        corner = self._one_hot(targets, dual)
        pi = (dual + corner).clamp(min=0)
        total = pi.sum(-1, keepdim=True)
        off = (total - 1).abs() + (c + 4) * eps * total  # a bound on |sum(pi) - 1|
        logs = pi.clamp(min=_TINY).log()
        # sum (pi / S) log(pi / S) = (1 / S) sum pi log pi - log S, with log S >= 1 - 1 / S >= -off / (1 - off)
        value, size = (pi * logs).sum(-1), (pi * logs.abs()).sum(-1)
        shrink = off.squeeze(-1) / (1 - off.squeeze(-1))
        above = value + (c + 16) * eps * (size + 1) + shrink * (size + 1)
        inside = (off < 0.5).squeeze(-1) & torch.isfinite(above)
        distance = (pi - (dual + corner)).abs() * (1 + 4 * eps) + 4 * eps * (pi + corner)
        distance = distance + pi * (off / (1 - off)) * (1 + 8 * eps)
        return torch.where(inside, above, torch.inf), torch.where(inside.unsqueeze(-1), distance, torch.inf)

    def to_domain(self, dual: Tensor, targets: Tensor) -> Tensor:
        corner = self._one_hot(targets, dual)
        probabilities = (dual + corner).clamp(min=0)
        return probabilities / probabilities.sum(-1, keepdim=True) - corner

    def prox(self, point: Tensor, targets: Tensor, rho: float, start: Tensor | None = None) -> Tensor:
        # Newton's method, each row with its own step length; the Hessian is diagonal plus rank one
        corner, eps = self._one_hot(targets, point), torch.finfo(point.dtype).eps

        def at(f: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            """Probabilities, gradient and value, from one pass of exponentials."""
            below = f - f.amax(-1, keepdim=True)
            p, away = below.exp(), f - point
            total = p.sum(-1, keepdim=True)
            value = total.log().squeeze(-1) - (corner * below).sum(-1) + rho / 2 * away.square().sum(-1)
            p = p / total
            return p, p - corner + rho * away, value

        f = point if start is None else start
        p, gradient, value = at(f)
        small = 64 * eps * (1 + rho * point.abs().max())
        for _ in range(50):
            if bool(gradient.abs().max() <= small):
                break
            along, share = gradient / (p + rho), p / (p + rho)
            tilt = (p * along).sum(-1, keepdim=True) / (1 - (p * share).sum(-1, keepdim=True))
            step = along + share * tilt
            slope = (gradient * step).sum(-1)
            length, slack = torch.ones_like(slope), 8 * eps * (1 + value.abs())
            for _ in range(30):
                trial = f - length.unsqueeze(-1) * step
                p, gradient, trial_value = at(trial)
                short = trial_value > value - length * slope / 4 + slack
                if not bool(short.any()):
                    break
                length = torch.where(short, length / 2, length)
            f, value = trial, trial_value
        return f

    def hessian_product(self, predictions: Tensor, directions: Tensor) -> Tensor:
        weighted = torch.softmax(predictions, -1) * directions
        return weighted - torch.softmax(predictions, -1) * weighted.sum(-1, keepdim=True)

    def curvature(self, predictions: Tensor, targets: Tensor) -> Tensor:
        p = torch.softmax(predictions, -1)
        return p * (1 - p)

    @staticmethod
    def _one_hot(targets: Tensor, like: Tensor) -> Tensor:
        # functional.one_hot makes int64 and reads all targets first: with many classes that takes longer than the softmax beside it
        return torch.zeros_like(like).scatter_(-1, targets.unsqueeze(-1), 1)
