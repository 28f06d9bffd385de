r"""Layers that alternate one step on each energy, stacks of them, and the minimum they head for."""

from __future__ import annotations

import math
from typing import TypedDict, Unpack

import torch
from torch import Tensor, nn

from cvxlib.energy._inputs import matrix, token_array
from cvxlib.energy.attention import attention_energy, attention_step, kernel
from cvxlib.energy.feedforward import feedforward_energy, feedforward_gradient, feedforward_step
from cvxlib.ground.checks import positive_float, positive_int, require, wrong_type


def matched_step(
    Y: Tensor, attention: Tensor, feedforward: Tensor, B: Tensor, step: float = 1.0, nonnegative: bool = False
) -> Tensor:
    r"""One step on the total energy :math:`E = E_1 + E_2` that never raises it, for any step in (0, 2); with ``nonnegative`` from Y >= 0.

    .. math:: &Y \leftarrow \Pi\bigl(Y - \alpha P^{-1} (\nabla E_1(Y) + \nabla E_2(Y))\bigr), \\
        &P = \|W_a\|_2^2\,(D + I) + \max\bigl(1, \lambda_{\max}\bigl(I + \tfrac12(W_f + W_f^\top)\bigr)\bigr) I

    P bounds the curvature of the separable majoriser of E_1 plus that of E_2, token by token. Attention and feed-forward act side by
    side on the same tokens, with one preconditioner for both and the value projection :math:`W_a W_a^\top`.

    Args:
        Y: (..., s, d) tokens.
        attention: (d, k) the weights :math:`W_a`.
        feedforward: (d, d) the weights :math:`W_f`.
        B: the bias, of a shape that broadcasts to Y.
        step: :math:`\alpha > 0`.
        nonnegative: projects onto the nonnegative orthant (ReLU).

    Returns:
        (..., s, d) tokens.

    Raises:
        TypeError, ValueError: arrays of the wrong kind or of shapes that do not fit, a step not above 0.

    Source: book, chapter "Transformers as optimisation", theorem 5.
    """
    step = positive_float("step", step)
    slope = feedforward_gradient(Y, feedforward, B)
    Y = token_array("Y", Y)
    z = Y @ matrix("attention", attention, Y)
    a = kernel(z)
    degree = a.sum(-1, keepdim=True)
    slope = slope + ((degree + 1) * z - a @ z) @ attention.mT
    symmetric = (feedforward + feedforward.mT).detach() / 2
    # constants to autograd, as in EnergyLayer.weights
    curvature = 1 + torch.linalg.eigvalsh(symmetric)[-1].clamp(min=0)
    norm = torch.linalg.matrix_norm(attention.detach(), 2).square()
    Y = Y - step * slope / ((degree + 1) * norm + curvature)
    return Y.clamp(min=0) if nonnegative else Y


class EnergyOptions(TypedDict, total=False):
    """The options of an :class:`EnergyLayer`."""

    step: float
    feedforward_step: float
    reweighted: bool
    sink: bool
    matched: bool
    nonnegative: bool
    bound: float | None


