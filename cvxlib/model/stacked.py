r"""Stacked data: the rows of :math:`L_X` of all samples, one hyperplane of u-space each, and what their entries are weighted by."""

from __future__ import annotations

import torch
from torch import Tensor

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
    basis = torch.eye(mixer.p, dtype=tokens.dtype, device=tokens.device).reshape(mixer.p, *mixer.shape)
    return mixer.hidden(tokens, basis).movedim(1, -1).reshape(-1, mixer.p)


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
