r"""The energy whose descent is softmax attention, its gradient, its majoriser and its steps.

Everything depends on the tokens through :math:`Z = YW` only. With the Gaussian kernel
:math:`A_{ij} = \exp(-\tfrac12\|z_i - z_j\|^2)`, its degrees :math:`D = \operatorname{diag}(A\mathbf 1)` and
:math:`M = D - A + I`, the gradient of the energy in Z is :math:`MZ`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cvxlib.energy._inputs import matrix, token_array
from cvxlib.ground.checks import positive_float, require


def squared_distances(z: Tensor) -> Tensor:
    """(..., s, s) squared distances between rows of (..., s, k), zero on the diagonal."""
    centred = z - z.mean(-2, keepdim=True)  # distances do not see the mean, rounding does
    norms = centred.square().sum(-1)
    squares = norms.unsqueeze(-1) + norms.unsqueeze(-2) - 2 * centred @ centred.mT
    eye = torch.eye(z.shape[-2], dtype=torch.bool, device=z.device)
    return squares.masked_fill(eye, 0).clamp(min=0)


def kernel(z: Tensor) -> Tensor:
    """(..., s, s) the Gaussian kernel A of the rows of (..., s, k); ones on the diagonal."""
    return torch.exp(-squared_distances(z) / 2)


def pair_energy(Y: Tensor, W: Tensor) -> Tensor:
    r"""The part of the attention energy that pairs of tokens make.

    .. math:: V(Y) = -\sum_{i<j} \exp\bigl(-\tfrac12\|(y_i - y_j) W\|^2\bigr)

    Args:
        Y: (..., s, d) tokens.
        W: (d, k) weights.

    Returns:
        (...) energies, between -s(s - 1)/2 and 0.

    Raises:
        TypeError, ValueError: arrays of the wrong kind or of shapes that do not fit.

    Source: Yang, Huang and Wipf 2022; book, chapter "Transformers as optimisation".
    """
    Y = token_array("Y", Y)
    return _pairs(Y @ matrix("W", W, Y))


def attention_energy(Y: Tensor, W: Tensor) -> Tensor:
    r"""The energy that softmax attention descends: every pair counted once, and half the squared norm.

    .. math:: E_1(Y) = -\sum_{i<j} \exp\bigl(-\tfrac12\|(y_i - y_j) W\|^2\bigr) + \tfrac12\|YW\|_F^2

    Args:
        Y: (..., s, d) tokens, float32 or float64.
        W: (d, k) weights; the scores of the step are :math:`Y W W^\top Y^\top`.

    Returns:
        (...) energies.

    Raises:
        TypeError, ValueError: arrays of the wrong kind or of shapes that do not fit.

    Source: Yang, Huang and Wipf 2022; book, chapter "Transformers as optimisation", equation (1).
    """
    Y = token_array("Y", Y)
    return energy_of(Y @ matrix("W", W, Y))


def attention_gradient(Y: Tensor, W: Tensor) -> Tensor:
    r"""(..., s, d) the gradient :math:`(D - A + I)\, Y W W^\top` of :func:`attention_energy`.

    Args:
        Y: (..., s, d) tokens.
        W: (d, k) weights.

    Raises:
        TypeError, ValueError: arrays of the wrong kind or of shapes that do not fit.
    """
    Y = token_array("Y", Y)
    z = Y @ matrix("W", W, Y)
    a = kernel(z)
    return ((a.sum(-1, keepdim=True) + 1) * z - a @ z) @ W.mT


def attention_majoriser(Y: Tensor, at: Tensor, W: Tensor, *, separable: bool = False) -> Tensor:
    r"""A quadratic that lies above the attention energy and touches it at a given point.

    The exponential's concavity in the squared distance gives

    .. math:: Q(Y) = E_1(Y_0) + \tfrac12\operatorname{tr} Z^\top M Z - \tfrac12\operatorname{tr} Z_0^\top M Z_0,
        \qquad M = D - A + I \text{ at } Y_0,

    and, because the kernel A is positive semidefinite, :math:`M \preceq D + I` gives the separable

    .. math:: \bar Q(Y) = E_1(Y_0) + \langle M Z_0, Z - Z_0\rangle
        + \tfrac12\operatorname{tr} (Z - Z_0)^\top (D + I) (Z - Z_0),

    whose minimiser is ``attention_step(at, W, sink=True)``.

    Args:
        Y: (..., s, d) where the majoriser is evaluated.
        at: (..., s, d) the point :math:`Y_0` where it touches the energy.
        W: (d, k) weights.
        separable: the second form instead of the first.

    Returns:
        (...) values, never below ``attention_energy(Y, W)``.

    Raises:
        TypeError, ValueError: arrays of the wrong kind or of shapes that do not fit.

    Source: book, chapter "Transformers as optimisation", equations (4) and (6).
    """
    Y, at = token_array("Y", Y), token_array("at", at)
    require(at.shape[-2:] == Y.shape[-2:], "at", f"the tokens' last axes {tuple(Y.shape[-2:])}", at)
    z, z0 = Y @ matrix("W", W, Y), at @ W
    a = kernel(z0)
    degree = a.sum(-1, keepdim=True)

    def product(x: Tensor) -> Tensor:
        return (degree + 1) * x - a @ x

    if separable:
        move = z - z0
        rise = product(z0) * move + (degree + 1) * move.square() / 2
    else:
        rise = (z * product(z) - z0 * product(z0)) / 2
    return energy_of(z0) + rise.sum((-2, -1))


def attention_weights(
    Y: Tensor, W: Tensor, reweighted: bool = True, *, sink: bool = False, keys: Tensor | None = None
) -> Tensor:
    r"""The matrix S that an attention step averages tokens with.

    .. math:: S_{ij} = \frac{\beta_j \exp\langle z_i, z_j\rangle}{\sum_l \beta_l \exp\langle z_i, z_l\rangle},
        \qquad \beta_j = \exp(-\tfrac12\|z_j\|^2)

    With these :math:`\beta` it is :math:`D^{-1} A`: the row sums of a Gaussian kernel, normalised.

    Args:
        Y: (..., s, d) tokens.
        W: (d, k) weights of queries, and of keys unless these are given.
        reweighted: False leaves the weights :math:`\beta` out: the softmax of everyday transformers.
        sink: one is added to every row sum of the kernel, :math:`S = (D + I)^{-1} A`, so that rows pass less than all weight on. In the
            softmax the added term is :math:`e^{\|z_i\|^2 / 2}`, another for each query, and not a key with a fixed vector. It needs ``reweighted=True`` and no ``keys``.
        keys: (d, k) other weights for the keys; the scores :math:`Y W K^\top Y^\top` are then asymmetric.

    Returns:
        (..., s, s) weights whose rows sum to 1, or to less with a sink.

    Raises:
        TypeError, ValueError: arrays of the wrong kind or of shapes that do not fit; a sink without reweighting or with keys.

    Source: Yang, Huang and Wipf 2022; book, chapter "Transformers as optimisation", equation (2).
    """
    Y = token_array("Y", Y)
    W = matrix("W", W, Y)
    if keys is not None:
        keys = matrix("keys", keys, Y)
        require(keys.shape == W.shape, "keys", f"the shape {tuple(W.shape)} of W", keys)
    require(not sink or (reweighted and keys is None), "sink", "False, or reweighted=True and keys=None", sink)
    return _weights(Y @ W, reweighted, sink, None if keys is None else Y @ keys)


def attention_step(
    Y: Tensor,
    W: Tensor,
    step: float = 1.0,
    reweighted: bool = True,
    *,
    sink: bool = False,
    keys: Tensor | None = None,
) -> Tensor:
    r"""One attention layer: :math:`Y \leftarrow (1 - \alpha) Y + \alpha S Y`, with S of :func:`attention_weights`.

    Derivation. The exponential is concave in the squared distance, so E_1 lies below the quadratic with matrix
    :math:`M = D - A + I` (:func:`attention_majoriser`). A gradient step on it, with a diagonal preconditioner P, moves
    :math:`Y - \alpha P^{-1} M Y`.

    - :math:`P = D + I` gives the step with a sink, :math:`S = (D + I)^{-1} A`. Since :math:`M = P - A \preceq P`, it never
      raises E_1 for any step in (0, 2).
    - The step without a sink, :math:`S = D^{-1}A`, is the one with :math:`P = D` and the matrix :math:`D - A` of the pairs alone:
      for a step in (0, 2) it never raises :func:`pair_energy`. E_1 falls too, for a step in (0, 1], where tokens in denser
      surroundings have smaller norms; it can rise where a crowd lies farther out than a straggler.
    - ``reweighted=False`` lets tokens of large norm attract more weight; E_1 then rises at unit scale.

    Args:
        Y: (..., s, d) tokens.
        W: (d, k) weights.
        step: :math:`\alpha > 0`.
        reweighted, sink, keys: as in :func:`attention_weights`.

    Returns:
        (..., s, d) tokens.

    Raises:
        TypeError, ValueError: as :func:`attention_weights`, and a step not above 0.

    Source: Yang, Huang and Wipf 2022; book, chapter "Transformers as optimisation", theorems 1 to 3.
    """
    step = positive_float("step", step)
    Y = token_array("Y", Y)
    return torch.lerp(Y, attention_weights(Y, W, reweighted, sink=sink, keys=keys) @ Y, step)


# on Z = YW, unchecked: what the layers call


def _pairs(z: Tensor) -> Tensor:
    a = kernel(z)
    eye = torch.eye(z.shape[-2], dtype=torch.bool, device=z.device)
    return -a.masked_fill(eye, 0).sum((-2, -1)) / 2


def energy_of(z: Tensor) -> Tensor:
    """(...) the attention energy of rows z = yW, (..., s, k)."""
    return _pairs(z) + z.square().sum((-2, -1)) / 2


def _weights(z: Tensor, reweighted: bool, sink: bool, keys: Tensor | None) -> Tensor:
    if reweighted and keys is None:
        a = kernel(z)
        return a / (a.sum(-1, keepdim=True) + int(sink))
    keys = z if keys is None else keys
    scores = z @ keys.mT
    if reweighted:
        scores = scores - keys.square().sum(-1).unsqueeze(-2) / 2
    return torch.softmax(scores, -1)
