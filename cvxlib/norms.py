r"""The block nuclear norm: value, proximal operator, dual norm.

Blocks are stacked: ``z`` is ``(K, p, q)`` and the norm is :math:`\sum_k \|Z_k\|_*`.
"""

from __future__ import annotations

import torch
from torch import Tensor


class BlockNuclearNorm:
    r"""The sum of the nuclear norms of stacked blocks, :math:`N(Z) = \sum_k \|Z_k\|_*`.

    Nothing here is differentiated by autograd: the SVD's derivative does not exist at repeated singular values.

    Source: book, chapter "The nuclear norm".
    """

    @torch.no_grad()
    def value(self, z: Tensor) -> Tensor:
        """The norm of (K, p, q) blocks, a scalar."""
        return torch.linalg.svdvals(z).sum()

    @torch.no_grad()
    def dual(self, g: Tensor) -> Tensor:
        r"""The dual norm :math:`\max_k \|G_k\|_2` of (K, p, q) blocks, a scalar."""
        return self.spectral(g).max()

    @torch.no_grad()
    def spectral(self, g: Tensor) -> Tensor:
        """(K,) the largest singular value of each block."""
        return torch.linalg.svdvals(g)[..., 0]

    @torch.no_grad()
    def prox(self, z: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
        r"""Singular value thresholding, and the norm of what is left.

        .. math:: \operatorname{prox}(Z) = \arg\min_W \tfrac12\|W - Z\|_F^2 + \tau N(W)

        Args:
            z: (K, p, q) blocks.
            threshold: :math:`\tau \ge 0`.

        Returns:
            (K, p, q) the minimiser, and its norm as a scalar.
        """
        u, sigma, vh = torch.linalg.svd(z, full_matrices=False)
        sigma = (sigma - threshold).clamp(min=0)
        return (u * sigma.unsqueeze(-2)) @ vh, sigma.sum()
