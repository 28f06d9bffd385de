"""Projections onto the graph of a linear map, with a matrix that is factored once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cvxlib.ground.one_process import OneProcess
from cvxlib.operators.maps import BlockMap, DesignMap, MaskedMap


class GraphProjection:
    r"""The nearest point :math:`(AZ, Z)` to a given (f, W): :math:`\min_Z \|AZ - f\|^2 + r \|Z - W\|^2`, by Cholesky.

    Args:
        block: the linear map A.
        reduce: sums a tensor over the processes that hold rows.
    """

    def __init__(self, block: BlockMap, reduce: OneProcess) -> None:
        self.block, self.reduce = block, reduce
        # the smaller of the two Gram matrices carries the same information; only that of the columns is a sum over processes
        outer = block.outer if reduce.alone and isinstance(block, (DesignMap, MaskedMap)) else None
        self.wide = outer is not None and block.rows <= block.columns
        self.gram = outer() if outer is not None and self.wide else reduce(block.gram())

    def set_ratio(self, ratio: float) -> None:
        """Factor for r, greater than 0; needed before the first projection."""
        self.ratio, shifted = ratio, self.gram.clone()
        shifted.diagonal().add_(ratio)
        self.factor = torch.linalg.cholesky(shifted)

    def __call__(self, f: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """(rows, o) A Z and (K, p, q) Z, for f (rows, o) and W (K, p, q)."""
        if self.wide:
            multiplier = torch.cholesky_solve(f - self.block.forward(w), self.factor)
            return f - self.ratio * multiplier, w + self.block.adjoint(multiplier)
        z = self._ridge(self.reduce(self.block.adjoint(f)), w)
        return self.block.forward(z), z

    def at(self, f: Tensor) -> Callable[[Tensor], Tensor]:
        r"""The map from W to Z for one f (rows, o); for a tall A it needs the moments :math:`A^\top A` and :math:`A^\top f` only."""
        if self.wide:
            return lambda w: self(f, w)[1]
        moment = self.reduce(self.block.adjoint(f))
        return lambda w: self._ridge(moment, w)

    def _ridge(self, moment: Tensor, w: Tensor) -> Tensor:
        target = (moment + self.ratio * w).reshape(self.block.columns, self.block.copies)
        return torch.cholesky_solve(target, self.factor).reshape(w.shape)
