r"""Stacked data: the rows of :math:`L_X` of all samples, one hyperplane of u-space each, and what their entries are weighted by."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from cvxlib.ground.checks import require
from cvxlib.model.mixers import Mixer


@torch.no_grad()
def lifted_rows(mixer: Mixer, tokens: Tensor) -> Tensor:
    r"""The stacked data :math:`L_X`: one row for every sample, output position and hidden entry.

    Args:
        mixer: how tokens are mixed.
        tokens: (n, s, d), what one block sees.

    Returns:
        (R, p) with R = n a h, so that ``lifted_rows(...) @ u.flatten()`` are all hidden entries of u.
    """
    return mixer.rows(tokens).movedim(1, -1).reshape(-1, mixer.p)


def exact_rows(mixer: Mixer, tokens: Tensor) -> np.ndarray:
    """The stacked data without rounding, where the mixer knows them (:meth:`cvxlib.Mixer.exact_rows`), else :func:`lifted_rows` in float64.

    Args:
        mixer: how tokens are mixed.
        tokens: (n, s, d), what one block sees.

    Returns:
        (R, p) an object array of :class:`fractions.Fraction`, or a float64 array; rows in the order of :func:`lifted_rows`.
    """
    rounded = lifted_rows(mixer, tokens.detach().double()).cpu().numpy()
    if not mixer.written_for_its_maps("exact_rows"):
        return rounded
    rows = mixer.exact_rows(np.vectorize(Fraction, otypes=[object])(tokens.detach().double().cpu().numpy()))
    if rows is None:
        return rounded
    size = np.abs(rounded).max(1, keepdims=True)
    require(
        rows.shape == rounded.shape and bool((np.abs(rows.astype(float) - rounded) <= 1e-9 * size).all()),
        "mixer",
        "exact_rows to be the rows that hidden multiplies u with",
        f"other ones of {mixer!r}",
    )
    return rows


@torch.no_grad()
def lifted_weights(mixer: Mixer, tokens: Tensor, dual: Tensor) -> Tensor:
    r"""What each hidden entry is multiplied by in :math:`\langle \rho, f\rangle`: the rows :math:`w_r` of :math:`\sum_r \sigma(l_r^\top u)\, w_r`.

    Args:
        mixer: how tokens are mixed.
        tokens: (n, s, d), what one block sees.
        dual: (n, a, c / B), or (n, 1, c / B) when predictions are averaged over output positions.

    Returns:
        (R, q), row by row in the order of :func:`lifted_rows`.
    """
    positions = mixer.hidden(tokens[:1], tokens.new_zeros(1, *mixer.shape)).shape[2]
    dual = dual.expand(-1, positions, -1) * (dual.shape[1] / positions)
    return torch.einsum("nac,nhw->nahwc", dual, mixer.values(tokens)).reshape(-1, mixer.q)
