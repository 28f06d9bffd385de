r"""The quadratic energy whose proximal gradient step is a feed-forward layer."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cvxlib.energy._inputs import matrix, token_array
from cvxlib.ground.checks import positive_float, require, wrong_type


def feedforward_energy(Y: Tensor, W: Tensor, B: Tensor, nonnegative: bool = False) -> Tensor:
    r"""The energy of a feed-forward layer.

    .. math:: E_2(Y) = \tfrac12\operatorname{tr} Y W Y^\top + \tfrac12\|Y - B\|_F^2 \quad (+\infty
        \text{ unless } Y \ge 0, \text{ when nonnegative})

    Only the symmetric part of W counts; the energy is convex, and bounded below, where
    :math:`I + \tfrac12(W + W^\top) \succeq 0` (bounded where it is positive definite).

    Args:
        Y: (..., s, d) tokens.
        W: (d, d) weights, symmetric or not.
        B: the bias, of a shape that broadcasts to Y: (d,), (s, d) or (..., s, d).
        nonnegative: adds the indicator of the nonnegative orthant.

    Returns:
        (...) energies; infinite where the tokens leave the orthant.

    Raises:
        TypeError, ValueError: arrays of the wrong kind or of shapes that do not fit.

    Source: Yang, Huang and Wipf 2022; book, chapter "Transformers as optimisation", equation (7).
    """
    Y, W, B = _check(Y, W, B)
    value = ((Y @ W) * Y + (Y - B).square()).sum((-2, -1)) / 2
    if nonnegative:
        value = value.masked_fill((Y < 0).any(-1).any(-1), torch.inf)
    return value


def feedforward_gradient(Y: Tensor, W: Tensor, B: Tensor) -> Tensor:
    r"""(..., s, d) the gradient :math:`Y + \tfrac12 Y(W + W^\top) - B` of the smooth part of :func:`feedforward_energy`."""
    Y, W, B = _check(Y, W, B)
    return Y + Y @ (W + W.mT) / 2 - B


def feedforward_step(Y: Tensor, W: Tensor, B: Tensor, step: float = 1.0, nonnegative: bool = False) -> Tensor:
    r"""One feed-forward layer: a (projected) gradient step on :func:`feedforward_energy`.

    .. math:: &Y \leftarrow \Pi\bigl((1 - \alpha) Y + \alpha (B - \tfrac12 Y(W + W^\top))\bigr), \\
        &\alpha = 1:\; Y \leftarrow \operatorname{ReLU}\bigl(B - \tfrac12 Y (W + W^\top)\bigr)

    The projection onto the orthant is the ReLU; without it the step is linear. The gradient is Lipschitz with constant
    :math:`L = \lambda_{\max}(I + \tfrac12(W + W^\top))`, so from a point of finite energy no step in (0, 2/L] raises it.

    Args:
        Y: (..., s, d) tokens.
        W: (d, d) weights.
        B: the bias, of a shape that broadcasts to Y.
        step: :math:`\alpha > 0`.
        nonnegative: projects, that is, applies the ReLU.

    Returns:
        (..., s, d) tokens.

    Raises:
        TypeError, ValueError: arrays of the wrong kind or of shapes that do not fit, a step not above 0.

    Source: Yang, Huang and Wipf 2022; book, chapter "Transformers as optimisation", equation (8).
    """
    step = positive_float("step", step)
    Y = Y - step * feedforward_gradient(Y, W, B)
    return Y.clamp(min=0) if nonnegative else Y


def _check(Y: object, W: object, B: object) -> tuple[Tensor, Tensor, Tensor]:
    Y = token_array("Y", Y)
    expected = f"a {str(Y.dtype).removeprefix('torch.')} tensor that broadcasts to the tokens' shape {tuple(Y.shape)}"
    if isinstance(B, np.ndarray) and B.dtype.kind == "f":
        B = torch.from_numpy(np.ascontiguousarray(B))
    if not isinstance(B, Tensor) or B.dtype != Y.dtype:
        raise wrong_type("B", expected, B)
    fits = B.ndim <= Y.ndim and all(b in (1, y) for b, y in zip(B.shape[::-1], Y.shape[::-1], strict=False))
    require(fits, "B", expected, B)
    return Y, matrix("W", W, Y, square=True), B
