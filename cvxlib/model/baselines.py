r"""Heads to compare with: a plain linear head, and softmax attention. They are trained, never certified.

Both take tokens (n, s, d) to predictions as :class:`cvxlib.Head` does, and have its ``weight_decay``, so that
:func:`cvxlib.solvers.training.train` trains them on a program's own loss, data and beta.
"""

from __future__ import annotations

import abc

import torch
from torch import Tensor, nn

from cvxlib.ground.checks import positive_int, require


class Baseline(nn.Module, abc.ABC):
    """A network outside the family: anything from tokens to predictions."""

    #: what the network is, and why no certificate exists for it, for the sentence that refuses one
    why_not_certified: str

    def __init__(self, pool: str | None) -> None:
        super().__init__()
        require(pool in ("mean", None), "pool", "'mean' or None", repr(pool))
        self.pool = pool

    @abc.abstractmethod
    def per_token(self, tokens: Tensor) -> Tensor:
        """Predictions (n, s, c) for tokens (n, s, d)."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Predictions for tokens (n, s, d): (n, c) when pooled, (n, s, c) when not."""
        predictions = self.per_token(tokens)
        return predictions.mean(1) if self.pool else predictions

    def weight_decay(self) -> Tensor:
        r"""The penalty :math:`\tfrac12 \|\theta\|^2` of all weights, to be multiplied by beta."""
        return sum((weight.square().sum() for weight in self.parameters()), torch.zeros(())) / 2


class LinearHead(Baseline):
    r"""The plain linear head, :math:`f(X) = X W`: no hidden layer, so no gates and nothing to mix tokens but the pooling.

    Args:
        features: number of features, d.
        outputs: number of outputs, c.
        pool: ``"mean"`` averages the predictions over tokens, ``None`` keeps them.
        dtype: of the weights, which start at 0 (its training is convex, so the start does not matter).

    Source: the linear baseline of Sahiner et al. 2022, section 5.
    """

    why_not_certified = "a plain linear head, whose training is a convex problem of its own (ridge-penalised regression), not this program"

    def __init__(
        self, features: int, outputs: int, pool: str | None = "mean", dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__(pool)
        shape = (positive_int("features", features), positive_int("outputs", outputs))
        self.weight = nn.Parameter(torch.zeros(shape, dtype=dtype))

    def per_token(self, tokens: Tensor) -> Tensor:
        return tokens @ self.weight


class SoftmaxAttention(Baseline):
    r"""Attention as transformers use it, :math:`f(X) = \sum_j \operatorname{softmax}(X U_j X^\top)\, X V_j`, softmax over the keys.

    The weights are those of :class:`cvxlib.SelfAttention` with m heads; only the activation differs, and with it convexity.

    Args:
        features: number of features, d.
        outputs: number of outputs, c.
        heads: number of heads, m.
        pool: ``"mean"`` averages the predictions over tokens, ``None`` keeps them.
        seed: of the random weights, normal with standard deviation 1/d for U and :math:`1/\sqrt{dc}` for V.
        dtype: of the weights.

    Source: Vaswani et al. 2017; book, chapter "Limits of the theory".
    """

    why_not_certified = (
        "softmax attention, which for no choice of gates is linear in its lifted weights, so that no convex program "
        "bounds it from below"
    )

    def __init__(
        self,
        features: int,
        outputs: int,
        heads: int,
        pool: str | None = "mean",
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(pool)
        d, c = positive_int("features", features), positive_int("outputs", outputs)
        m = positive_int("heads", heads)
        generator = torch.Generator().manual_seed(seed)
        u = torch.randn(m, d, d, generator=generator, dtype=torch.float64) / d
        v = torch.randn(m, d, c, generator=generator, dtype=torch.float64) / (d * c) ** 0.5
        self.u, self.v = nn.Parameter(u.to(dtype)), nn.Parameter(v.to(dtype))

    def per_token(self, tokens: Tensor) -> Tensor:
        scores = torch.einsum("nsd,mde,nte->nmst", tokens, self.u, tokens)
        values = torch.einsum("ntd,mdc->nmtc", tokens, self.v)
        return (scores.softmax(-1) @ values).sum(1)
