r"""Spatially structured data: patches in disjoint sets, one of which carries the label."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cvxlib.ground.checks import float_tensor, positive_float, positive_int, require


@dataclass(frozen=True)
class SpatialSample:
    r"""Draws from a :class:`SpatialTask`.

    Args:
        tokens: (n, D, d) the patches.
        labels: (n,) :math:`y \in \{-1, +1\}`, in the tokens' dtype.
        lit: (n,) index of the set that carries the label.
        signal: (n, D) the coefficient of each patch along :math:`w^\star`: y in the lit set, :math:`\delta_j` elsewhere.
    """

    tokens: Tensor
    labels: Tensor
    lit: Tensor
    signal: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class SpatialTask:
    r"""The spatially structured distribution on D = L C patches.

    .. math:: &X_j = y\,w^\star + \xi_j \ (j \in S_l), \qquad X_j = \delta_j\,w^\star + \xi_j \ (j \notin S_l), \\
        &\xi_j \sim \mathcal N\big(0, \sigma^2 (I - w^\star w^{\star\top})\big)

    with :math:`y = \pm 1` and the lit set l uniform, :math:`\delta_j = \pm 1` with probability q/2 each and 0 otherwise.

    Args:
        sets: (L, C) patch indices, each of 0 to D - 1 once.
        signal: (d,) :math:`w^\star`, normalised on entry.
        q: probability that a patch outside the lit set carries a signal of its own, 0 to 1.
        sigma: standard deviation of the noise.

    Raises:
        TypeError, ValueError: sets that are no partition, a signal that is zero, q outside [0, 1], sigma below 0.

    Source: Jelassi, Sander and Li 2022, Assumption 1; book, chapter "Spatial structure".
    """

    sets: Tensor
    signal: Tensor
    q: float
    sigma: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "sets", check_sets(self.sets))
        signal = float_tensor("signal", self.signal, ("d",))
        require(bool(signal.norm() > 0), "signal", "a vector that is not zero", signal)
        object.__setattr__(self, "signal", signal / signal.norm())
        positive_float("sigma", self.sigma, zero=True)
        require(positive_float("q", self.q, zero=True) <= 1, "q", "a probability", f"{self.q}")

    @classmethod
    def random(
        cls,
        sets: int,
        size: int,
        features: int,
        *,
        q: float = 0.3,
        sigma: float = 0.5,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> SpatialTask:
        """A task with a random partition into ``sets`` sets of ``size`` patches and a random signal in d = ``features``."""
        count, size = positive_int("sets", sets), positive_int("size", size)
        generator = torch.Generator().manual_seed(seed)
        partition = torch.randperm(count * size, generator=generator).reshape(count, size)
        signal = torch.randn(positive_int("features", features), generator=generator, dtype=torch.float64)
        return cls(partition, signal.to(dtype), q, sigma)

    def with_signal(self, seed: int) -> SpatialTask:
        """A second task with the same sets and a new random signal: what a model that learned the sets can transfer to."""
        generator = torch.Generator().manual_seed(seed)
        signal = torch.randn(len(self.signal), generator=generator, dtype=torch.float64).to(self.signal)
        return SpatialTask(self.sets, signal, self.q, self.sigma)

    @property
    def patches(self) -> int:
        """D, the number of patches."""
        return self.sets.numel()

    @property
    def membership(self) -> Tensor:
        """(D,) the set of each patch."""
        return membership(self.sets)

    def sample(self, count: int, seed: int | torch.Generator = 0) -> SpatialSample:
        """``count`` independent draws, the same for the same seed on every device."""
        count, d = positive_int("count", count), len(self.signal)
        generator = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
        labels = torch.randint(0, 2, (count,), generator=generator).double() * 2 - 1
        lit = torch.randint(0, len(self.sets), (count,), generator=generator)
        chance = torch.rand(count, self.patches, generator=generator, dtype=torch.float64)
        noise = self.sigma * torch.randn(count, self.patches, d, generator=generator, dtype=torch.float64)
        others = (chance < self.q / 2).double() - (chance > 1 - self.q / 2).double()
        inside = self.membership.cpu() == lit.unsqueeze(1)
        signal = torch.where(inside, labels.unsqueeze(1), others)
        direction = self.signal.cpu().double()
        tokens = noise + (signal - noise @ direction).unsqueeze(2) * direction
        device = self.signal.device
        return SpatialSample(tokens.to(self.signal), labels.to(self.signal), lit.to(device), signal.to(self.signal))

    def batches(self, size: int, seed: int = 0) -> Iterator[SpatialSample]:
        """An endless stream of fresh batches of ``size`` draws."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield self.sample(size, generator)


def check_sets(sets: object) -> Tensor:
    """The (L, C) index tensor of a partition of 0 to L C - 1 into sets of equal size.

    Raises:
        ValueError: wrong number of axes, or not a partition.
    """
    sets = torch.as_tensor(sets)
    expected = "an (L, C) integer tensor that holds each of 0 to L C - 1 once"
    require(sets.ndim == 2 and sets.numel() > 0 and not sets.is_floating_point(), "sets", expected, sets)
    ordered = sets.flatten().sort().values.cpu()
    require(torch.equal(ordered.long(), torch.arange(sets.numel())), "sets", expected, sets)
    return sets.long()


def membership(sets: Tensor) -> Tensor:
    """(D,) the set of each patch, from sets (L, C)."""
    index = torch.arange(len(sets), device=sets.device).unsqueeze(1).expand_as(sets)
    return torch.empty_like(index.flatten()).scatter_(0, sets.flatten(), index.flatten())