class EnergyLayer(nn.Module):
    r"""One transformer layer: an attention step, then a feed-forward step (alternating inexact minimisation).

    .. math:: E(Y) &= E_1(Y) + E_2(Y) \\
        &= -\sum_{i<j} e^{-\|(y_i - y_j) W_a\|^2/2} + \tfrac12\|Y W_a\|_F^2 \\
        &\quad + \tfrac12\operatorname{tr} Y W_f Y^\top + \tfrac12\|Y - B\|_F^2

    Args:
        attention: (d, k) the weights :math:`W_a`.
        feedforward: (d, d) the weights :math:`W_f`.
        step: :math:`\alpha` of the attention step.
        feedforward_step: :math:`\alpha` of the feed-forward step.
        reweighted, sink: as in :func:`cvxlib.energy.attention_step`.
        matched: one :func:`matched_step` on the sum, of size ``step``, in place of the two.
        nonnegative: the feed-forward step ends with a ReLU and the energy has the orthant's indicator.
        bound: the symmetric part of :math:`W_f` is scaled down to this spectral norm where it is larger, so that E_2 is convex and
            bounded below; ``None`` leaves it as it is.

    Raises:
        TypeError, ValueError: weights of the wrong kind or shape, steps not above 0.

    Source: Yang, Huang and Wipf 2022; book, chapter "Transformers as optimisation".
    """

    def __init__(
        self,
        attention: Tensor,
        feedforward: Tensor,
        *,
        step: float = 1.0,
        feedforward_step: float = 1.0,
        reweighted: bool = True,
        sink: bool = False,
        matched: bool = False,
        nonnegative: bool = False,
        bound: float | None = 0.9,
    ) -> None:
        super().__init__()
        feedforward = token_array("feedforward", feedforward)
        matrix("feedforward", feedforward, feedforward, square=True)
        matrix("attention", attention, feedforward)
        require(reweighted or not sink, "sink", "False where reweighted is False", sink)
        self.attention = nn.Parameter(attention.detach().clone())
        self.feedforward = nn.Parameter(feedforward.detach().clone())
        self.step, self.feedforward_step = (
            positive_float("step", step),
            positive_float("feedforward_step", feedforward_step),
        )
        self.reweighted, self.sink, self.matched, self.nonnegative = reweighted, sink, matched, nonnegative
        self.bound = None if bound is None else positive_float("bound", bound)

    @classmethod
    def random(
        cls, features: int, width: int, *, scale: float = 1.0, seed: int = 0, **options: Unpack[EnergyOptions]
    ) -> EnergyLayer:
        r"""A float32 layer with normal weights: entries of :math:`W_a` of deviation scale / sqrt(d), of :math:`W_f` 1 / (2 sqrt(d))."""
        generator = torch.Generator().manual_seed(seed)
        d = positive_int("features", features)
        attention = torch.randn(d, positive_int("width", width), generator=generator, dtype=torch.float64)
        feedforward = torch.randn(d, d, generator=generator, dtype=torch.float64)
        root = math.sqrt(d)
        return cls((attention * scale / root).float(), (feedforward / (2 * root)).float(), **options)

    def weights(self) -> Tensor:
        """(d, d) the symmetric part of the feed-forward weights, within the bound."""
        symmetric = (self.feedforward + self.feedforward.mT) / 2
        if self.bound is None:
            return symmetric
        # the factor is a constant to autograd: a singular value has no derivative where it is repeated
        norm = torch.linalg.matrix_norm(symmetric.detach(), 2)
        return symmetric * (self.bound / norm.clamp(min=self.bound))

    def forward(self, Y: Tensor, B: Tensor) -> Tensor:
        """(..., s, d) tokens after both steps, for tokens Y (..., s, d) and a bias B that broadcasts to them."""
        if self.matched:
            return matched_step(Y, self.attention, self.weights(), B, self.step, self.nonnegative)
        Y = attention_step(Y, self.attention, self.step, self.reweighted, sink=self.sink)
        return feedforward_step(Y, self.weights(), B, self.feedforward_step, self.nonnegative)

    def energy(self, Y: Tensor, B: Tensor) -> Tensor:
        """(...) the total energy of tokens Y (..., s, d)."""
        return attention_energy(Y, self.attention) + feedforward_energy(Y, self.weights(), B, self.nonnegative)

    def extra_repr(self) -> str:
        d, k = self.attention.shape
        return (
            f"d={d}, k={k}, step={self.step:g}, feedforward_step={self.feedforward_step:g}, "
            f"reweighted={self.reweighted}, sink={self.sink}, matched={self.matched}, nonnegative={self.nonnegative}"
        )


