r"""From lifted blocks to weights, and back.

A singular value decomposition :math:`Z_k = \sum_j \sigma_j\, a_j b_j^\top` gives the heads
:math:`u_j = \sqrt{\sigma_j}\, a_j`, :math:`\operatorname{vec} V_j = \sqrt{\sigma_j}\, b_j`, whose weight decay is the nuclear norm.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cvxlib.model.mixers import Mixer
from cvxlib.program.certificate import Factors


@torch.no_grad()
def factor(mixer: Mixer, z: Tensor) -> Factors:
    r"""Balanced rank-one terms of lifted blocks, as many as their ranks.

    Args:
        mixer: the mixer the blocks belong to.
        z: (K, p, q) lifted blocks.

    Returns:
        Factors with :math:`\tfrac12\sum_j(\|u_j\|^2 + \|V_j\|_F^2) = \sum_k \|Z_k\|_*`, largest singular values first.

    Source: Sahiner et al. 2022, Theorem 3.1; book, chapter "Lifting".
    """
    left, sigma, right = torch.linalg.svd(z, full_matrices=False)
    cut = torch.finfo(z.dtype).eps * max(z.shape[1:]) * sigma.max()
    block, index = (sigma > cut).nonzero(as_tuple=True)
    order = sigma[block, index].argsort(descending=True)
    block, index = block[order], index[order]
    root = sigma[block, index].sqrt().unsqueeze(1)
    u = (left.mT[block, index] * root).reshape(-1, *mixer.shape)
    v = (right[block, index] * root).reshape(-1, mixer.width, mixer.block_outputs)
    return Factors(u, v, block)