class EnergyTransformer(nn.Module):
    r"""A classifier made of energy layers: embed, alternate, average the tokens, read out.

    The embedded tokens are both the start :math:`Y_0` and the bias B, so all layers of a shared stack head for a minimum of one energy.

    Args:
        features: features of the input tokens.
        outputs: number of outputs, c.
        width: d, features of the embedded tokens.
        layers: how many layers.
        shared: one set of weights for every layer (one energy) or a set for each.
        seed: of the weights.
        options: passed to every :class:`EnergyLayer`.

    Source: Yang, Huang and Wipf 2022; book, chapter "Transformers as optimisation".
    """

    def __init__(
        self,
        features: int,
        outputs: int,
        *,
        width: int = 16,
        layers: int = 12,
        shared: bool = True,
        seed: int = 0,
        **options: Unpack[EnergyOptions],
    ) -> None:
        super().__init__()
        self.depth = positive_int("layers", layers)
        count = 1 if shared else self.depth
        self.layers = nn.ModuleList(EnergyLayer.random(width, width, seed=seed + i, **options) for i in range(count))
        generator = torch.Generator().manual_seed(seed)
        self.embed = nn.Parameter(
            torch.randn(positive_int("features", features), width, generator=generator) / features**0.5
        )
        self.bias = nn.Parameter(torch.zeros(width))
        self.readout = nn.Parameter(
            torch.randn(width, positive_int("outputs", outputs), generator=generator) / width**0.5
        )

    def start(self, tokens: Tensor) -> Tensor:
        """(..., s, d) the embedded tokens: the start and the bias B; nonnegative where the layers are."""
        Y = token_array("tokens", tokens) @ self.embed + self.bias
        return Y.clamp(min=0) if self.layer(0).nonnegative else Y

    def layer(self, index: int) -> EnergyLayer:
        """The layer at a depth, 0 to ``depth - 1``."""
        layer = self.layers[index % len(self.layers)]
        if not isinstance(layer, EnergyLayer):
            raise wrong_type("layers", "energy layers", layer)
        return layer

    def forward(self, tokens: Tensor) -> Tensor:
        """(..., c) predictions for tokens (..., s, features)."""
        Y = B = self.start(tokens)
        for index in range(self.depth):
            Y = self.layer(index)(Y, B)
        return Y.mean(-2) @ self.readout

    @torch.no_grad()
    def trace(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The energy of each layer just before and just after it acts, two (layers, ...) tensors.

        Layers that share their weights share one energy, so ``after[l] == before[l + 1]``; others each have their own.
        """
        Y = B = self.start(tokens)
        before, after = [], []
        for index in range(self.depth):
            layer = self.layer(index)
            before.append(layer.energy(Y, B))
            Y = layer(Y, B)
            after.append(layer.energy(Y, B))
        return torch.stack(before), torch.stack(after)


@torch.no_grad()
def trajectory(layer: EnergyLayer, Y: Tensor, B: Tensor, layers: int) -> list[Tensor]:
    """The tokens before and after each of ``layers`` applications of one layer, ``layers + 1`` tensors (..., s, d)."""
    states = [token_array("Y", Y)]
    for _ in range(positive_int("layers", layers)):
        states.append(layer(states[-1], B))
    return states


@torch.no_grad()
def minimise(layer: EnergyLayer, Y: Tensor, B: Tensor, *, iterations: int = 2000, tol: float = 1e-10) -> Tensor:
    r"""A stationary point of a layer's total energy, by matched steps, none of which can raise it.

    E_1 is not convex: the point belongs to the start.

    Args:
        layer: whose energy is meant, whatever its own steps are.
        Y: (..., s, d) start, made nonnegative where the layer asks for it.
        B: the bias.
        iterations: at most so many steps.
        tol: stop when no energy falls by more than ``tol`` times its size in one step.

    Returns:
        (..., s, d) tokens.
    """
    weights = layer.weights()
    Y = token_array("Y", Y).clamp(min=0) if layer.nonnegative else token_array("Y", Y)
    value = layer.energy(Y, B)
    for _ in range(positive_int("iterations", iterations)):
        Y = matched_step(Y, layer.attention, weights, B, nonnegative=layer.nonnegative)
        previous, value = value, layer.energy(Y, B)
        if bool(((previous - value) <= tol * (1 + value.abs())).all()):
            break
    return Y
